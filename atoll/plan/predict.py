"""The plan of a run: its experts on GPUs and on islands. Pure arithmetic, except for `--gpu here`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.manifest import Manifest, load_manifest, recipe_path
from atoll.manifest.stored import check_stored
from atoll.plan.cost import NetworkSizes
from atoll.plan.fit import EAGER, Fit, fastest, ladder, largest_batch, smallest_memory
from atoll.plan.gpus import GPU, GPUS, find_gpu
from atoll.plan.islands import IslandSettings, SimulatedIsland, Simulation, Work, load_islands, simulate
from atoll.plan.recipe import SizedLatent, Text, cluster_bytes, encoded, latent_sizes, network_of, text_of
from atoll.plan.rules import Rules
from atoll.plan.sampling_cost import sampling_cost
from atoll.plan.sizes import seconds_by_size
from atoll.plan.trainings import planned_common, planned_expert, planned_generalist, planned_router, rules_of
from atoll.plan.types import Machine, Plan, PlannedCommon, PlannedExpert, PlannedRouter
from atoll.storage.layout import COMMON, GENERALIST

MEMORIES = (24e9, 48e9, 80e9)  # bytes; the columns of the batch table
SHOWN = ("4090", "a40", "a100", "h100", "h200")  # if no GPU is named
GUESSED_FLOPS = 125e12  # FLOP/s; ranks the switches for a size without a known speed
SECONDS_PER_DAY = 86400


def plan(
    manifest: Manifest,
    gpus: Sequence[GPU] = (),
    mfu: float | None = None,
    images: int | None = None,
    text: Text | None = None,
    latent: tuple[int, int, int] | Sequence[SizedLatent] | None = None,
    islands: Sequence[IslandSettings] = (),
    trials: int = 1000,
    seed: int = 0,
    each: int = 1,
) -> Plan:
    """Plan a run. Pure arithmetic: the same arguments give the same plan.

    Args:
        gpus: to estimate time and price for; none: some usual ones.
        mfu: fraction of a GPU's speed that training reaches; None: each GPU's own.
        images: of the data set.
        text: sizes of a caption, if the encoder's config does not have them.
        latent: (C, H, W), if the codec's config does not have it; or all sizes.
        islands: of the simulated collective; none: no simulation.
        each: GPUs that share the batches of one expert.

    Raises:
        AtollError: a network fits nowhere or not on a named GPU, an expert without an island, an unknown encoder; a
            batch that its GPUs cannot share; targets that are not stored.
    """
    check_stored(manifest)
    # Sizes of every network.
    text = text or text_of(manifest.condition)
    sizes = _sizes(manifest, latent)
    experts = tuple(planned_expert(manifest, part, part.full_name, sizes, text) for part in manifest.experts)
    general = planned_expert(manifest, manifest.generalist, GENERALIST, sizes, text) if manifest.generalist else None
    others = (*experts, *([general] if general else []))
    common = planned_common(manifest, others, sizes, text)
    trained = (*others, *([common.training] if common else []))
    generalist = planned_generalist(manifest, general, [one for one in trained if one is not general])
    router = planned_router(manifest, sizes, text)
    rules = rules_of(manifest.train.precision)
    # Refuse what training refuses, and networks that fit nowhere.
    for expert in trained:
        _check_shared(expert, each)
        least = _least(expert, rules, each)
        room = max([gpu.memory for gpu in gpus] or [gpu.memory for gpu in GPUS.values()])
        if least > room:
            where = gpus[0].name if len(gpus) == 1 else "any GPU known"
            raise AtollError(
                f"expert {expert.name}: {expert.parameters / 1e6:,.0f} M parameters need {least / 1e9:.1f} GB for a "
                f"single sample with every switch on, more than {where} has ({room / 1e9:g} GB); "
                "take a larger GPU or a smaller network"
            )
    # Time and price on each GPU.
    machines = tuple(
        _machine(gpu, each, mfu, manifest, trained, router) for gpu in gpus or [GPUS[name] for name in SHOWN]
    )
    # Without the number of images the size of a download is unknown.
    download = cluster_bytes(manifest, sizes, images) if images else None
    return Plan(
        name=manifest.name,
        precision="fp32" if manifest.train.precision == "fp32" else "bf16",
        experts=experts,
        router=router,
        sampling=sampling_cost(manifest, experts, router, general),
        machines=machines,
        batches=_batches(trained, rules, [gpu.memory for gpu in gpus], each),
        images=images,
        download_bytes=download,
        common=common,
        generalist=generalist,
        islands=tuple(islands),
        simulation=_simulation(manifest, experts, common, islands, mfu, download or 0.0, trials, seed)
        if islands
        else None,
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
    each: int = 1,
) -> Plan:
    """Plan a recipe by name, a yaml file or a run's directory: the whole of `atoll plan`.

    Args:
        gpu: a GPU's name, a size such as "24GB", or "here": this machine, measured for some seconds.
        images: of the data set; None: the number that the run has encoded. Then its sizes are used too.
        each: GPUs that share the batches of one expert.

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
    counts = done.sizes if done else {}
    # Of an encoded run with one size, the shape may be that of a codec which no formula knows.
    sizes = _sizes(manifest, done.latent) if done and not counts else latent_sizes(manifest, counts)
    images = images or (done.rows if done else None)
    # The GPU to plan for, if one is named.
    named = [_here(manifest, text, sizes[0].shape)] if gpu == "here" else [find_gpu(gpu)] if gpu else []
    simulated = load_islands(islands) if islands else ()
    planned = plan(manifest, named, mfu, images, text, sizes, simulated, trials, seed, each)
    return replace(planned, cut=done.cut if done else None, counted=bool(counts))


