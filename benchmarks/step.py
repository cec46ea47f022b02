"""Images per second of a network's forward pass and training step, against diffusers' network of the same shape.

    python benchmarks/step.py --rounds 7 --threads 2 --json step.json    # DiT and PixArt, eager, in fp32 and bf16
    python benchmarks/step.py --compile --precisions bf16                # compiled too; takes minutes more on a CPU
    python benchmarks/step.py --networks mmdit,dual --precisions bf16    # MMDiT and PRX; with dual blocks, and SD3

Every variant is timed once per round, in turn, so that a busy machine slows all of them equally: read the ratios.
forward: no gradients, weights in the given precision. train: float32 weights (bf16: under autocast), mean
squared error, backward, fused AdamW. The ceiling is one matrix product in the shape of the MLP's first layer,
timed in the same rounds; the fraction of it counts the operations of Atoll's network for either one.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks import CHANNELS, NETWORKS, SIZE, TEXT_TOKENS, TEXT_WIDTH, Diffusers, atoll_network, config_of
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.nn.dit import SIZES, DiTBlock
from atoll.plan.cost import forward_flops, sizes_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Result:
    """One row of the table; `ratio` is the median over the rounds of diffusers' (eager) seconds over this row's."""

    network: str
    mode: str
    precision: str
    variant: str
    images_per_second: float
    ratio: float | None
    ceiling_share: float


def plain_block(block: DiTBlock, x: Tensor, prepared: Tensor, states: Tensor, bias: Tensor) -> Tensor:
    """Atoll's block as a direct port of DiT's description: torch's operations one by one, its fused attention."""
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.modulation(prepared, x.dtype).unbind(1)  # [B,1,D] each

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(2, (block.attention.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

    own, cross = block.attention, block.cross
    assert cross is not None
    x = x + gate_1 * own.out(attend(*own.qkv(norm(x, shift_1, scale_1)).chunk(3, dim=2)))
    x = x + cross.out(attend(cross.q(x), *cross.kv(states).chunk(2, dim=2), bias))
    return x + gate_2 * block.mlp(norm(x, shift_2, scale_2))


def build(variant: str, kind: str, size: str, device: str) -> nn.Module:
    """The network of a variant, "atoll", "plain" or "diffusers", perhaps "...-compiled", with random weights."""
    torch.manual_seed(0)
    network: nn.Module
    if variant.startswith(("atoll", "plain")):
        network = atoll_network(kind, size)
        for block in network.blocks if variant.startswith("plain") else ():  # type: ignore[union-attr]
            block.forward = partial(plain_block, block)
    else:
        network = Diffusers(kind, size)
    for parameter in network.parameters():  # nothing is exactly zero, as in a trained network
        nn.init.normal_(parameter, std=0.02)
    network = network.to(device)
    if variant.endswith("compiled"):
        network.compile()
    return network


def make_batch(batch: int, device: str) -> tuple[Tensor, Tensor, Condition]:
    """Random latents [B,C,H,W], times [B] and text whose length differs per row."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=generator)
    times = torch.rand(batch, generator=generator) * 999
    lengths = torch.randint(5, TEXT_TOKENS + 1, (batch, 1), generator=generator)
    states = torch.randn(batch, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    pooled = torch.randn(batch, TEXT_WIDTH, generator=generator)
    mask = torch.arange(TEXT_TOKENS) < lengths
    condition = Condition(states.to(device), mask.to(device), pooled.to(device))
    return x.to(device), times.to(device), condition


def forward_call(network: nn.Module, precision: str, batch: tuple[Tensor, Tensor, Condition]) -> Callable[[], object]:
    """One forward pass without gradients, weights and computation in `precision`."""
    network = network.to(DTYPES[precision]).eval()
    x, times, condition = batch
    condition = condition.to(dtype=DTYPES[precision])

    def call() -> Tensor:
        with torch.no_grad():
            return network(x, times, condition)

    return call


def train_call(network: nn.Module, precision: str, batch: tuple[Tensor, Tensor, Condition]) -> Callable[[], object]:
    """One training step: loss, backward, fused AdamW on float32 weights."""
    network = network.to(torch.float32).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    x, times, condition = batch
    noise = torch.randn_like(x)

    def call() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = network(x, times, condition)
        F.mse_loss(output, noise).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


def ceiling_call(size: str, precision: str, batch: int, device: str) -> tuple[Callable[[], object], float]:
    """A matrix product in the shape of the MLP's first layer, and its floating point operations."""
    s = SIZES[size]
    rows, D = batch * (SIZE // s["patch"]) ** 2, s["width"]
    x = torch.randn(rows, D, device=device, dtype=DTYPES[precision])
    layer = nn.Linear(D, 4 * D, bias=False, device=device, dtype=DTYPES[precision])
    repeats = 8  # long enough to time

    def call() -> None:
        with torch.no_grad():
            for _ in range(repeats):
                layer(x)

    return call, repeats * 2.0 * rows * D * 4 * D


def timed(call: Callable[[], object], options: argparse.Namespace) -> float:
    """Seconds of one call, the device's queue included."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    start = clock()
    call()
    if options.device != "cpu":
        torch.accelerator.synchronize()
    return clock() - start


def interleave(calls: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per round of every call; each round starts with another one. Two warm-up calls each."""
    names = list(calls)
    for name in names:
        timed(calls[name], options)
        timed(calls[name], options)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for r in range(options.rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            seconds[name].append(timed(calls[name], options))
    return seconds


def measure(network: str, mode: str, precision: str, options: argparse.Namespace) -> list[Result]:
    """All variants of one mode ("forward", "train") and precision, interleaved."""
    batch = make_batch(options.batch, options.device)
    make_call = forward_call if mode == "forward" else train_call
    variants = [v + c for c in ("", "-compiled")[: 1 + options.compile] for v in options.variants]
    calls = {v: make_call(build(v, network, options.size, options.device), precision, batch) for v in variants}
    calls["ceiling"], ceiling_flops = ceiling_call(options.size, precision, options.batch, options.device)
    seconds = interleave(calls, options)
    ceiling = ceiling_flops / statistics.median(seconds.pop("ceiling"))  # FLOP/s
    flops = forward_flops(sizes_of(config_of(network, options.size).model_dump(), TEXT_TOKENS))
    flops *= options.batch * (3 if mode == "train" else 1)
    results = []
    for variant, own in seconds.items():
        median = statistics.median(own)
        base = seconds.get("diffusers")
        ratio = statistics.median(b / o for b, o in zip(base, own, strict=True)) if base else None
        results.append(
            Result(network, mode, precision, variant, options.batch / median, ratio, flops / median / ceiling)
        )
    print_rows(results, ceiling)
    return results


def print_rows(results: Sequence[Result], ceiling: float) -> None:
    """One line per variant, under the header that `main` printed."""
    for r in results:
        ratio = "" if r.ratio is None else f"{r.ratio:.2f}"
        speed = f"{r.images_per_second:9.2f} {ratio:>10} {r.ceiling_share:8.0%} {ceiling / 1e9:11.0f}"
        print(f"{r.network:6} {r.mode:8} {r.precision:5} {r.variant:20} {speed}", flush=True)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """The machine and versions that the numbers belong to."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")),
            cpu,
        )
    name = cpu if options.device == "cpu" else torch.cuda.get_device_name()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "amx": torch.cpu._is_amx_tile_supported(),
    }


def listed(text: str) -> list[str]:
    """ "a,b" -> ["a", "b"]."""
    return text.split(",")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="B/2", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for one thread on a busy machine")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", type=listed, default=["dit"], help=",".join(NETWORKS))
    parser.add_argument("--modes", type=listed, default=["forward", "train"], help="forward,train")
    parser.add_argument("--precisions", type=listed, default=["fp32", "bf16"], help="fp32,bf16")
    parser.add_argument("--variants", type=listed, default=["atoll", "diffusers"], help="atoll,plain,diffusers")
    parser.add_argument("--compile", action="store_true", help="also time every variant compiled")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args(arguments)
    if unknown := set(options.networks) - set(NETWORKS):
        parser.error(f"--networks {','.join(unknown)}: expected some of {','.join(NETWORKS)}")
    if "plain" in options.variants and options.networks != ["dit"]:
        parser.error("--variants plain: only --networks dit has it")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    about = machine(options)
    print(json.dumps(about))
    columns = f"{'images/s':>9} {'/diffusers':>10} {'ceiling':>8} {'of GFLOP/s':>11}"
    print(f"{'':6} {'mode':8} {'dtype':5} {'variant':20} {columns}")
    results = [
        r
        for n in options.networks
        for m in options.modes
        for p in options.precisions
        for r in measure(n, m, p, options)
    ]
    if options.json:
        options.json.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
