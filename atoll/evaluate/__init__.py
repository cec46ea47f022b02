"""Evaluation: compare an ensemble's images with real ones, and report.

`evaluate_run` evaluates a run's directory, `evaluate` any variants on any data.
"""

from atoll.evaluate.measure import evaluate
from atoll.evaluate.metrics.frechet import DenoisingError, Moments, PixelPCA, frechet_distance
from atoll.evaluate.run import evaluate_run
from atoll.evaluate.types import Reference, Results, Score, Variant
from atoll.manifest import EvaluateSettings

__all__ = [
    "DenoisingError",
    "EvaluateSettings",
    "Moments",
    "PixelPCA",
    "Reference",
    "Results",
    "Score",
    "Variant",
    "evaluate",
    "evaluate_run",
    "frechet_distance",
]
