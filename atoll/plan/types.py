"""A plan as values: its experts, its router, and what they cost on each kind of GPU."""

from dataclasses import dataclass

from atoll.plan.cost import NetworkSizes
from atoll.plan.fit import Fit, Switches
from atoll.plan.gpus import GPU
from atoll.plan.islands import IslandSettings, Simulation
from atoll.plan.muon_cost import MuonCost
from atoll.plan.sizes import PlannedSize
from atoll.plan.targets_cost import TargetsCost


@dataclass(frozen=True)
class PlannedExpert:
    """One training. FLOPs are per image, bytes for the recipe's precision, images = steps times batch.

    With several sizes, FLOPs are the mean by their shares, and bytes are those of the largest one.

    Attributes:
        network: at the largest size.
        sizes: of the images, the main one first.
        recipe_switches: the switches that the recipe sets.
        sharding: of several GPUs, as in `train`.
        swap_bytes: over PCIe in a step of the recipe, by train.block_swap.
        muon: what it costs; None with AdamW.
        targets: what they cost; None without.
    """

    name: str
    network: NetworkSizes
    sizes: tuple[PlannedSize, ...]
    parameters: int
    forward_flops: float
    training_flops: float
    fixed_bytes: float
    activation_bytes: int
    activation_bytes_compiled: int
    activation_bytes_checkpointed: int
    steps: int
    batch: int
    images: int
    checkpoint_every: int
    recipe_switches: Switches
    accumulate: int
    sharding: str
    swap_bytes: int
    muon: MuonCost | None
    targets: TargetsCost | None = None


@dataclass(frozen=True)
class Machine:
    """All experts on one kind of GPU: how each fits (None: it does not), images/s, days of one GPU, and USD.

    Models of all clusters, if there are any, are under their names in `fits`, `step_seconds` and `images_per_s`.

    Attributes:
        each: GPUs that share the batches of one expert.
        step_seconds: of each expert at each of its sizes; empty if the speed is unknown.
        images_per_s: of all GPUs of an expert.
        gpu_days: of each expert.
        common_gpu_days: of the common model; None if there is none, or it is unknown.
        generalist_gpu_days: of the generalist, in the same way.
        total_gpu_days: of all experts, and of both models of all clusters once; None if one of them is unknown.
    """

    gpu: GPU
    each: int
    mfu: float
    fits: dict[str, Fit | None]
    step_seconds: dict[str, tuple[float, ...]]
    images_per_s: dict[str, float]
    gpu_days: dict[str, float]
    router_gpu_days: float | None
    common_gpu_days: float | None
    generalist_gpu_days: float | None
    total_gpu_days: float | None
    usd: float | None


@dataclass(frozen=True)
class PlannedRouter:
    """The router's training. flops: per latent, in training."""

    parameters: int
    flops: float
    images: int


@dataclass(frozen=True)
class PlannedCommon:
    """The common model's training, of which each run has one.

    Attributes:
        training: as that of an expert.
        experts: names of those that start from it.
        fraction: its part of the FLOPs of this model, the generalist and all experts.
    """

    training: PlannedExpert
    experts: tuple[str, ...]
    fraction: float

    @property
    def bytes(self) -> int:
        """Of its artifact, which an island downloads: float32 weights."""
        return 4 * self.training.parameters


@dataclass(frozen=True)
class PlannedGeneralist:
    """The generalist's training, of which each run has one.

    Attributes:
        training: as that of an expert.
        levels: (low, high) of its objective; None for all.
        fraction: its part of the FLOPs of this model, the common model and all experts.
    """

    training: PlannedExpert
    levels: tuple[float, float] | None
    fraction: float


@dataclass(frozen=True)
class PlannedSampling:
    """FLOPs of sampling one image of the main size.

    Attributes:
        steps: of the solver.
        calls: of each expert at each step: 2 with guidance. The router is evaluated once.
        flops: by routing: top-1, the recipe's own and full.
    """

    steps: int
    calls: int
    flops: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """The result of `atoll plan`.

    Attributes:
        batches: the largest batch, by expert, switches and memory in bytes.
        images: of the data set; None if unknown.
        download_bytes: of one cluster; None if the number of images is unknown.
        cut: captions of encoded data that are longer than the text encoder reads, and their fraction that is cut.
        common: the common model; None if the run has none.
        generalist: the generalist; None if the run has none.
        counted: whether the shares of the sizes are those of encoded images.
    """

    name: str
    precision: str
    experts: tuple[PlannedExpert, ...]
    router: PlannedRouter
    sampling: PlannedSampling
    machines: tuple[Machine, ...]
    batches: dict[str, dict[str, dict[float, int]]]
    images: int | None
    download_bytes: float | None
    cut: tuple[int, float] | None = None
    counted: bool = False
    common: PlannedCommon | None = None
    generalist: PlannedGeneralist | None = None
    islands: tuple[IslandSettings, ...] = ()
    simulation: Simulation | None = None
