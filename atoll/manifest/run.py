"""The run's atoll.yaml: every choice of one collective model, validated before anything is computed."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, PositiveInt, PrivateAttr, ValidationError, model_validator

from atoll.encoders.trust import STRANGER, Trust
from atoll.errors import AtollError
from atoll.manifest.base import Section, parse_yaml
from atoll.manifest.clusters import ClusterSettings
from atoll.manifest.data import DataSettings
from atoll.manifest.evaluation import EvaluateSettings
from atoll.manifest.levels import check_covered, check_part_levels
from atoll.manifest.network import NetworkSettings, RouterNetworkSettings
from atoll.manifest.objective import ObjectiveSettings
from atoll.manifest.sampling import SamplingSettings
from atoll.manifest.start import check_starts, names_common
from atoll.manifest.targets import TargetsSettings
from atoll.manifest.training import LoraSettings, TokenRouteSettings, ValidationSettings
from atoll.storage.layout import COMMON, GENERALIST, MANIFEST, MONOLITH, ROUTER, STUDENT, RunLayout

# An installed package contains the recipes; in a checkout they are beside it.
RECIPES = next(
    d for d in (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes", Path()) if d.is_dir()
)


class TrainSettings(Section):
    """The training loop. `atoll plan` computes what fits which GPU with which switches."""

    renamed: ClassVar[dict[str, str]] = {"hold_back": "calibration_holdout"}

    steps: PositiveInt = 1000
    batch: PositiveInt = 64  # rows per step, over all processes and accumulated parts
    lr: float = Field(1e-3, gt=0)
    lr_width: PositiveInt | None = None  # the width at which lr was found (muP); null: lr is that of every width
    warmup: int = Field(50, ge=0)
    decay_from: float = Field(1.0, ge=0, le=1)  # fraction of steps after which lr falls linearly to 0; 1: never
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float | None = Field(1.0, gt=0)  # largest norm of the gradients; null: they are not clipped
    ema: float = Field(0.9999, ge=0, lt=1)  # decay per step
    ema_profiles: tuple[float, ...] = ()  # widths of power-function averages for `atoll ema` (EDM2, 2312.02696)
    ema_snapshot_every: PositiveInt = 5000  # steps between two snapshots of these averages
    # To start from: `common`, the run's common model; or, relative to the run, an expert, or a run, for its part of the
    # same name.
    init: str | None = None
    dropout: float = Field(0.1, ge=0, lt=1)  # of the condition
    # Of captions of tags, separated by commas: the fraction dropped, the first ones that stay in place, and whether the
    # others come in random order.
    tag_dropout: float = Field(0.0, ge=0, lt=1)
    keep_tags: int = Field(0, ge=0)
    shuffle_tags: bool = False
    skip: str | None = None  # a text file of keys, relative to the run: rows that are left out
    # Fraction of the training rows held out for calibration; 0: the val split is used.
    calibration_holdout: float = Field(0.0, ge=0, lt=1)
    # The targets that encoding stored, see TargetsSettings. The router predicts none.
    targets_weight: float = Field(0.0, ge=0)  # of their term in the loss; 0: none
    targets_block: PositiveInt | None = None  # the number of blocks whose tokens predict them; null: half of all
    targets_until: float = Field(0.5, gt=0, le=1)  # the fraction of steps after which the term is dropped
    token_route: TokenRouteSettings | None = None  # random tokens that skip the middle blocks; null: none
    # Speed and memory.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of autocast; auto: bf16 if the hardware has it
    threads: PositiveInt = 1  # per process on a CPU
    accumulate: PositiveInt = 1  # micro-batches of a step
    compile: bool = False  # compile each block
    checkpointing: Literal["none", "selective", "full"] = "none"  # activations computed again in the backward pass
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, AdamW for the rest
    optimizer_state: Literal["fp32", "8bit"] = "fp32"  # of AdamW
    fused_backward: bool = False  # the backward pass steps each parameter and frees its gradient; needs clip: null
    block_swap: int = Field(0, ge=0)  # at most this many blocks rest in the CPU's memory; needs checkpointing
    ema_device: Literal["same", "cpu"] = "same"
    sharding: Literal["replicate", "shard"] = "replicate"  # several processes: DDP or FSDP2
    # Checkpoints, logs and samples: steps between two; 0: never.
    checkpoint_every: PositiveInt = 200
    # After the last step: "all" keeps the last checkpoint, and the one before the decay of lr, to extend the training
    # exactly; "last" keeps the last one; "none" removes all once the artifact is written.
    keep_checkpoints: Literal["all", "last", "none"] = "all"
    log_every: PositiveInt = 10
    validate_every: int = Field(1000, ge=0)
    sample_every: int = Field(0, ge=0)  # a grid for captions of held-out images, without guidance
    validation: ValidationSettings | None = None  # images for your own prompts; None: none
    track: Literal["auto", "none", "tensorboard", "wandb"] = "auto"  # auto: TensorBoard if it is installed
    spike: float = Field(8.0, gt=1)  # a rise of the log-loss by this many standard deviations rolls back, as NaN does

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} is no multiple of accumulate {self.accumulate}")
        if self.fused_backward and self.clip is not None:
            raise ValueError(
                f"fused_backward with clip {self.clip:g}: the norm of all gradients is known only after the steps; set "
                "clip: null"
            )
        if self.fused_backward and self.accumulate > 1:
            raise ValueError(
                f"fused_backward with accumulate {self.accumulate}: no gradient stays to be summed; set accumulate: 1"
            )
        if self.fused_backward and self.optimizer == "muon":
            raise ValueError("fused_backward with optimizer muon: it steps matrices of one shape together; set adamw")
        # Each of these would keep the copies on the GPU, or take weights from where they rest; Muon would compute on
        # the CPU.
        pairs = (("checkpointing", "none"), ("compile", True), ("optimizer_state", "8bit"), ("optimizer", "muon"))
        for key, value in pairs:
            if self.block_swap and getattr(self, key) == value:
                expected = "full or selective" if key == "checkpointing" else "the default"
                raise ValueError(f"block_swap with {key} {value}: not supported; set {key} to {expected}")
        for width in self.ema_profiles:
            if not 0 < width < 0.288:  # the plain mean has 0.2887
                raise ValueError(f"ema_profiles: {width}; expected widths sigma_rel above 0 and below 0.288")
        return self


class ExpertSettings(Section):
    """One expert: its cluster and objective; `network` and `train` override the run's, key by key."""

    cluster: int = Field(ge=0)
    objective: ObjectiveSettings
    name: str = ""
    network: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """Its directory below experts/: 3-eps-cosine."""
        schedule = self.objective.schedule
        schedule_name = schedule if isinstance(schedule, str) else schedule.get("name", "schedule")
        return f"{self.cluster}-{self.name or f'{self.objective.prediction}-{schedule_name}'}"


