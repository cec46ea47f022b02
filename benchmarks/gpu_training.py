"""The matmul ceiling, and training steps of Atoll's networks and diffusers': parts of benchmarks/gpu.py.

A step is atoll.train's own: `gradients` (bf16 autocast, forward, backward, clipping) and `State.update` (fused AdamW,
EMA), on fp32 weights, for either network. Its batch is on the device already: data loading is not measured here.
"""

import math
import statistics
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from gpu_measure import Call, Evaluator, interleaved, release
from networks import CHANNELS, SIZE, TEXT_TOKENS, TEXT_WIDTH, Diffusers, atoll_network
from networks import config_of as network_config
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.manifest import TrainSettings
from atoll.nn import SIZES, DiT, DiTConfig, MMDiT
from atoll.objective import Objective
from atoll.plan.cost import NetworkSizes, activation_bytes, fixed_bytes, sizes_of, training_flops
from atoll.plan.fit import Switches, needed_bytes
from atoll.plan.rules import CUDA_BF16
from atoll.randomness import seeded
from atoll.schedule import Linear
from atoll.train.batches import drop_condition
from atoll.train.island import Island
from atoll.train.loop import Task, autocast_of, gradients, prepared
from atoll.train.prefetch import Batch
from atoll.train.state import State

LATENT = (CHANNELS, SIZE, SIZE)
MOST = 128  # samples of a step
BYTES_OF_OTHERS = 1.25  # what diffusers' network saves for its backward pass, relative to Atoll's, with a margin
STEPS = 3  # in a row; a round takes their mean
# Size, network, and the seconds that its comparison may take.
PAIRS = [("B/2", "dit", 60), ("XL/2", "dit", 120), ("B/2", "mmdit", 60), ("B/2", "dual", 60)]


def config_of(size: str) -> DiTConfig:
    """A DiT of this size for the latents and the text of this benchmark."""
    config = network_config("dit", size)
    assert isinstance(config, DiTConfig)
    return config


def cost_of(size: str, network: str = "dit") -> NetworkSizes:
    """The sizes that `atoll plan` needs."""
    return sizes_of(network_config(network, size).model_dump(), TEXT_TOKENS)


class RandomBatch(Task):
    """A flow expert's training on random latents and text of `size` rows; a tenth of the captions is dropped."""

    def __init__(self, module: nn.Module, size: int):
        self.module, self.size, self.objective = module, size, Objective("flow", Linear())

    def batch(self, index: int, local_rows: slice) -> Batch:
        g, B = seeded(0, index), self.size
        lengths = torch.randint(5, TEXT_TOKENS + 1, (B, 1), generator=g)
        drawn = {
            "x0": torch.randn(B, *LATENT, generator=g).half(),
            "eps": torch.randn(B, *LATENT, generator=g),
            "t": torch.rand(B, generator=g),
            "states": torch.randn(B, TEXT_TOKENS, TEXT_WIDTH, generator=g),
            "mask": torch.arange(TEXT_TOKENS) < lengths,
            "dropped": torch.rand(B, generator=g) < 0.1,
        }
        return {name: tensor[local_rows] for name, tensor in drawn.items()}

    def losses(self, module: Callable[..., Tensor], batch: Batch) -> Tensor:
        x0, eps, t = batch["x0"].float(), batch["eps"], batch["t"]
        # The pooled vector, which only dual-stream networks read, is the first token's.
        text = Condition(batch["states"], batch["mask"], batch["states"][:, 0])
        null = Condition(torch.zeros_like(text.states[:1]), torch.ones_like(text.mask[:1]), text.pooled[:1] * 0)
        condition = drop_condition(text, null, batch["dropped"])
        output = module(self.objective.schedule.diffuse(x0, eps, t), t * self.objective.time_scale, condition)
        return self.objective.loss(output, x0, eps, t)


def switched(network: nn.Module, settings: TrainSettings) -> nn.Module:
    """The network, with its blocks compiled if set, and Atoll's checkpointed as in the loop."""
    if isinstance(network, DiT | MMDiT):
        return prepared(network, settings)
    for block in network.blocks if settings.compile else ():  # type: ignore[union-attr]
        block.compile()
    return network


