"""Shared by the parts of benchmarks/gpu.py: the clock, the remaining time, and the report."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from atoll.plan.gpus import GPU, GPUS
from atoll.storage.artifact import write_json

Call = Callable[[], object]


@dataclass
class Evaluator:
    """One run of the benchmark.

    Attributes:
        tiny: sizes for a CPU, to test the code; such numbers say nothing about a GPU.
        compile: also measure compiled variants.
        deadline: of time.monotonic(); nothing starts after it.
        file: of the report, written after every result.
    """

    device: torch.device
    tiny: bool
    compile: bool
    rounds: int
    deadline: float
    file: Path | None = None
    report: dict[str, Any] = field(default_factory=lambda: {"parts": {}})

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def has_time(self, seconds: float, part: str, what: str) -> bool:
        """True if so many seconds are left; otherwise the report lists what was skipped. `tiny` always has time."""
        if self.tiny or self.seconds_left >= seconds:
            return True
        left = max(0, self.seconds_left)
        self.leave_out(part, f"{what}: needs about {seconds:.0f} s, {left:.0f} s were left; give more --minutes")
        return False

    def leave_out(self, part: str, why: str) -> None:
        """Record what is not measured, and why."""
        self.keep(part, {"left_out": [*self.report["parts"].get(part, {}).get("left_out", []), why]})

    def keep(self, part: str, values: Mapping[str, Any]) -> None:
        """Add results to the report and write it, so that nothing is lost if the run ends."""
        self.report["parts"].setdefault(part, {}).update(values)
        print(f"{part}: {dict(values)}", flush=True)
        self.write()

    def write(self) -> None:
        if self.file is not None:
            write_json(self.file, self.report)

    def known_gpu(self) -> GPU | None:
        """The GPU's data sheet, as `atoll plan` knows it; None for a CPU or an unknown one."""
        words = re.split(r"[ -]", torch.cuda.get_device_name().lower()) if self.on_gpu else []
        return next((GPUS[word] for word in words if word in GPUS), None)


def seconds_of(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call, the mean of `repeats` in a row: by CUDA's events on a GPU, by the clock on a CPU."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - began) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def interleaved(
    calls: Mapping[str, Call], device: torch.device, rounds: int, repeats: int = 1, warm: int = 2
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds per round of every call, each round starting with another one; and of each one's first call."""
    first = {}
    for name, call in calls.items():
        first[name] = seconds_of(call, device)  # compiles
        for _ in range(warm - 1):
            seconds_of(call, device)
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            seconds[name].append(seconds_of(calls[name], device, repeats))
    return seconds, first


def release(device: torch.device) -> None:
    """Return unused memory to the device."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
