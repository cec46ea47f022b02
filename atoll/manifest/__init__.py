"""The run's atoll.yaml: every choice of one collective model, validated before anything is computed.

Paths of a run, all below the directory that holds atoll.yaml:
    encoded/  clusters/  experts/<cluster>-<name>/  router/  monolith/  ensemble/  student/  report.html
"""

from atoll.manifest.base import Section
from atoll.manifest.evaluation import EVEN, DiversitySettings, EvaluateSettings, SpaceSettings, SweepSettings
from atoll.manifest.run import (
    RECIPES,
    ClusterSettings,
    DataSettings,
    ExpertSettings,
    Manifest,
    MonolithSettings,
    NetworkSettings,
    ObjectiveSettings,
    RouterNetworkSettings,
    RouterSettings,
    SamplingSettings,
    StudentSettings,
    TrainSettings,
    load_manifest,
    parse_manifest,
    recipe_path,
)

__all__ = [
    "EVEN",
    "RECIPES",
    "ClusterSettings",
    "DataSettings",
    "DiversitySettings",
    "EvaluateSettings",
    "ExpertSettings",
    "Manifest",
    "MonolithSettings",
    "NetworkSettings",
    "ObjectiveSettings",
    "RouterNetworkSettings",
    "RouterSettings",
    "SamplingSettings",
    "Section",
    "SpaceSettings",
    "StudentSettings",
    "SweepSettings",
    "TrainSettings",
    "load_manifest",
    "parse_manifest",
    "recipe_path",
]