class Training:
    """One network's training; `step(compiled)` is a step of the loop.

    The eager and the compiled module share their weights and the state.
    """

    def __init__(self, network: nn.Module, batch: int, device: torch.device, checkpointing: str = "none"):
        settings = {"batch": batch, "lr": 1e-5, "warmup": 0, "precision": "bf16", "checkpointing": checkpointing}
        self.settings = TrainSettings.model_validate(settings)
        self.eager = switched(network.to(device).train(), self.settings)
        shared: dict[int, Any] = {id(t): t for t in (*network.parameters(), *network.buffers())}
        self.compiled = switched(deepcopy(network, shared), self.settings.model_copy(update={"compile": True}))
        self.state = State(network, self.settings)
        self.task = RandomBatch(network, batch)
        self.held = {name: tensor.to(device) for name, tensor in self.task.batch(0, slice(batch)).items()}
        self.island, self.autocast = Island(0, 1, device), autocast_of("bf16", device)
        self.loss = 0.0

    def step(self, compiled: bool) -> None:
        module = self.compiled if compiled else self.eager
        self.loss, _ = gradients(
            self.task, module, self.held, state=self.state, island=self.island, autocast=self.autocast
        )
        self.state.update()


def randomized(network: nn.Module, std: float = 0.02) -> nn.Module:
    """The network with no parameter exactly zero, as in a trained one."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std)
    return network


def build(kind: str, size: str, device: torch.device, network: str = "dit") -> nn.Module:
    """The network of a kind, "atoll" or "diffusers"; network: "dit", "mmdit" or "dual", see networks.py."""
    with device:
        return randomized(atoll_network(network, size) if kind == "atoll" else Diffusers(network, size))


def product(rows: int, inner: int, columns: int, device: torch.device) -> tuple[Call, float]:
    """A product of random bf16 matrices, and its FLOPs."""
    a = torch.randn(rows, inner, device=device).bfloat16()
    b = torch.randn(inner, columns, device=device).bfloat16()
    return lambda: torch.mm(a, b), 2.0 * rows * inner * columns


def ceiling(bench: Evaluator) -> None:
    """Part "ceiling": TFLOP/s of bf16 products, square ones and those of the networks' blocks."""
    sides = (256, 512) if bench.tiny else (4096, 8192, 16384)
    shapes = {f"{side}^3": (side, side, side) for side in sides}
    for size in ("tiny",) if bench.tiny else ("B/2", "XL/2"):
        D, rows = SIZES[size]["width"], (4 if bench.tiny else 64) * cost_of(size).image_tokens
        for name, (inner, columns) in {"qkv": (D, 3 * D), "out": (D, D), "up": (D, 4 * D), "down": (4 * D, D)}.items():
            shapes[f"{size} {name} {rows}x{inner}x{columns}"] = (rows, inner, columns)
    products = {name: product(*shape, bench.device) for name, shape in shapes.items()}
    calls = {name: call for name, (call, _) in products.items()}
    seconds, _ = interleaved(calls, bench.device, bench.rounds, repeats=2 if bench.tiny else 10)
    tflops = {name: products[name][1] / statistics.median(own) / 1e12 for name, own in seconds.items()}
    bench.keep("ceiling", {"tflops": max(tflops[f"{side}^3"] for side in sides), "products": tflops})


