"""Checkpoints, from which training resumes bit for bit; the last one stays valid until the next one is complete.

    checkpoint.safetensors       all tensors, the counters as metadata; written by one process, or by replicas
    checkpoint-000300-0.dcp/     torch.distributed.checkpoint's files and numbers.json; written by sharded processes,
                                 here at step 300 after no rollback

Any number of processes, replicated or sharded, reads either of them.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.artifact import read_json, write_json
from atoll.storage.layout import TrainingLayout, temporary_of
from atoll.train.island import Island
from atoll.train.state import Counters, State

NUMBERS = "numbers.json"


def fingerprint(settings: dict[str, Any]) -> str:
    """Return a hash of the settings that must not change when a training is resumed."""
    # Sorted keys, so that the order of the settings does not matter.
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Checkpoints:
    """The checkpoints of one training; a context manager.

    Random numbers need no state: every batch is a function of (seed, index) alone.

    Args:
        directory: the training's.
        mark: of the settings that must not change, see `fingerprint`.
        island: the processes that train together; each calls all methods.
    """

    def __init__(self, directory: Path, mark: str, island: Island):
        self.directory, self.mark, self.island = directory, mark, island
        self._files = TrainingLayout(directory)
        # One thread: checkpoints are written one after the other.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()  # completes a checkpoint that is being written, however the training ended

    def exists(self) -> bool:
        """Return whether there is a checkpoint, the same answer in every process."""
        # Every process looks before any of them changes the directory.
        exists = self._files.checkpoint.exists() or bool(self._sharded())
        self.island.barrier()  # before the first process writes one
        return exists

    def clear(self) -> None:
        """Remove all checkpoints; the other processes wait for the first one."""
        self.finish()
        if self.island.is_first:
            self._remove([self._files.checkpoint, *self._sharded()])
        self.island.barrier()

    def save(self, state: State) -> None:
        """Copy the state and write the copy in the background; raises like `finish`."""
        # The last checkpoint must be complete before the next one is copied.
        self.finish()
        # Sharded processes write their parts together; otherwise the first process has everything.
        if self.island.world > 1 and state.settings.sharding == "shard":
            self._save_sharded(state)
        elif self.island.is_first:
            numbers = {"mark": self.mark, "numbers": json.dumps(state.text())}
            # Training changes the tensors while the copy is being written.
            copy = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in state.tensors().items()}
            self._writing = self._thread.submit(self._write, copy, numbers)

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk. Raises AtollError if it could not be written."""
        if self._writing is not None:
            # Cleared first, so that an error is raised only once.
            writing, self._writing = self._writing, None
            writing.result()

    def load(self, state: State) -> None:
        """Load the last checkpoint into the state, in place.

        Raises:
            AtollError: the file is damaged, or was written under other settings.
        """
        self.finish()
        self.island.barrier()  # the first process may just have finished writing
        sharded = self._sharded()
        file = self._files.checkpoint
        # Both formats exist after a change of the sharding: the later one counts.
        if sharded and (not file.exists() or _age_of(sharded[-1]) > self._numbers(file).age):
            self._load_sharded(sharded[-1], state)
        else:
            state.numbers = self._numbers(file)
            self._read(file, state.tensors())
        self.island.barrier()  # only then may the first process write the next one

    def _write(self, tensors: dict[str, Tensor], numbers: dict[str, str]) -> None:
        # Imported here: sharded training writes no safetensors file.
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        temporary = temporary_of(self._files.checkpoint)  # overwrites one that a crash left incomplete
        try:
            # Write beside the old checkpoint, then replace it.
            save_file(tensors, temporary, numbers)
            with temporary.open("rb+") as file:
                # On disk before it replaces the old checkpoint: a power failure leaves one of the two.
                os.fsync(file.fileno())
            os.replace(temporary, self._files.checkpoint)
            # A sharded checkpoint of an earlier run is now outdated.
            self._remove(self._sharded())
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise AtollError(
                f"{self._files.checkpoint}: cannot be written ({getattr(error, 'strerror', None) or error}); "
                "the one before is untouched: free disk space, then --resume"
            ) from error

    def _numbers(self, file: Path) -> Counters:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as stored:
                # The header alone holds the counters; no tensor is read.
                metadata = stored.metadata() or {}
            self._check(file, metadata.get("mark"))
            return Counters(**json.loads(metadata["numbers"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise AtollError(f"{file}: damaged ({error}); train again with --restart") from None

    def _check(self, file: Path, mark: str | None) -> None:
        # Another mark means other settings or data, and a resumed training would differ.
        if mark != self.mark:
            raise AtollError(
                f"{file}: was written with other settings or data; restore them, or train again with --restart"
            )

    @torch.no_grad()
    def _read(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as stored:
                # Each tensor is copied into the one that training already uses.
                for name, tensor in tensors.items():
                    value = stored.get_tensor(name)
                    if value.shape != tensor.shape:  # copy_ would repeat a smaller one
                        raise RuntimeError(f"{name} has shape {list(value.shape)}, expected {list(tensor.shape)}")
                    # A sharded tensor: each process keeps its part of the whole.
                    if isinstance(tensor, torch.distributed.tensor.DTensor):
                        value = torch.distributed.tensor.distribute_tensor(
                            value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
                        )
                    tensor.copy_(value)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise AtollError(f"{file}: damaged ({error}); train again with --restart") from None

    def _sharded(self) -> list[Path]:
        """The complete sharded checkpoints, the newest last."""
        return sorted(self._files.sharded_checkpoints(), key=_age_of)

    def _save_sharded(self, state: State) -> None:
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.api import CheckpointException

        step, rollbacks = state.numbers.age
        path = self._files.sharded_checkpoint(step, rollbacks)
        # All processes write into one temporary directory, which the first one renames.
        temporary = self._files.sharded_temporary
        if self.island.is_first:
            # A leftover of a crash.
            shutil.rmtree(temporary, ignore_errors=True)
        self.island.barrier()
        try:
            checkpoint.save(dict(state.tensors()), checkpoint_id=temporary)  # type: ignore[attr-defined]
        except (OSError, CheckpointException) as error:
            raise AtollError(f"{path}: cannot be written ({_last_line(error)}); the one before is untouched") from None
        # Every process has written its part.
        self.island.barrier()
        if self.island.is_first:
            # The new checkpoint appears under its name only when it is complete; then the old ones go.
            older = [self._files.checkpoint, *self._sharded()]
            write_json(temporary / NUMBERS, {"mark": self.mark, "numbers": state.text()})
            os.replace(temporary, path)
            self._remove(older)
        # No process trains on before the checkpoint has its final name.
        self.island.barrier()

    def _remove(self, paths: Sequence[Path]) -> None:
        for path in paths:
            # A sharded checkpoint is a directory, the other a file.
            if path.suffix == ".dcp":
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _load_sharded(self, path: Path, state: State) -> None:
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.api import CheckpointException

        # The counters and the mark are in a file beside the tensors.
        record = read_json(path / NUMBERS)
        self._check(path, record.get("mark"))
        try:
            state.numbers = Counters(**record["numbers"])
            # One process may read the parts of many.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")  # one process
                checkpoint.load(dict(state.tensors()), checkpoint_id=path)  # type: ignore[attr-defined]
        except (OSError, KeyError, TypeError, CheckpointException) as error:
            raise AtollError(f"{path}: damaged ({_last_line(error)}); train again with --restart") from None


def _age_of(path: Path) -> tuple[int, ...]:
    # The file name holds step and rollbacks.
    return tuple(int(number) for number in path.stem.split("-")[1:])


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
