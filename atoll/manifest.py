"""The run's atoll.yaml: every choice of one collective model, validated before anything is computed.

Paths of a run, all below the directory that holds atoll.yaml:
    encoded/  clusters/  experts/<cluster>-<name>/  router/  monolith/  ensemble/  report.html
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from atoll.errors import AtollError

MANIFEST = "atoll.yaml"
# Inside an installed package the recipes lie in it; in a checkout they lie beside it.
RECIPES = next(
    d for d in (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes", Path()) if d.is_dir()
)


class Section(BaseModel):
    """A part of the manifest: an unknown key is an error, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(Section):
    """Where pictures come from. source: "glyphs"; subset: "demo" or "all"; size: pixels of a side."""

    source: Literal["glyphs"] = "glyphs"
    subset: Literal["demo", "all"] = "demo"
    size: PositiveInt = 16


class ClusterSettings(Section):
    """k clusters from `fine` centroids (None: what the data bears); method as in `atoll.cluster`."""

    k: PositiveInt = 4
    fine: PositiveInt | None = None
    method: Literal["balanced", "free", "random"] = "balanced"


class NetworkSettings(Section):
    """The free choices of a DiT; the latent's shape and the text's width come from the data."""

    patch: PositiveInt = 4
    width: PositiveInt = 128
    depth: PositiveInt = 4
    heads: PositiveInt = 4
    mlp_ratio: float = Field(4.0, gt=0)
    modulation: Literal["single", "per-block"] = "single"
    pooled: bool = True  # the condition's pooled vector enters the modulation


class TrainSettings(Section):
    """The training loop. ema: decay per step; precision "auto": bf16 where the hardware multiplies it."""

    steps: PositiveInt = 1000
    batch: PositiveInt = 64
    lr: float = Field(1e-3, gt=0)
    warmup: int = Field(50, ge=0)
    decay_from: float = Field(1.0, ge=0, le=1)  # the share of steps after which lr falls linearly to 0; 1: never
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = Field(1.0, gt=0)
    ema: float = Field(0.999, ge=0, lt=1)
    dropout: float = Field(0.1, ge=0, lt=1)  # of the condition
    hold_back: float = Field(0.0, ge=0, lt=1)  # share of the training rows kept for calibration; 0: the val split
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: PositiveInt = 1
    checkpoint_every: PositiveInt = 200
    log_every: PositiveInt = 10


class ObjectiveSettings(Section):
    """What `atoll.objective.Objective` takes; checked by it."""

    prediction: str
    schedule: str | dict[str, Any]
    time_scale: float = 999.0
    time_sampling: str = "uniform"
    weighting: str = "none"

    @model_validator(mode="after")
    def _known(self) -> "ObjectiveSettings":
        from atoll.objective import Objective

        try:
            Objective(**self.model_dump())
        except AtollError as error:
            raise ValueError(str(error)) from None
        return self


class ExpertSettings(Section):
    """One expert: its cluster and objective; `network` and `train` override the run's, key by key."""

    cluster: int = Field(ge=0)
    objective: ObjectiveSettings
    name: str = ""
    network: dict[str, Any] = {}
    train: dict[str, Any] = {}

    @property
    def full_name(self) -> str:
        """Its directory below experts/: 3-eps-cosine."""
        schedule = self.objective.schedule
        schedule_name = schedule if isinstance(schedule, str) else schedule.get("name", "schedule")
        return f"{self.cluster}-{self.name or f'{self.objective.prediction}-{schedule_name}'}"


class RouterNetworkSettings(NetworkSettings):
    """pooled: the router sees the condition's pooled vector too, p(cluster | x_t, t, text); else x_t alone (HDDM)."""

    width: PositiveInt = 64
    depth: PositiveInt = 2
    heads: PositiveInt = 2
    modulation: Literal["single", "per-block"] = "per-block"
    pooled: bool = False


class RouterSettings(Section):
    """The router's network and its training."""

    network: RouterNetworkSettings = RouterNetworkSettings()
    train: dict[str, Any] = {}


class MonolithSettings(Section):
    """The dense model of equal total FLOPs to compare with; batch is usually k times an expert's."""

    objective: ObjectiveSettings
    network: dict[str, Any] = {}
    train: dict[str, Any] = {}


class SamplingSettings(Section):
    steps: PositiveInt = 25
    guidance_scale: float = 2.0
    method: Literal["euler", "heun", "dpm++2m"] = "euler"
    routing: str = "top-2"

    @field_validator("routing")
    @classmethod
    def _known(cls, routing: str) -> str:
        from atoll.routing import build_routing

        try:
            build_routing(routing)
        except AtollError as error:
            raise ValueError(str(error)) from None
        return routing