def _sizes(manifest: Manifest, latent: tuple[int, int, int] | Sequence[SizedLatent] | None) -> tuple[SizedLatent, ...]:
    """The sizes of the images: those that are known, or those of the manifest."""
    if latent is None:
        return latent_sizes(manifest)
    first = latent[0]
    if isinstance(first, SizedLatent):
        return tuple(latent)  # type: ignore[arg-type]
    side = manifest.data.size
    return (SizedLatent(ImageSize(side, side), tuple(latent), 1.0),)  # type: ignore[arg-type]


def _shards(expert: PlannedExpert, gpus: int) -> int:
    """GPUs that divide the expert's weights among themselves."""
    return gpus if expert.sharding == "shard" else 1


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


def _flops(gpu: GPU, mfu: float | None, precision: str) -> float | None:
    """FLOP/s of training on a GPU; None if its speed is unknown."""
    # Consumer GPUs multiply float32 at another speed than bf16.
    peak = gpu.fp32_tflops if precision == "fp32" else gpu.tflops
    return peak * 1e12 * (mfu or gpu.mfu) if peak else None


def _machine(
    gpu: GPU,
    each: int,
    mfu: float | None,
    manifest: Manifest,
    trained: Sequence[PlannedExpert],
    router: PlannedRouter,
) -> Machine:
    """Time and price of all experts on one kind of GPU, of which `each` expert has several.

    Args:
        trained: the experts, and the models of all clusters.
        gpu, each, mfu, manifest, router: of the plan.
    """
    # How each expert fits, and how fast it trains at each size.
    flops, rules = _flops(gpu, mfu, manifest.train.precision), rules_of(manifest.train.precision, gpu.cpu)
    fits = {e.name: _fit(e, rules, gpu, each, flops or GUESSED_FLOPS) for e in trained}
    seconds = {e.name: _seconds(e, fit, gpu, flops) for e in trained if flops and (fit := fits[e.name])}
    # Experts that do not fit have no speed, and no days.
    speed = {e.name: _rate(e, seconds[e.name]) for e in trained if e.name in seconds}
    days = {e.name: each * e.images / speed[e.name] / SECONDS_PER_DAY for e in trained if e.name in speed}
    # Days of one GPU, for the router and in all.
    routing = router.images * router.flops / flops / SECONDS_PER_DAY if flops else None
    total = sum(days.values()) if len(days) == len(trained) else None
    common_days, generalist_days = days.pop(COMMON, None), days.pop(GENERALIST, None)
    return Machine(
        gpu=gpu,
        each=each,
        mfu=mfu or gpu.mfu,
        fits=fits,
        step_seconds=seconds,
        images_per_s=speed,
        gpu_days=days,
        router_gpu_days=routing,
        common_gpu_days=common_days,
        generalist_gpu_days=generalist_days,
        total_gpu_days=total,
        usd=total * 24 * gpu.usd_hour if total is not None and gpu.usd_hour is not None else None,
    )


