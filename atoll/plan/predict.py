"""The plan of a run: its experts on GPUs and on islands. Pure arithmetic, except for `--gpu here`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from atoll.errors import AtollError
from atoll.manifest import Manifest, TrainSettings, load_manifest, recipe_path
from atoll.plan.cost import (
    NetworkSizes,
    activation_bytes,
    fixed_bytes,
    forward_flops,
    parameters,
    router_flops,
    router_parameters,
    training_flops,
)
from atoll.plan.fit import LADDER, Fit, Switches, fastest, largest_batch, smallest_memory
from atoll.plan.gpus import GPU, GPUS, find_gpu
from atoll.plan.islands import IslandSettings, SimulatedIsland, Simulation, Work, load_islands, simulate
from atoll.plan.recipe import (
    Text,
    cluster_bytes,
    encoded,
    latent_shape,
    network_of,
    router_of,
    switches_of,
    text_of,
)
from atoll.plan.rules import CPU_BF16, CUDA_BF16, FP32, Rules

MEMORIES = (24e9, 48e9, 80e9)  # bytes; the columns of the batch table
SHOWN = ("4090", "a40", "a100", "h100", "h200")  # if no GPU is named
GUESSED_FLOPS = 125e12  # FLOP/s; ranks the switches for a size without a known speed
SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class PlannedExpert:
    """One training. FLOPs are per image, bytes for the recipe's precision, images = steps times batch.

    Attributes:
        recipe_switches: the switches that the recipe sets.
    """

    name: str
    network: NetworkSizes
    parameters: int
    forward_flops: int
    training_flops: int
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


@dataclass(frozen=True)
class Machine:
    """All experts on one kind of GPU: how each fits (None: it does not), images/s, days of one GPU, and USD."""

    gpu: GPU
    mfu: float
    fits: dict[str, Fit | None]
    images_per_s: dict[str, float]
    gpu_days: dict[str, float]
    router_gpu_days: float | None
    total_gpu_days: float | None
    usd: float | None


@dataclass(frozen=True)
class PlannedRouter:
    """The router's training. flops: per latent, in training."""

    parameters: int
    flops: int
    images: int


@dataclass(frozen=True)
class Plan:
    """The result of `atoll plan`.

    Attributes:
        batches: the largest batch, by expert, switches and memory in bytes.
        images: of the data set; None if unknown.
        download_bytes: of one cluster; None if the number of images is unknown.
        cut: captions of encoded data that are longer than the text encoder reads, and their fraction that is cut.
    """

    name: str
    precision: str
    experts: tuple[PlannedExpert, ...]
    router: PlannedRouter
    machines: tuple[Machine, ...]
    batches: dict[str, dict[str, dict[float, int]]]
    images: int | None
    download_bytes: float | None
    cut: tuple[int, float] | None = None
    islands: tuple[IslandSettings, ...] = ()
    simulation: Simulation | None = None


def plan(
    manifest: Manifest,
    gpus: Sequence[GPU] = (),
    mfu: float | None = None,
    images: int | None = None,
    text: Text | None = None,
    latent: tuple[int, int, int] | None = None,
    islands: Sequence[IslandSettings] = (),
    trials: int = 1000,
    seed: int = 0,
) -> Plan:
    """Plan a run. Pure arithmetic: the same arguments give the same plan.

    Args:
        gpus: to estimate time and price for; none: some usual ones.
        mfu: fraction of a GPU's speed that training reaches; None: each GPU's own.
        images: of the data set.
        text: sizes of a caption, if the encoder's config does not have them.
        latent: (C, H, W), if the codec's config does not have it.
        islands: of the simulated collective; none: no simulation.

    Raises:
        AtollError: a network fits nowhere or not on a named GPU, an expert without an island, an unknown encoder.
    """
    # Sizes of every network.
    text = text or text_of(manifest.condition)
    latent = latent or latent_shape(manifest)
    experts = tuple(_expert(manifest, index, latent, text) for index in range(len(manifest.experts)))
    router = _router(manifest, latent, text)
    rules = _rules(manifest.train.precision)
    # Refuse networks that fit nowhere.
    for expert in experts:
        least = smallest_memory(expert.network, rules)
        room = max([gpu.memory for gpu in gpus] or [gpu.memory for gpu in GPUS.values()])
        if least > room:
            where = gpus[0].name if len(gpus) == 1 else "any GPU known"
            raise AtollError(
                f"expert {expert.name}: {expert.parameters / 1e6:,.0f} M parameters need {least / 1e9:.1f} GB for a "
                f"single sample with every switch on, more than {where} has ({room / 1e9:g} GB); "
                "take a larger GPU or a smaller network"
            )
    # Time and price on each GPU.
    machines = tuple(_machine(gpu, mfu, manifest, experts, router) for gpu in gpus or [GPUS[name] for name in SHOWN])
    # Without the number of images the size of a download is unknown.
    download = cluster_bytes(manifest, latent, images) if images else None
    return Plan(
        name=manifest.name,
        precision="fp32" if manifest.train.precision == "fp32" else "bf16",
        experts=experts,
        router=router,
        machines=machines,
        batches=_batches(experts, rules, [gpu.memory for gpu in gpus]),
        images=images,
        download_bytes=download,
        islands=tuple(islands),
        simulation=_simulation(manifest, experts, islands, mfu, download or 0.0, trials, seed) if islands else None,
    )