class EvaluateSettings(Section):
    """What the report's numbers depend on. images: per variant; steps, method, guidance_scale: of the pictures measured
    (those of the grid are drawn by the ensemble's own defaults)."""

    images: PositiveInt = 512
    steps: PositiveInt = 15
    method: Literal["euler", "heun", "dpm++2m"] = "dpm++2m"
    guidance_scale: float = 1.0
    components: PositiveInt = 48  # of the PCA
    reference: PositiveInt = 20_000  # real pictures at most
    held_out: PositiveInt = 128  # latents at most
    levels: tuple[float, ...] = tuple((2 * i + 1) / 20 for i in range(10))  # t of the denoising error
    prompts: tuple[str, ...] = ()  # of the grid; none: captions of held-out pictures
    seeds: PositiveInt = 4  # pictures per prompt in the grid
    batch: PositiveInt = 128
    workers: PositiveInt | None = None  # batches side by side, each on its share of threads; None: one per core
    seed: int = Field(0, ge=0)


class Manifest(Section):
    """The whole of atoll.yaml."""

    name: str
    seed: int = Field(0, ge=0)
    data: DataSettings = DataSettings()
    codec: dict[str, Any] = {"name": "pixels", "channels": 1}
    condition: dict[str, Any] = {"name": "hash"}
    feature: dict[str, Any] = {"name": "hog"}
    clusters: ClusterSettings = ClusterSettings()
    network: NetworkSettings = NetworkSettings()
    train: TrainSettings = TrainSettings()
    experts: tuple[ExpertSettings, ...]
    router: RouterSettings = RouterSettings()
    monolith: MonolithSettings | None = None
    sampling: SamplingSettings = SamplingSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        names = [expert.full_name for expert in self.experts]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two experts are called {name}; give one of them another `name`")
        for expert in self.experts:
            if expert.cluster >= self.clusters.k:
                raise ValueError(
                    f"an expert for cluster {expert.cluster}, but clusters.k is {self.clusters.k}: "
                    f"they are numbered 0 to {self.clusters.k - 1}"
                )
            self.network_of(expert)
            self.train_of(expert)
        if not self.experts:
            raise ValueError("experts: an empty list; expected at least one expert")
        return self

    def network_of(self, part: ExpertSettings | MonolithSettings) -> NetworkSettings:
        """The run's network with the overrides of one expert or of the monolith."""
        return NetworkSettings(**{**self.network.model_dump(), **part.network})

    def train_of(self, part: ExpertSettings | MonolithSettings | RouterSettings) -> TrainSettings:
        """The run's training settings with the overrides of one part."""
        return TrainSettings(**{**self.train.model_dump(), **part.train})

    def find_expert(self, wanted: str) -> ExpertSettings:
        """By full name ("3-eps-cosine"), or by cluster ("3") where it has one expert.

        Raises:
            AtollError: none, or several replicas of that cluster.
        """
        found = [e for e in self.experts if wanted in (e.full_name, str(e.cluster))]
        if len(found) == 1:
            return found[0]
        names = ", ".join(e.full_name for e in (found or self.experts))
        problem = f"cluster {wanted} has {len(found)} experts" if found else f"no expert {wanted!r} in {MANIFEST}"
        raise AtollError(f"{problem}; expected one of {names}")


def parse_manifest(text: str, where: str) -> Manifest:
    """Raises AtollError with the first problem: the key, what was got, what is expected."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise AtollError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise AtollError(f"{where}: holds {type(content).__name__}; expected keys such as name, data, experts")
    try:
        return Manifest(**content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the manifest"
        if first["type"] == "extra_forbidden":
            raise AtollError(f"{where}: unknown key {key}; {_known_keys(first['loc'])}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise AtollError(f"{where}: {key}: {message}") from None
    except TypeError as error:  # keys that are no strings
        raise AtollError(f"{where}: {error}") from None


def _known_keys(location: tuple[int | str, ...]) -> str:
    """What may stand where an unknown key was found."""
    model: Any = Manifest
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return "remove it"
    return f"expected one of {', '.join(model.model_fields)}"


def load_manifest(run: Path) -> Manifest:
    """The manifest of the run directory (or the yaml file) `run`.

    Raises:
        AtollError: no such file, or anything in it that is unknown or out of range.
    """
    file = run / MANIFEST if run.is_dir() else run
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AtollError(
            f"{file}: not found; `atoll init {run}` makes one from a recipe, or name the run with --run"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise AtollError(f"{file}: cannot be read ({error})") from None
    return parse_manifest(text, str(file))


def recipe_path(name: str) -> Path:
    """A built-in recipe by name ("demo"), or a path to one.

    Raises:
        AtollError: neither.
    """
    for candidate in (RECIPES / f"{name}.yaml", Path(name)):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    raise AtollError(f"no recipe {name!r}; expected one of {known}, or a path to a yaml file")
