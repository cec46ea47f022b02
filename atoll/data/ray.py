"""Encode the blocks of a source on the machines of a Ray cluster: `atoll encode --on ray`."""

import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atoll.data.block import Frozen, encode_block
from atoll.data.partial import PartialEncoding
from atoll.data.pool import Decoders
from atoll.data.targets import with_components
from atoll.data.types import Block, Source
from atoll.errors import AtollError
from atoll.manifest import Manifest


class BlockEncoder:
    """An actor of Ray Data: loads the networks once, then encodes block after block."""

    def __init__(self, source: Source, manifest: Manifest, partial: Path, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.source, self.partial = source, PartialEncoding(partial)
        self.frozen = with_components(Frozen.build(manifest), self.partial)
        # On a CPU the actors themselves are the parallelism; a GPU's actor has cores to decode with.
        self.decoders = Decoders(self.frozen.framing, 0 if self.frozen.device.type == "cpu" else threads)
        self.decoders.__enter__()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        if not self.partial.is_done(number):  # Ray repeats tasks whose machine was lost after they were done
            block: Block = pickle.loads(row["block"])
            encode_block(number, block, self.source, self.frozen, self.decoders, self.partial)
        return {"number": number}


def encode_blocks(
    todo: Sequence[tuple[int, Block]],
    source: Source,
    manifest: Manifest,
    partial: PartialEncoding,
    workers: int | None,
    watch: Any,
) -> None:
    """Encode blocks on the cluster that RAY_ADDRESS names, else on a local one.

    An actor takes a GPU and its share of the cores if the cluster has GPUs, else one core. The blocks of a lost machine
    are encoded again elsewhere. `partial` must be on a file system that all machines share.

    Args:
        todo: (number, block) of the blocks to encode.
        source: reads the blocks.
        manifest: the settings of the run.
        partial: the unfinished encoding to write to.
        workers: actors at a time; None for one per GPU, else one per core.
        watch: counts the finished blocks.

    Raises:
        AtollError: no ray; a block that a machine reported is not there; or what the work on a machine raised.
    """
    if not todo:
        return
    try:
        import ray
    except ImportError:
        raise AtollError("--on ray needs Ray: pip install 'atoll[ray]'") from None
    # Join a running cluster, and shut down only one that was started here.
    own = not ray.is_initialized()
    if own:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    try:
        # Divide the resources of the cluster among the actors.
        gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
        actors = max(1, min(workers or gpus or cpus, len(todo)))
        threads = max(1, cpus // gpus) if gpus else 1
        ray.data.DataContext.get_current().enable_progress_bars = False
        # One row is one block; the blocks are pickled because Ray rows hold plain values.
        rows = [{"number": number, "block": pickle.dumps(block)} for number, block in todo]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            BlockEncoder,  # type: ignore[arg-type]  # Ray takes a class of callables too
            fn_constructor_args=(source, manifest, partial.path.resolve(), threads),
            concurrency=actors,
            num_cpus=threads,
            num_gpus=1 if gpus else 0,
        )
        # Count each block as it is reported, and verify that this machine can see it.
        for row in done.iter_rows():
            number = int(np.asarray(row["number"]))
            if not partial.is_done(number):
                raise AtollError(
                    f"{partial.path}: block {number} was written elsewhere; let all machines share this path"
                )
            watch.finish(number)
    except ray.exceptions.RayError as error:
        raise _plain(error) from error
    finally:
        if own:
            ray.shutdown()


def _plain(error: BaseException) -> AtollError:
    """Return the error that a machine raised, without Ray's wrapping."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, AtollError):
        cause = getattr(cause, "cause", None) or cause.__cause__
    return cause if isinstance(cause, AtollError) else AtollError(f"Ray: {str(error).strip().splitlines()[-1]}")