class RouterSettings(Section):
    """The router's network and its training.

    Attributes:
        path: the noisy latents it is trained on: on the linear path, as in sampling ("linear"), or on the schedule of
            the cluster's first expert ("experts"; HDDM leaves open which).
    """

    network: RouterNetworkSettings = RouterNetworkSettings()
    path: Literal["linear", "experts"] = "linear"
    train: dict[str, Any] = Field(default_factory=dict)


class MonolithSettings(Section):
    """The dense model of equal total FLOPs to compare with; batch is usually k times an expert's."""

    objective: ObjectiveSettings
    network: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)


class CommonSettings(MonolithSettings):
    """The model that all experts start from: trained on all clusters, or on the images that anyone may have.

    `atoll train common` writes it into common/. An expert starts from it with `train: {init: common}`, all experts with
    `init: common` in the run's `train`. That holds for experts only: monolith and student are trained from scratch
    unless their own `train` says the same.
    """


class GeneralistSettings(MonolithSettings):
    """An expert of all clusters: with `objective.levels`, of the noise levels at which the others are not used.

    `atoll train generalist` writes it into generalist/, and `atoll assemble` puts it into the ensemble. Without levels
    it stands in only for clusters without an expert. As an expert, it starts from the run's `init: common`.
    """


class StudentSettings(MonolithSettings):
    """The dense model that is distilled from the ensemble (DDM section 5).

    Attributes:
        teacher: the expert that owns a sample's cluster, which needs no router, or the routed ensemble.
    """

    teacher: Literal["owner", "ensemble"] = "owner"


