"""The command line: one command per stage, no logic. Heavy imports are inside the commands: `atoll --help` is instant.

app.py       the application, options that commands share, error messages
stages.py    from images to a report: init, encode, cluster, assemble, evaluate, demo
sampling.py  sample
training.py  train, launch, distil, synthesize
tools.py     plan, convert
captions.py  recaption
trained.py   calibrate, ema
research.py  compare, study, statistics
collective.py  collective key, open, join, claim, release, publish, members, status
serve.py     serve
"""

from atoll.cli import captions, collective, research, sampling, serve, stages, tools, trained, training
from atoll.cli.app import app, main

__all__ = [
    "app",
    "captions",
    "collective",
    "main",
    "research",
    "sampling",
    "serve",
    "stages",
    "tools",
    "trained",
    "training",
]