def plan_run(
    recipe: str | Path,
    gpu: str | None = None,
    islands: Path | None = None,
    mfu: float | None = None,
    images: int | None = None,
    text: Text | None = None,
    trials: int = 1000,
    seed: int = 0,
) -> Plan:
    """Plan a recipe by name, a yaml file or a run's directory: the whole of `atoll plan`.

    Args:
        gpu: a GPU's name, a size such as "24GB", or "here": this machine, measured for some seconds.
        images: of the data set; None: the number that the run has encoded. Then its latent shape is used too.

    Raises:
        AtollError: an unknown recipe or GPU, a fraction out of range, and what `plan` raises.
    """
    # Arguments are checked before the manifest is read.
    if mfu is not None and not 0 < mfu <= 1:
        raise AtollError(f"--mfu {mfu:g}: expected a fraction of the GPU's speed, above 0 and at most 1")
    if images is not None and images < 1:
        raise AtollError(f"--images {images}: expected at least 1")
    # Load the manifest; a run that is encoded knows its images and their shape.
    directory = Path(recipe)
    is_run = directory.is_dir()
    manifest = load_manifest(directory if is_run else recipe_path(str(recipe)))
    done = encoded(directory) if is_run else None
    latent = done.latent if done else latent_shape(manifest)
    images = images or (done.rows if done else None)
    # The GPU to plan for, if one is named.
    named = [_here(manifest, text, latent)] if gpu == "here" else [find_gpu(gpu)] if gpu else []
    planned = plan(manifest, named, mfu, images, text, latent, load_islands(islands) if islands else (), trials, seed)
    return replace(planned, cut=done.cut if done else None)


def _here(manifest: Manifest, text: Text | None, latent: tuple[int, int, int]) -> GPU:
    """This machine as a GPU: its ceiling, and the fraction that steps of the run's first expert reach."""
    from atoll.plan.measure_machine import memory_here, on_cpu, speed_here

    # One expert is measured for all of them.
    text, train = text or text_of(manifest.condition), manifest.train_of(manifest.experts[0])
    network = network_of(manifest, manifest.experts[0], latent, text)
    speed = speed_here(network, train.batch, train.threads, train.precision)
    # One ceiling for both precisions: it was measured in the recipe's.
    ceiling = speed.flops / 1e12
    return GPU("here", memory_here(), ceiling, ceiling, mfu=speed.mfu, compiles=False, cpu=on_cpu())


def _rules(precision: str, cpu: bool = False) -> Rules:
    # A device saves other tensors in each precision.
    if precision == "fp32":
        return FP32
    return CPU_BF16 if cpu else CUDA_BF16


def _expert(manifest: Manifest, index: int, latent: tuple[int, int, int], text: Text) -> PlannedExpert:
    part = manifest.experts[index]
    train: TrainSettings = manifest.train_of(part)
    network, rules = network_of(manifest, part, latent, text), _rules(train.precision)
    # The recipe's own switches, to compare with the planner's choice.
    switches, accumulate = switches_of(train)
    return PlannedExpert(
        name=part.full_name,
        network=network,
        parameters=parameters(network),
        forward_flops=forward_flops(network),
        training_flops=training_flops(network),
        fixed_bytes=fixed_bytes(network, rules),
        activation_bytes=activation_bytes(network, rules),
        activation_bytes_compiled=activation_bytes(network, rules, compiled=True),
        activation_bytes_checkpointed=activation_bytes(network, rules, "full"),
        steps=train.steps,
        batch=train.batch,
        images=train.steps * train.batch,
        checkpoint_every=train.checkpoint_every,
        recipe_switches=switches,
        accumulate=accumulate,
    )


def _router(manifest: Manifest, latent: tuple[int, int, int], text: Text) -> PlannedRouter:
    network, train = router_of(manifest, latent, text), manifest.train_of(manifest.router)
    # A training step costs three forward passes.
    return PlannedRouter(router_parameters(network), 3 * router_flops(network), train.steps * train.batch)


