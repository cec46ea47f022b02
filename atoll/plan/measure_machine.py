"""Measure this machine: its matrix products, and the fraction of that speed that training a network reaches.

With both, a plan for `--gpu here` predicts a run on this machine, and `compare` compares a finished run with it.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import AtollError
from atoll.plan.cost import NetworkSizes, sizes_of, training_flops
from atoll.plan.recipe import Text, text_of
from atoll.storage.layout import RunLayout

if TYPE_CHECKING:
    from atoll.storage.cards import ExpertCard

MOST = 64  # samples of a measured step: more are no faster on a CPU, and may not fit a GPU


def on_cpu() -> bool:
    """Whether a training here runs on the CPU."""
    from atoll.runtime.device import best_device

    # The same choice as training makes.
    return best_device().type == "cpu"


def uses_bf16(precision: str = "auto") -> bool:
    """Whether a training here with this `train.precision` multiplies in bf16."""
    from atoll.runtime.device import best_device, has_bf16

    # "auto" depends on the hardware alone.
    return has_bf16(best_device()) if precision == "auto" else precision == "bf16"


def memory_here() -> float:
    """Bytes of the GPU's memory, or of the machine's if there is no GPU."""
    import torch

    # A plan needs the memory of the device that trains.
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def measured_flops(threads: int = 1, precision: str = "auto", size: int | None = None, seconds: float = 1.0) -> float:
    """Measure FLOP/s of the fastest of several products of two size x size matrices: this machine's ceiling.

    Args:
        threads: of the CPU; the setting is restored.
        precision: as in `train.precision`.
        size: default 8192 on a GPU, and 1024 on a CPU, where one product then ends before other processes get the core.
        seconds: how long to measure.
    """
    import torch

    from atoll.runtime.device import best_device

    # Matrices large enough to reach the ceiling.
    device, dtype = best_device(), torch.bfloat16 if uses_bf16(precision) else torch.float32
    size = size or (8192 if device.type == "cuda" else 1024)
    # The number of threads is global to the process, so it is restored.
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best, end = math.inf, time.monotonic() + seconds
        rounds = 0
        # At least three timed rounds; the fastest counts.
        while rounds < 4 or time.monotonic() < end:
            start = time.perf_counter()
            torch.mm(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if rounds:  # the first one loads kernels
                best = min(best, time.perf_counter() - start)
            rounds += 1
    finally:
        torch.set_num_threads(before)
    # Two FLOP for each multiplication of the product.
    return 2 * size**3 / best


def measured_rate(config: Mapping[str, Any], tokens: int, batch: int, threads: int = 1, precision: str = "auto",
                  seconds: float = 3.0, clock: Callable[[], float] = time.perf_counter) -> float:  # fmt: skip
    """Measure images/s of training steps (forward, backward, clip, fused AdamW, EMA) of a new network on random data.

    Args:
        config: a network's, as in cards.
        tokens: text tokens of a caption.
        seconds: how long to measure, after two warm-up steps; the median step counts.
        clock: time.process_time counts this process only, for a machine that others use too.
    """
    import torch

    from atoll.condition import Condition
    from atoll.nn import build_network
    from atoll.runtime.device import best_device

    # The same steps as training, on random data.
    device = best_device()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # A network, its optimizer and EMA, and random data.
        network = build_network(config).to(device).train()
        weights: list[torch.Tensor] = list(network.parameters())
        ema = [weight.detach().clone() for weight in weights]
        optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
        x = torch.randn(batch, config["channels"], *config["size"], device=device)  # [B,C,H,W]
        pooled = torch.randn(batch, config["pooled_dim"], device=device) if config.get("pooled_dim") else None
        mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        condition = Condition(torch.randn(batch, tokens, config["states_dim"], device=device), mask, pooled)
        # Time whole steps; the clock starts after the warm-up.
        times: list[float] = []
        end = math.inf
        while len(times) < 5 or time.monotonic() < end:
            start = clock()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16(precision)):
                loss = (network(x, torch.rand(batch, device=device) * 999, condition) - x).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(ema, weights, 1e-4)
            loss.item()  # waits for the device
            times.append(clock() - start)
            if len(times) == 2:
                end = time.monotonic() + seconds
        # The first two steps warm up kernels and caches.
        ordered = sorted(times[2:])
    finally:
        torch.set_num_threads(before)
    return batch / ordered[len(ordered) // 2]


@dataclass(frozen=True)
class Speed:
    """The speed of this machine. flops: FLOP/s of matrix products; mfu: the fraction that training reaches."""

    flops: float
    mfu: float


def speed_here(network: NetworkSizes, batch: int, threads: int = 1, precision: str = "auto") -> Speed:
    """Measure this machine, and training steps of `network` on it, for some seconds. Arguments as in `train`."""
    # First the ceiling, then real training steps: their ratio is the MFU.
    config = {key: value for key, value in asdict(network).items() if key != "tokens"}
    flops = measured_flops(threads, precision)
    rate = measured_rate({"name": network.name, **config}, network.tokens, min(batch, MOST), threads, precision)
    return Speed(flops, rate * training_flops(network) / flops)


@dataclass(frozen=True)
class Comparison:
    """A finished training and its prediction. mfu: the fraction of `flops` that it reached."""

    name: str
    steps: int
    images: int
    predicted_seconds: float
    measured_seconds: float
    flops: float
    mfu: float

    @property
    def ratio(self) -> float:
        """Measured over predicted: 1.25 is a run that took a quarter longer than planned."""
        return self.measured_seconds / self.predicted_seconds

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        # The ratio is derived, so asdict leaves it out.
        return {**asdict(self), "ratio": self.ratio}


def compare(card: "ExpertCard", tokens: int, flops: float, mfu: float) -> Comparison:
    """An expert's card against the prediction at `flops` a second and this share of them.

    Args:
        card: of an expert, with its training's steps, settings and seconds.
        tokens: of a caption, in the encoder that the card names.

    Raises:
        AtollError: the card does not say how long the training took.
    """
    # A card without a complete training, such as a converted expert's, cannot be compared.
    name, training = card.name, card.training
    try:
        if training is None or training.settings is None or training.seconds is None:
            raise ValueError("no training")
        steps, batch, seconds = training.steps, int(training.settings["batch"]), training.seconds
        network = sizes_of(card.network, tokens)
    except (KeyError, TypeError, ValueError):
        raise AtollError(
            f"expert {name}: its card has no training with steps, batch and seconds; train it again"
        ) from None
    if seconds <= 0:
        raise AtollError(f"expert {name}: its card says it was trained in {seconds:g} s; nothing to compare")
    # The work in FLOP, from the formula that the plan uses.
    work = steps * batch * training_flops(network)
    return Comparison(name, steps, steps * batch, work / (flops * mfu), seconds, flops, work / seconds / flops)


def compare_run(run: Path, text: Text | None = None) -> list[Comparison]:
    """Every expert of a run that was trained, against what this machine does now: train and compare on one machine.

    Args:
        text: of the condition encoder, where its config does not tell.

    Raises:
        AtollError: no expert in it is trained, or a card does not say how.
    """
    from atoll.storage.artifact import CARD, read_card
    from atoll.storage.cards import ExpertCard

    experts = RunLayout(run).experts
    cards = [read_card(file.parent, ExpertCard) for file in sorted(experts.glob(f"*/{CARD}"))]
    cards = [card for card in cards if card.conversion is None]  # of those that were converted and no more
    if not cards:
        raise AtollError(f"{experts}: no trained expert to compare with; train one (atoll train expert)")
    # Measure each distinct network once.
    speeds: dict[tuple[NetworkSizes, int, int, str], Speed] = {}
    found = []
    for card in cards:
        tokens = (text or text_of(card.condition)).tokens
        compare(card, tokens, 1.0, 1.0)  # says what is wrong with a card before anything is measured
        settings = card.training.settings if card.training and card.training.settings else {}
        network = sizes_of(card.network, tokens)
        kind = network, settings["batch"], settings.get("threads", 1), settings.get("precision", "auto")
        if kind not in speeds:
            speeds[kind] = speed_here(*kind)
        found.append(compare(card, tokens, speeds[kind].flops, speeds[kind].mfu))
    return found
