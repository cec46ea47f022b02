"""Measure variants of one model: distances to real images, held-out denoising error, agreement, diversity, cost."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from atoll.errors import AtollError
from atoll.evaluate.types import CachePaths, EvaluateProgress, MapFunction, Reference, Results, Variant
from atoll.manifest import EvaluateSettings
from atoll.runtime.device import has_bf16


def evaluate(
    variants: Sequence[Variant],
    reference: Reference,
    settings: EvaluateSettings | None = None,
    *,
    progress: EvaluateProgress | None = None,
    device: str | torch.device = "cpu",
    store: Path | None = None,
) -> Results:
    """Measure every variant with the same captions, the same noise per image and the same held-out latents.

    Args:
        variants: ways to sample, with distinct names.
        reference: the real images and held-out latents.
        settings: the defaults if None.
        progress: called after each batch.
        device: of the variants' networks.
        store: directory of cached results: each batch is measured once; None caches in a temporary directory.

    Returns:
        One score per variant, in order, and the scores of real images.

    Raises:
        AtollError: too few real images, no held-out ones, or two variants with one name; the weights of a feature
            network are missing or belong to another network; a cached file is damaged.
    """
    from atoll.evaluate.bench import Evaluator

    # Check the settings and the names.
    settings = resolve_precision(settings or EvaluateSettings(), device)
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise AtollError(f"two variants are named {twice}, among {', '.join(names)}; expected distinct names")
    # A codec in bf16 decodes faster.
    count = worker_count(settings, device)
    if settings.precision == "bf16":
        reference.codec.to(dtype=torch.bfloat16)
    # Measure one variant after the other, each on several batches in parallel.
    with tempfile.TemporaryDirectory(prefix="atoll-") as temporary, side_by_side(count) as run:
        paths = CachePaths(store, Path(temporary))
        # The unit of the progress: network calls.
        calls = sum(variant.calls for variant in variants)
        evaluator = Evaluator(
            reference=reference,
            settings=settings,
            device=torch.device(device),
            paths=paths,
            calls=calls,
            progress=progress,
            run=run,
            workers=count,
        )
        # `Ensemble.velocity` keeps an expert that outputs NaN: the report then says that images diverged.
        scores = tuple(evaluator.score(variant) for variant in variants)
        return evaluator.results(scores)


def resolve_precision(settings: EvaluateSettings, device: str | torch.device) -> EvaluateSettings:
    """Replace the codec's precision "auto": bf16 decodes twice as fast and changes a pixel by a third of 1/255."""
    # An explicit precision is used as it is.
    if settings.precision != "auto":
        return settings
    return settings.model_copy(update={"precision": "bf16" if has_bf16(torch.device(device)) else "fp32"})


def worker_count(settings: EvaluateSettings, device: str | torch.device) -> int:
    """Batches that run in parallel: `settings.workers`, or one per core; one on an accelerator."""
    # A number in the settings takes precedence.
    if settings.workers is not None:
        return settings.workers
    # An accelerator is busy with one batch.
    if torch.device(device).type != "cpu":
        return 1
    # Cores that this process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def side_by_side(workers: int) -> Iterator[MapFunction]:
    """A parallel `map`: calls run in `workers` threads without gradients; results arrive in order.

    On a CPU, small networks gain more from batches in parallel, with one thread each, than from several threads per
    operation (1.6 times on two idle cores), and do not collapse on busy cores (20 times).
    """
    # Divide the threads of torch among the workers.
    before = torch.get_num_threads()
    threads = max(1, before // workers)
    torch.set_num_threads(threads)
    try:
        # Each worker sets its own number of threads.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            yield lambda function, items: pool.map(torch.inference_mode()(function), items)
    finally:
        # Restore the setting, also after an error.
        torch.set_num_threads(before)
