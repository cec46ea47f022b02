"""Measures variants of one model: distances to real images, held-out denoising error, agreement, diversity, cost."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from atoll.errors import AtollError
from atoll.evaluate.types import EvaluateProgress, MapFunction, Places, Reference, Results, Variant
from atoll.manifest import EvaluateSettings
from atoll.runtime.device import has_bf16


def evaluate(
    variants: Sequence[Variant],
    reference: Reference,
    settings: EvaluateSettings | None = None,
    progress: EvaluateProgress | None = None,
    device: str | torch.device = "cpu",
    store: Path | None = None,
) -> Results:
    """Measures every variant with the same captions, the same noise per image and the same held-out latents.

    Args:
        store: a directory where all that is measured is kept, batch by batch: what is there is not measured again.

    Raises:
        AtollError: too few real images, no held-out ones, or two variants of one name; weights of a feature network
            that are not found, or of another; a file of the store that is damaged.
    """
    from atoll.evaluate.bench import Evaluator

    settings = resolved(settings or EvaluateSettings(), device)
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise AtollError(f"two variants have one name, {twice}, among {', '.join(names)}; expected names that differ")
    count = worker_count(settings, device)
    if settings.precision == "bf16":
        reference.codec.to(dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(prefix="atoll-") as passing, side_by_side(count) as run:
        places = Places(store, Path(passing))
        calls = sum(variant.calls for variant in variants)
        bench = Evaluator(reference, settings, torch.device(device), places, calls, progress, run, count)
        # What is measured is the variant as it is: an expert that breaks is not left out of it.
        kept = (replace(variant, ensemble=variant.ensemble.with_options(drops=False)) for variant in variants)
        scores = tuple(bench.score(variant) for variant in kept)
        return bench.results(scores)


def resolved(settings: EvaluateSettings, device: str | torch.device) -> EvaluateSettings:
    """With the codec's precision as it will be: bf16 decodes twice as fast, and moves a pixel by a third of 1/255."""
    if settings.precision != "auto":
        return settings
    return settings.model_copy(update={"precision": "bf16" if has_bf16(torch.device(device)) else "fp32"})


def worker_count(settings: EvaluateSettings, device: str | torch.device) -> int:
    """Batches side by side: `settings.workers`, or one per core; one on an accelerator."""
    if settings.workers is not None:
        return settings.workers
    if torch.device(device).type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def side_by_side(workers: int) -> Iterator[MapFunction]:
    """A function like `map` whose calls run in `workers` threads without gradients, in order.

    Small networks on a CPU gain more from batches side by side, one thread each, than from several threads in each
    operation (1.6 times on two idle cores), and do not collapse on busy cores (20 times).
    """
    before = torch.get_num_threads()
    threads = max(1, before // workers)
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            yield lambda function, items: pool.map(torch.inference_mode()(function), items)
    finally:
        torch.set_num_threads(before)