def _least(expert: PlannedExpert, rules: Rules, each: int) -> float:
    """Bytes of each GPU below which the expert does not fit."""
    fused, swapped = expert.recipe_switches.fused_backward, expert.recipe_switches.block_swap
    shards = _shards(expert, each)
    return smallest_memory(expert.network, rules, shards, fused_backward=fused, block_swap=swapped)


def _check_shared(expert: PlannedExpert, each: int) -> None:
    """Raise AtollError if `each` GPUs cannot share the expert's batches, as training does."""
    one_process = {
        "fused_backward": expert.recipe_switches.fused_backward,
        "block_swap": expert.recipe_switches.block_swap,
    }
    if each > 1 and (wrong := [key for key, value in one_process.items() if value]):
        raise AtollError(
            f"expert {expert.name}: train.{wrong[0]} is for one GPU, not {each} that share a batch; leave it out"
        )
    if expert.batch % each:
        raise AtollError(
            f"expert {expert.name}: a batch of {expert.batch} cannot be divided among {each} GPUs; choose a multiple "
            f"of {each}, or another number of GPUs"
        )


def _fit(expert: PlannedExpert, rules: Rules, gpu: GPU, each: int, flops: float) -> Fit | None:
    """How the expert's batch fits `each` GPUs, which share it."""
    return fastest(
        expert.network,
        rules,
        expert.batch // each,
        gpu.memory,
        flops,
        gpu.compiles,
        _shards(expert, each),
        fused_backward=expert.recipe_switches.fused_backward,
        block_swap=expert.recipe_switches.block_swap,
    )


def _seconds(expert: PlannedExpert, fit: Fit, gpu: GPU, flops: float) -> tuple[float, ...]:
    """Seconds of a step at each size of the images."""
    part = fit.accumulate * fit.micro_batch
    seconds = seconds_by_size(expert.sizes, part, fit, flops, EAGER if gpu.compiles else 1.0)
    more = expert.muon.flops / flops if expert.muon else 0.0
    return tuple(one + more for one in seconds)


def _rate(expert: PlannedExpert, seconds: Sequence[float]) -> float:
    """Images/s of all GPUs of an expert, over its sizes. seconds: of a step at each of them."""
    shares = [size.share for size in expert.sizes]
    return expert.batch / sum(share * second for share, second in zip(shares, seconds, strict=True))


def _batches(
    experts: Sequence[PlannedExpert], rules: Rules, more: Sequence[float], each: int
) -> dict[str, dict[str, dict[float, int]]]:
    """The largest batch of every distinct network, for every row of the ladder and every memory."""
    # Replicas and experts of one size share a row.
    distinct: dict[NetworkSizes, PlannedExpert] = {}
    for expert in experts:
        distinct.setdefault(expert.network, expert)
    # The named GPUs join the usual columns.
    memories = sorted({*MEMORIES, *more})
    return {
        expert.name: {
            str(s): {m: largest_batch(network, rules, s, m, _shards(expert, each)) for m in memories}
            for s in ladder(network, each)
        }
        for network, expert in distinct.items()
    }


def _simulation(
    manifest: Manifest,
    experts: Sequence[PlannedExpert],
    common: PlannedCommon | None,
    islands: Sequence[IslandSettings],
    mfu: float | None,
    download: float,
    trials: int,
    seed: int,
) -> Simulation:
    """Simulate the collective: which islands may train which experts, and how fast."""
    # What is downloaded: the shards, and the common model by the experts that start from it.
    starts = dict.fromkeys(common.experts, common.bytes) if common else {}
    # A checkpoint at least once per expert.
    works = [
        Work(e.name, e.images, min(e.images, e.checkpoint_every * e.batch), download + starts.get(e.name, 0))
        for e in experts
    ]
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
    _check_shared(expert, settings.gpus)
    fit = _fit(expert, rules_of(precision, gpu.cpu), gpu, settings.gpus, flops)
    return _rate(expert, _seconds(expert, fit, gpu, flops)) if fit else None