def _flops(gpu: GPU, mfu: float | None, precision: str) -> float | None:
    """FLOP/s of training on a GPU; None if its speed is unknown."""
    # Consumer GPUs multiply float32 at another speed than bf16.
    peak = gpu.fp32_tflops if precision == "fp32" else gpu.tflops
    return peak * 1e12 * (mfu or gpu.mfu) if peak else None


def _machine(
    gpu: GPU, mfu: float | None, manifest: Manifest, experts: Sequence[PlannedExpert], router: PlannedRouter
) -> Machine:
    """Time and price of all experts on one kind of GPU."""
    # How each expert fits, and how fast it trains.
    precision = manifest.train.precision
    flops = _flops(gpu, mfu, precision)
    rules = _rules(precision, gpu.cpu)
    fits = {
        e.name: fastest(e.network, rules, e.batch, gpu.memory, flops or GUESSED_FLOPS, gpu.compiles) for e in experts
    }
    # Experts that do not fit have no speed, and no days.
    speed = {e.name: e.batch / fit.step_seconds for e in experts if flops and (fit := fits[e.name])}
    days = {e.name: e.images / speed[e.name] / SECONDS_PER_DAY for e in experts if e.name in speed}
    # Days of one GPU, for the router and in all.
    routing = router.images * router.flops / flops / SECONDS_PER_DAY if flops else None
    total = sum(days.values()) if len(days) == len(experts) else None
    return Machine(
        gpu=gpu,
        mfu=mfu or gpu.mfu,
        fits=fits,
        images_per_s=speed,
        gpu_days=days,
        router_gpu_days=routing,
        total_gpu_days=total,
        usd=total * 24 * gpu.usd_hour if total is not None and gpu.usd_hour is not None else None,
    )


def _batches(
    experts: Sequence[PlannedExpert], rules: Rules, more: Sequence[float]
) -> dict[str, dict[str, dict[float, int]]]:
    """The largest batch of every distinct network, for every row of the ladder and every memory."""
    # Replicas and experts of one size share a row.
    distinct: dict[NetworkSizes, str] = {}
    for expert in experts:
        distinct.setdefault(expert.network, expert.name)
    # The named GPUs join the usual columns.
    memories = sorted({*MEMORIES, *more})
    return {
        name: {str(s): {memory: largest_batch(network, rules, s, memory) for memory in memories} for s in LADDER}
        for network, name in distinct.items()
    }


def _simulation(
    manifest: Manifest,
    experts: Sequence[PlannedExpert],
    islands: Sequence[IslandSettings],
    mfu: float | None,
    download: float,
    trials: int,
    seed: int,
) -> Simulation:
    """Simulate the collective: which islands may train which experts, and how fast."""
    # A checkpoint at least once per expert.
    works = [Work(e.name, e.images, min(e.images, e.checkpoint_every * e.batch), download) for e in experts]
    # Which experts may each island train, and how fast?
    clusters = {part.full_name: str(part.cluster) for part in manifest.experts}
    known = {*clusters, *clusters.values()}
    ready = []
    for settings in islands:
        if unknown := [name for name in settings.experts if settings.experts != "any" and name not in known]:
            raise AtollError(
                f"island {settings.name}: no expert {unknown[0]!r}; expected some of {', '.join(clusters)}"
            )
        allowed = [e for e in experts if settings.experts == "any" or {e.name, clusters[e.name]} & {*settings.experts}]
        rates = {e.name: rate for e in allowed if (rate := _island_rate(settings, e, manifest, mfu))}
        ready.append(SimulatedIsland(settings, rates))
    return simulate(works, ready, trials, seed)


def _island_rate(
    settings: IslandSettings, expert: PlannedExpert, manifest: Manifest, mfu: float | None
) -> float | None:
    """Images/s of an expert on an island, whose GPUs share each batch; None if it does not fit."""
    if settings.gpu is not None:
        gpu = find_gpu(settings.gpu)
    else:
        gpu = GPU(settings.name, (settings.memory_gb or 0) * 1e9, settings.tflops, settings.tflops)
    # The GPUs of an island share each batch.
    precision = manifest.train.precision
    flops = _flops(gpu, settings.mfu or mfu, precision)
    if flops is None:
        raise AtollError(
            f"island {settings.name}: {settings.gpu} has no known speed; name a GPU, or give tflops and memory_gb"
        )
    per_gpu = -(-expert.batch // settings.gpus)
    fit = fastest(expert.network, _rules(precision, gpu.cpu), per_gpu, gpu.memory, flops, gpu.compiles)
    return expert.batch / fit.step_seconds if fit else None