def common_batch(bench: Evaluator, size: str, network: str = "dit") -> int:
    """Samples per step that leave memory for both networks' states; a multiple of 8 on a GPU, at most MOST."""
    if bench.tiny:
        return 3
    cost, memory = cost_of(size, network), torch.cuda.get_device_properties(bench.device).total_memory
    # diffusers' PRX and SD3 have a modulation per block: up to half more weights, beside more activations.
    fixed = (2 if network == "dit" else 2.5) * fixed_bytes(cost, CUDA_BF16)
    free = 0.93 * memory - fixed
    each = (BYTES_OF_OTHERS if network == "dit" else 2) * activation_bytes(cost, CUDA_BF16)
    return max(8, min(MOST, int(free / each) // 8 * 8))


def compared(bench: Evaluator, size: str, batch: int, kinds: tuple[str, ...], network: str = "dit") -> dict[str, Any]:
    """Training steps of the kinds, eager and compiled, and the ceiling's products, interleaved."""
    torch.compiler.reset()  # else a second batch or width is compiled for any size, which is another program
    trainings = {kind: Training(build(kind, size, bench.device, network), batch, bench.device) for kind in kinds}
    calls: dict[str, Call] = {}
    for kind, training in trainings.items():
        calls[kind] = lambda training=training: training.step(False)
        if bench.compile:
            calls[f"{kind}-compiled"] = lambda training=training: training.step(True)
    side, count = (256, 1) if bench.tiny else (8192, 20)
    multiply, ceiling_flops = product(side, side, side, bench.device)
    calls["ceiling"] = lambda: [multiply() for _ in range(count)]
    seconds, first = interleaved(calls, bench.device, bench.rounds, repeats=1 if bench.tiny else STEPS)
    flops, known = training_flops(cost_of(size, network)) * batch, bench.known_gpu()
    top = count * ceiling_flops / statistics.median(seconds.pop("ceiling"))
    rows = {}
    for name, own in seconds.items():
        median = statistics.median(own)
        rows[name] = {
            "images_per_second": batch / median,
            "step_seconds": median,
            "first_step_seconds": first[name],
            "tflops": flops / median / 1e12,
            "of_ceiling": flops / median / top,
            "mfu": flops / median / 1e12 / known.tflops if known and known.tflops else None,
            **{f"over_{base}": _ratio(seconds[base], own) for base in seconds if base.startswith("diffusers")},
        }
    losses = {kind: training.loss for kind, training in trainings.items()}
    if not all(map(math.isfinite, losses.values())):
        raise RuntimeError(f"the loss after the last step is not finite: {losses}")
    return {"batch": batch, "ceiling_tflops": top / 1e12, "variants": rows, "losses": losses}


def _ratio(base: list[float], own: list[float]) -> float:
    """The speed-up, as the median over the rounds."""
    return statistics.median(b / o for b, o in zip(base, own, strict=True))


def training(bench: Evaluator) -> None:
    """Part "training": images/s, fraction of the ceiling and MFU, against diffusers in the same rounds.

    The networks are DiTs of two sizes, then an MMDiT without and with dual blocks. If both together leave no memory for
    a batch of MOST, also Atoll's DiT alone with it.
    """
    kinds: tuple[str, ...] = ("atoll", "diffusers")
    try:
        import diffusers

        bench.keep("training", {"diffusers": diffusers.__version__})
    except ImportError as error:
        kinds = ("atoll",)
        bench.leave_out("training", f"diffusers' network: {error}")
    tiny = [("tiny", "dit", 0), ("tiny", "mmdit", 0), ("tiny", "dual", 0)]
    for size, network, needed in tiny if bench.tiny else PAIRS:
        name = size if network == "dit" else f"{network} {size}"
        if not bench.has_time(needed, "training", name):
            continue
        cost = cost_of(size, network)
        about = {"flops_per_image": training_flops(cost), "image_tokens": cost.image_tokens}
        batch = common_batch(bench, size, network)
        while True:
            release(bench.device)
            try:
                bench.keep("training", {name: {**about, **compared(bench, size, batch, kinds, network)}})
                break
            except torch.OutOfMemoryError:
                batch = batch * 3 // 32 * 8  # three quarters, a multiple of 8
                if batch < 8:
                    raise
        release(bench.device)
        alone_fits = bench.on_gpu and batch < MOST and network == "dit"
        if alone_fits and bench.has_time(40, "training", f"{size} alone"):
            alone(bench, size)


def alone(bench: Evaluator, size: str) -> None:
    """Atoll without diffusers, batch MOST, if it fits according to `atoll plan`."""
    memory = torch.cuda.get_device_properties(bench.device).total_memory
    if needed_bytes(cost_of(size), CUDA_BF16, Switches(compile=False), MOST) < memory:
        try:
            bench.keep("training", {f"{size} alone": compared(bench, size, MOST, ("atoll",))})
        except torch.OutOfMemoryError:
            bench.leave_out("training", f"{size} alone: a batch of {MOST} does not fit, though the plan says so")
        release(bench.device)
