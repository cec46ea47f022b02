"""Experiments over several seeds: many runs that differ in what is asked about, trained, measured and put in tables.

`run_study` does all of it and goes on where it stopped: `atoll study eurosat`.
"""

from atoll.study.recipe import Study, StudyRun, load_study
from atoll.study.run import run_study

__all__ = ["Study", "StudyRun", "load_study", "run_study"]
