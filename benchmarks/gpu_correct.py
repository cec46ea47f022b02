"""Does the device compute the same as the CPU? A part of benchmarks/gpu.py, with networks of a few thousand weights."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from ensemble import by_loop
from gpu_measure import Evaluator
from gpu_training import RandomBatch, config_of, randomized
from torch import Tensor

from atoll.calibration import Calibration
from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert
from atoll.manifest import TrainSettings
from atoll.nn import DiT, DiTConfig
from atoll.objective import Objective
from atoll.train.island import Island
from atoll.train.loop import train
from atoll.train.plans import TrainingMarks

LATENT, TOKENS, WIDTH = (4, 8, 12), 7, 48
BF16, FP32 = 0.05, 1e-4  # how far a velocity may be off, root mean square over the reference's
STEPS, STOP, SAVED = 4, 3, 2  # of the training that is cut: its steps, where it is stopped, where it goes on from


class Stop(Exception):
    pass


def tiny_ensemble(device: torch.device, dtype: torch.dtype) -> Ensemble:
    """Three experts with three objectives and fixed probabilities; the same weights at every call."""
    torch.manual_seed(0)
    config = DiTConfig(
        size=LATENT[1:], channels=LATENT[0], states_dim=WIDTH, patch=2, width=64, depth=3, heads=4, modulation="single"
    )
    std = config.width**-0.5  # of weights that neither shrink nor blow up what goes through them: it must be seen
    objectives = Objective("flow", "linear"), Objective("eps", "cosine"), Objective("x0", "linear-beta")
    experts = []
    for k, objective in enumerate(objectives):
        network = randomized(DiT(config), std).to(device, dtype).eval().requires_grad_(False)
        calibration = Calibration.identity(torch.zeros(LATENT, device=device))
        experts.append(Expert(network, objective, (k,), calibration, objective.prediction))
    null = Condition(torch.randn(1, TOKENS, WIDTH), torch.ones(1, TOKENS).bool()).to(device, dtype)

    def router(x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        rows = torch.arange(3 * len(x), device=x.device, dtype=torch.float32).reshape(len(x), 3)
        return (2 * torch.sin(7 * rows)).log_softmax(1)

    return Ensemble(experts, router, "top-2", null=(null,))


@torch.inference_mode()
def velocities(device: torch.device, dtype: torch.dtype, looped: bool = False) -> Tensor:
    """The guided velocity [5, *LATENT] of five fixed latents, computed there and returned on the CPU.

    looped: one sample at a time.
    """
    ensemble = tiny_ensemble(device, dtype)
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(5, *LATENT, generator=g).to(device), torch.linspace(0.15, 0.9, 5).to(device)
    mask = torch.arange(TOKENS) < torch.tensor([[7], [2], [5], [1], [3]])
    condition = Condition(torch.randn(5, TOKENS, WIDTH, generator=g), mask).to(device, dtype)
    if not looped:
        return ensemble.velocity(x, t, condition, 7.5).float().cpu()
    assert ensemble.null is not None
    return by_loop(ensemble, x, t, condition, ensemble.null[0]).float().cpu()


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of a - b over that of b."""
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def trained(directory: Path, device: torch.device, cut: bool) -> dict[str, Tensor]:
    """A tiny DiT's EMA after STEPS steps. cut: stopped at step STOP and resumed from step SAVED."""
    options = {"steps": STEPS, "batch": 6, "checkpoint_every": SAVED, "log_every": 1, "validate_every": 0}
    settings = TrainSettings.model_validate({**options, "precision": "bf16", "track": "none"})
    island, marks = Island(0, 1, device), TrainingMarks({"name": "gpu"}, settings)

    def progress(line: dict[str, Any]) -> None:
        if line["step"] == STOP:
            raise Stop

    def task() -> RandomBatch:
        torch.manual_seed(0)
        return RandomBatch(randomized(DiT(config_of("tiny"))), settings.batch)

    if cut:
        with suppress(Stop):
            train(task(), settings, directory, marks, island, progress=progress)
    last = task()
    train(last, settings, directory, marks, island, resume=cut)
    return {name: value.cpu() for name, value in last.module.state_dict().items()}


def resumed(device: torch.device) -> dict[str, Any]:
    """Compare interrupted training with uninterrupted training, and the latter with itself: largest weight difference.

    If two uninterrupted ones differ, the kernels are not deterministic, and `holds` is None.
    """
    with tempfile.TemporaryDirectory() as directory:
        unbroken, again = (trained(Path(directory) / name, device, False) for name in ("unbroken", "again"))
        cut = trained(Path(directory) / "cut", device, True)

    def apart(other: dict[str, Tensor]) -> float:
        return max(float((other[name] - value).abs().max()) for name, value in unbroken.items())

    off, noise = apart(cut), apart(again)
    holds = True if off == 0 else False if noise == 0 else None
    return {"resumed_difference": off, "repeated_difference": noise, "holds": holds}


def correct(bench: Evaluator) -> None:
    """Part "correct": each check with its distance and result.

    Raises:
        RuntimeError: a check failed; raised after all of them.
    """
    reference = velocities(torch.device("cpu"), torch.float32)
    checks: dict[str, tuple[Callable[[], Tensor], float]] = {
        "bf16 against fp32 on the CPU": (lambda: velocities(bench.device, torch.bfloat16), BF16),
        "fp32 against fp32 on the CPU": (lambda: velocities(bench.device, torch.float32), FP32),
        "sample by sample against grouped, fp32": (lambda: velocities(bench.device, torch.float32, True), FP32),
    }
    results: dict[str, dict[str, Any]] = {}
    for name, (ask, limit) in checks.items():
        off = distance(ask(), reference)
        results[name] = {"distance": off, "limit": limit, "holds": off <= limit}
        bench.keep("correct", {name: results[name]})
    if bench.has_time(30, "correct", "resumed training"):
        name = "resumed training against unbroken"
        results[name] = resumed(bench.device)
        bench.keep("correct", {name: results[name]})
    if broken := [name for name, check in results.items() if check["holds"] is False]:
        raise RuntimeError(f"does not hold: {'; '.join(broken)}")
