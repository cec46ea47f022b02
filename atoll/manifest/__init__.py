"""The run's atoll.yaml: every choice of one collective model, validated before anything is computed.

The paths of a run are in `atoll.storage.layout`.
"""

from atoll.manifest.base import Section
from atoll.manifest.clusters import ClusterSettings
from atoll.manifest.data import DataSettings
from atoll.manifest.evaluation import EVEN, DiversitySettings, EvaluateSettings, SpaceSettings, SweepSettings
from atoll.manifest.network import NetworkSettings, RouterNetworkSettings
from atoll.manifest.objective import ObjectiveSettings
from atoll.manifest.run import (
    RECIPES,
    CommonSettings,
    ExpertSettings,
    GeneralistSettings,
    Manifest,
    MonolithSettings,
    RouterSettings,
    StudentSettings,
    TrainSettings,
    load_manifest,
    parse_manifest,
    recipe_path,
)
from atoll.manifest.sampling import SamplingSettings
from atoll.manifest.training import LoraSettings, TokenRouteSettings, ValidationSettings

__all__ = [
    "EVEN",
    "RECIPES",
    "ClusterSettings",
    "CommonSettings",
    "DataSettings",
    "DiversitySettings",
    "EvaluateSettings",
    "ExpertSettings",
    "GeneralistSettings",
    "LoraSettings",
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
    "TokenRouteSettings",
    "TrainSettings",
    "ValidationSettings",
    "load_manifest",
    "parse_manifest",
    "recipe_path",
]
