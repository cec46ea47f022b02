"""The GPUs that `atoll plan` knows: memory, speed, price, and the fraction of the speed that training reaches."""

import re
from dataclasses import dataclass

from atoll.errors import AtollError


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Attributes:
        memory: bytes.
        tflops: dense bf16 matrix products with float32 sums; None for a size without a known speed.
        fp32_tflops: without tensor cores.
        usd_hour: price to rent one.
        mfu: fraction of tflops that training a DiT is assumed to reach, without checkpointing, compiled (or eager if
            `compiles` is false).
    """

    name: str
    memory: float
    tflops: float | None
    fp32_tflops: float | None = None
    usd_hour: float | None = None
    mfu: float = 0.4
    compiles: bool = True
    cpu: bool = False


def _gpu(name: str, gigabytes: float, tflops: float, fp32: float, usd: float | None, mfu: float) -> GPU:
    # The tables are in decimal gigabytes, as vendors state them.
    return GPU(name, gigabytes * 1e9, tflops, fp32, usd, mfu)


# Speeds: NVIDIA's data sheets, dense. For consumer cards the speed with float32 sums, which torch uses.
# Prices: USD an hour in March 2026, RunPod's as listed at https://deploybase.ai/articles/runpod-gpu-pricing
# (2026-03-10). Others took up to twice as much: in May 2026 https://www.mercatus-ai.com/blog/cloud-gpu-pricing gave
# 0.80 to 3.00 for an A100, 1.99 to 5.00 for an H100. There is no dated price for the A40 and the A6000: theirs are
# estimates, half of an L40S.
# MFU: assumed until benchmarks/gpu.py has measured it. The best published for a DiT is 0.48 on an H200.
_KNOWN = (
    _gpu("3090", 24, 71, 35.6, 0.22, 0.45),
    _gpu("4090", 24, 165.2, 82.6, 0.34, 0.45),
    _gpu("a40", 48, 149.7, 37.4, 0.40, 0.40),
    _gpu("a6000", 48, 154.8, 38.7, 0.40, 0.40),
    _gpu("l40s", 48, 362, 91.6, 0.79, 0.35),
    _gpu("a100", 80, 312, 19.5, 1.39, 0.40),
    _gpu("a100-40gb", 40, 312, 19.5, None, 0.40),
    _gpu("h100", 80, 989, 67, 2.69, 0.40),
    _gpu("h200", 141, 989, 67, 3.59, 0.40),
    _gpu("b200", 192, 2250, 80, 5.98, 0.35),
)
GPUS = {gpu.name: gpu for gpu in _KNOWN}


def find_gpu(name: str) -> GPU:
    """Return a known GPU by its name, or a size without a speed, such as "24GB" (1 GB is 10^9 bytes).

    Raises:
        AtollError: neither.
    """
    # "NVIDIA GeForce RTX 4090" and "4090" are the same.
    plain = re.sub(r"^(nvidia[ -]*)?(geforce[ -]*)?(rtx[ -]*)?", "", name.strip().lower())
    if plain in GPUS:
        return GPUS[plain]
    # A size without a name has no known speed.
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gb?", plain)
    if size and float(size[1]) > 0:
        return GPU(f"{float(size[1]):g}GB", float(size[1]) * 1e9, None)
    raise AtollError(f"no GPU {name!r}; expected one of {', '.join(GPUS)}, here, or a size such as 24GB")