class Manifest(Section):
    """The whole of atoll.yaml."""

    name: str
    seed: int = Field(0, ge=0)
    data: DataSettings = DataSettings()
    codec: dict[str, Any] = Field(default_factory=lambda: {"name": "pixels", "channels": 1})
    condition: dict[str, Any] = Field(default_factory=lambda: {"name": "hash"})
    feature: dict[str, Any] = Field(default_factory=lambda: {"name": "hog"})
    targets: TargetsSettings = TargetsSettings()
    clusters: ClusterSettings = ClusterSettings()
    network: NetworkSettings = NetworkSettings()
    train: TrainSettings = TrainSettings()
    experts: tuple[ExpertSettings, ...]
    common: CommonSettings | None = None
    generalist: GeneralistSettings | None = None
    router: RouterSettings = RouterSettings()
    monolith: MonolithSettings | None = None
    student: StudentSettings | None = None
    lora: LoraSettings = LoraSettings()
    sampling: SamplingSettings = SamplingSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    _allowed: Trust = PrivateAttr(default=STRANGER)  # not in atoll.yaml: the command line decides it

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        self._check_starts()
        self._check_levels()
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
            self.train_lora_of(expert)
        if not self.experts:
            raise ValueError("experts: an empty list; expected at least one expert")
        return self

    def _check_starts(self) -> None:
        """Raise ValueError if a part starts from a common model that is not there, or that it cannot start from."""
        parts = {**self.denoisers, ROUTER: self.router}
        inits = {name: part.train.get("init") for name, part in parts.items()}
        check_starts({"train": self.train.init, "lora": self.lora.train.get("init"), **inits}, self.common is not None)
        # A typing error of the common model or the generalist must not wait for its training.
        for part in (part for part in (self.common, self.generalist) if part is not None):
            self.network_of(part)
            self.train_of(part)

    def _check_levels(self) -> None:
        """Raise ValueError if a part of some levels only has to denoise all of them, or if a level has no network."""
        for name, part in self.denoisers.items():
            check_part_levels(name, part.objective.levels, self.train_of(part).model_dump())
        check_covered(self.experts, self.generalist)

    def network_of(self, part: ExpertSettings | MonolithSettings) -> NetworkSettings:
        """The run's network with the overrides of one expert, or of a model of all clusters."""
        return NetworkSettings(**{**self.network.model_dump(), **part.network})

    def size_step(self, factor: int) -> int:
        """The number that divides every side of an image: the codec's `factor` times all networks' patches."""
        patches = [self.network_of(part).patch for part in self.denoisers.values()]
        return factor * math.lcm(*patches, self.router.network.patch)

    @property
    def denoisers(self) -> dict[str, ExpertSettings | MonolithSettings]:
        """Every section that trains a denoiser, by its name in messages."""
        whole = {name: getattr(self, name) for name in (COMMON, GENERALIST, MONOLITH, STUDENT)}
        experts = {f"expert {expert.full_name}": expert for expert in self.experts}
        return {**experts, **{name: part for name, part in whole.items() if part is not None}}

    @property
    def ensemble_parts(self) -> tuple[ExpertSettings | GeneralistSettings, ...]:
        """The experts, and the generalist if there is one."""
        return (*self.experts, *([self.generalist] if self.generalist is not None else []))

    def train_of(self, part: ExpertSettings | MonolithSettings | RouterSettings) -> TrainSettings:
        """The run's training settings with the overrides of one part.

        The run's `init: common` is for its experts, the generalist among them. The common model itself, the router, the
        monolith and the student do not inherit it; the latter two start from the common model if their own `train` says
        so.
        """
        run = self.train.model_dump()
        if self._is_common(self.train.init) and not isinstance(part, ExpertSettings | GeneralistSettings):
            run["init"] = None
        if isinstance(part, RouterSettings):
            run["lr_width"] = None  # found for experts; router.train may have its own
        settings = TrainSettings(**{**run, **part.train})
        router = isinstance(part, RouterSettings)  # which predicts no targets, and sees all tokens
        return settings.model_copy(update={"targets_weight": 0.0, "token_route": None}) if router else settings

    def starts_from_common(self, part: ExpertSettings | MonolithSettings | RouterSettings) -> bool:
        """Return whether the training of a part starts from the run's common model."""
        return self._is_common(self.train_of(part).init)

    def _is_common(self, init: object) -> bool:
        # Without the section, a directory called common is one like any other.
        return self.common is not None and names_common(init)

    def train_lora_of(self, expert: ExpertSettings) -> TrainSettings:
        """The training settings of an expert's low-rank update; only `lora.train` sets targets, routes, lr_width."""
        off = {"targets_weight": 0.0, "token_route": None, "lr_width": None}
        return TrainSettings(**{**self.train_of(expert).model_dump(), **off, **self.lora.train})

    def allowing(self, *, hub: bool, paths: bool) -> "Manifest":
        """Return the manifest of a user who allows cards to reach the hub, or paths outside their directory."""
        copy = self.model_copy()
        copy._allowed = Trust(hub=hub, paths=paths)
        return copy

    def skipping(self, path: str) -> "Manifest":
        """Return the manifest with the same list of keys for all parts. path: as in `train.skip`."""

        # A part's own settings come before the run's.
        def own(part: Any) -> Any:
            return None if part is None else part.model_copy(update={"train": {**part.train, "skip": path}})

        return self.model_copy(
            update={
                "train": self.train.model_copy(update={"skip": path}),
                "experts": tuple(map(own, self.experts)),
                **{name: own(getattr(self, name)) for name in (COMMON, GENERALIST, ROUTER, MONOLITH, STUDENT)},
            }
        )

    def trust_in_cards(self, run: Path | None = None) -> Trust:
        """What the cards of this run may reach: the weights that atoll.yaml names, and the directory `run`."""
        frozen = (self.codec, self.condition, self.feature)
        named = frozenset(config["weights"] for config in frozen if isinstance(config.get("weights"), str))
        return replace(self._allowed, named=named, run=run)

    def find_expert(self, wanted: str) -> ExpertSettings:
        """Find an expert by full name ("3-eps-cosine"), or by cluster ("3") if it has only one expert.

        Raises:
            AtollError: no such expert, or several replicas of that cluster.
        """
        matches = [e for e in self.experts if wanted in (e.full_name, str(e.cluster))]
        if len(matches) == 1:
            return matches[0]
        names = ", ".join(e.full_name for e in (matches or self.experts))
        problem = f"cluster {wanted} has {len(matches)} experts" if matches else f"no expert {wanted!r} in {MANIFEST}"
        raise AtollError(f"{problem}; expected one of {names}")


def parse_manifest(text: str, where: str) -> Manifest:
    """Parse and validate the text of an atoll.yaml; `where` begins the messages.

    Raises:
        AtollError: the first problem: the key, what was got, what is expected.
    """
    content = parse_yaml(text, where)
    if not isinstance(content, dict):
        raise AtollError(f"{where}: holds {type(content).__name__}; expected keys such as name, data, experts")
    # Validate; report the first problem.
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
    """The known keys at the place of an unknown one."""
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
    """Load the manifest of a run directory, or of a yaml file.

    Raises:
        AtollError: no such file, or an unknown key or bad value in it.
    """
    file = RunLayout(run).manifest if run.is_dir() else run
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
    """Find a built-in recipe by name ("demo"), or a recipe by its path.

    Raises:
        AtollError: neither exists.
    """
    for candidate in (RECIPES / f"{name}.yaml", Path(name)):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    raise AtollError(f"no recipe {name!r}; expected one of {known}, or a path to a yaml file")
