"""Checkpoints, from which training resumes bit for bit; the last one stays valid until the next one is complete.

    checkpoint.safetensors       all tensors, the counters as metadata; written by one process, or by replicas
    checkpoint-000300-0.dcp/     torch.distributed.checkpoint's files and numbers.json; written by sharded processes,
                                 here at step 300 after no rollback

Any number of processes, replicated or sharded, reads either of them. Both hold hashes of their contents, which are
compared when a checkpoint is read.
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.artifact import read_json, sha256_file, write_json
from atoll.storage.layout import TrainingLayout, temporary_of
from atoll.storage.memory import refuse_out_of_memory
from atoll.storage.tensor_hash import TensorHash, split_hash, with_hash
from atoll.train.island import Island
from atoll.train.plans import TrainingMarks, fingerprint
from atoll.train.state import Counters, State

NUMBERS = "numbers.json"
_METADATA = {"mark", "numbers"}  # of checkpoint.safetensors, beside the hash
_REMEDY = "restore the file from a copy, or train this part again from the start with --restart"


class Checkpoints:
    """The checkpoints of one training; a context manager.

    Random numbers need no state: every batch is a function of (seed, index) alone.

    Args:
        directory: the training's, or one inside it for another checkpoint of the same training.
        marks: of the training; a checkpoint of another one is refused.
        island: the processes that train together; each calls all methods.
    """

    def __init__(self, directory: Path, marks: TrainingMarks, island: Island):
        self.directory, self.marks, self.island = directory, marks, island
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
        exists = self._files.has_checkpoint()
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
        self.directory.mkdir(parents=True, exist_ok=True)
        # Sharded processes write their parts together; otherwise the first process has everything.
        if self.island.world > 1 and state.settings.sharding == "shard":
            self._save_sharded(state)
        elif self.island.is_first:
            numbers = {"mark": self.marks.of(state.numbers), "numbers": json.dumps(state.text())}
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
            AtollError: the file is damaged, holds a value that is not finite, or was written under other settings.
        """
        file, state.numbers = self._last()
        if file == self._files.checkpoint:
            self._read(file, state.tensors())
        else:
            self._load_sharded(file, state)
        self.island.barrier()  # only then may the first process write the next one

    def numbers(self) -> Counters:
        """Return the counters of the last checkpoint; raises like `load`, but reads no tensor."""
        numbers = self._last()[1]
        self.island.barrier()
        return numbers

    def _last(self) -> tuple[Path, Counters]:
        """The last checkpoint with its counters."""
        self.finish()
        self.island.barrier()  # the first process may just have finished writing
        sharded, file = self._sharded(), self._files.checkpoint
        # Both formats exist after a change of the sharding: the later one counts.
        if sharded and (not file.exists() or _age_of(sharded[-1]) > self._numbers(file).age):
            return sharded[-1], self._record(sharded[-1])[0]
        return file, self._numbers(file)

    def _write(self, tensors: dict[str, Tensor], numbers: dict[str, str]) -> None:
        # Imported here: sharded training writes no safetensors file.
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        temporary = temporary_of(self._files.checkpoint)  # overwrites one that a crash left incomplete
        try:
            # Write beside the old checkpoint, then replace it.
            save_file(tensors, temporary, with_hash(tensors, numbers))
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
                metadata, _ = split_hash(stored.metadata() or {}, _METADATA)
            return self._checked(file, metadata["mark"], json.loads(metadata["numbers"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, MemoryError) as error:
            raise _damaged(file, error) from None

    def _checked(self, file: Path, mark: str | None, values: dict[str, Any]) -> Counters:
        """The counters of a checkpoint. Raises AtollError if it belongs to another training."""
        numbers = Counters(**values)
        # Another mark means other settings or data, and a resumed training would differ.
        if (planned := self.marks.plan_of(mark, numbers)) is None:
            raise AtollError(
                f"{file}: was written with other settings or data; restore them, or train again with --restart"
            )
        return replace(numbers, planned=planned)

    @torch.no_grad()
    def _read(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as stored:
                metadata, expected = split_hash(stored.metadata() or {}, _METADATA)
                content = TensorHash(metadata)
                # One pass: each tensor is hashed, and copied into the one that training already uses.
                for name in sorted(stored.keys()):
                    value = stored.get_tensor(name)
                    content.add(name, value)
                    if name in tensors:
                        _copy(name, value, tensors[name])
                missing = tensors.keys() - set(stored.keys())
        except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
            raise _damaged(file, error) from None
        if missing:
            raise _damaged(file, f"it lacks {min(missing)}")
        if expected is not None and content.hexdigest() != expected:
            raise _damaged(file, "its contents are not those that were written, their sha256 is another")
        self._refuse_not_finite(file, tensors)

    def _refuse_not_finite(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Raise AtollError if a tensor of the loaded state is not finite; every process must call this."""
        # The average would be noticed at the end of the training only: no loss is computed from it.
        name = not_finite(tensors)
        if self.island.any(name is not None):
            raise _damaged(file, f"{name or 'a tensor of another process'} holds NaN or infinity")

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
            # Each process hashes the files that it wrote, all at the same time.
            self._write_hashes(temporary)
        except (OSError, CheckpointException) as error:
            raise AtollError(f"{path}: cannot be written ({_last_line(error)}); the one before is untouched") from None
        # Every process has written its part.
        self.island.barrier()
        if self.island.is_first:
            # The new checkpoint appears under its name only when it is complete; then the old ones go.
            older = [self._files.checkpoint, *self._sharded()]
            hashes = self._merge_hashes(temporary) | {NUMBERS: fingerprint(state.text())}
            write_json(
                temporary / NUMBERS, {"mark": self.marks.of(state.numbers), "numbers": state.text(), "sha256": hashes}
            )
            os.replace(temporary, path)
            self._remove(older)
        # No process trains on before the checkpoint has its final name.
        self.island.barrier()

    def _write_hashes(self, directory: Path) -> None:
        """Write the hashes of the files of this process into the directory of a sharded checkpoint."""
        # torch names them by the rank; the first process also writes the table of all tensors.
        names = [file.name for file in directory.glob(f"__{self.island.rank}_*")]
        names += [".metadata"] if self.island.is_first else []
        write_json(directory / _hashes_of(self.island.rank), {name: sha256_file(directory / name) for name in names})

    def _merge_hashes(self, directory: Path) -> dict[str, str]:
        """Return the hashes that all processes wrote, and remove their files."""
        hashes: dict[str, str] = {}
        for rank in range(self.island.world):
            file = directory / _hashes_of(rank)
            hashes |= read_json(file)
            file.unlink()
        return hashes

    def _compare_hashes(self, directory: Path, hashes: Mapping[str, str]) -> None:
        """Raise AtollError if a file of a sharded checkpoint is damaged; every process must call this."""

        def damaged(names: Sequence[str]) -> list[str]:
            wrong = []
            for name in names:
                file = directory / name
                if not file.is_file() or sha256_file(file) != hashes[name]:
                    wrong.append(name)
            return wrong

        # Each process reads a part of the files. If one is damaged, all look for it, so that every message names it.
        names = sorted(hashes)
        if self.island.any(bool(damaged(names[self.island.rank :: self.island.world]))):
            name = (damaged(names) or ["a file"])[0]
            raise _damaged(directory / name, "its contents are not those that were written, their sha256 is another")

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

        from atoll.train.sharded_reader import ShardedReader

        state.numbers, hashes = self._record(path)
        try:
            self._compare_hashes(path, hashes)
            # One process may read the parts of many.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")  # one process
                checkpoint.load(dict(state.tensors()), storage_reader=ShardedReader(path))  # type: ignore[attr-defined]
        except (OSError, KeyError, TypeError, AttributeError, CheckpointException, MemoryError) as error:
            raise _damaged(path, error) from None
        self._refuse_not_finite(path, state.tensors())

    def _record(self, path: Path) -> tuple[Counters, dict[str, str]]:
        """The counters of a sharded checkpoint, and the hashes of its files."""
        # The counters and the mark are in a file beside the tensors.
        record = read_json(path / NUMBERS)
        try:
            numbers = self._checked(path, record.get("mark"), record["numbers"])
            hashes = dict(record.get("sha256", {}))  # {}: of a time before hashes
            if strange := [name for name in hashes if "/" in name or "\\" in name]:
                raise _damaged(path / NUMBERS, f"it names {strange[0]!r:.60}, no file of a checkpoint")
            if hashes.pop(NUMBERS, mark := fingerprint(record["numbers"])) != mark:
                raise _damaged(path / NUMBERS, "its numbers are not those that were written")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(path / NUMBERS, error) from None
        return numbers, hashes


def discard_checkpoints(directory: Path) -> None:
    """Remove all checkpoints of a training that ended; it cannot be extended afterwards."""
    files = TrainingLayout(directory)
    for path in (files.before_decay, *files.sharded_checkpoints()):
        shutil.rmtree(path, ignore_errors=True)
    files.checkpoint.unlink(missing_ok=True)


def _age_of(path: Path) -> tuple[int, ...]:
    # The file name holds step and rollbacks.
    return tuple(int(number) for number in path.stem.split("-")[1:])


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, None if there is none.

    Of a sharded tensor, only this process's part is read.
    """
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
        # Counters and the codes of quantised moments are whole numbers.
        if local.is_floating_point() and not bool(torch.isfinite(local).all()):
            return name
    return None


def _copy(name: str, value: Tensor, target: Tensor) -> None:
    """Copy a tensor of a checkpoint into the state. Raises ValueError if the shapes differ."""
    if value.shape != target.shape:  # copy_ would repeat a smaller one
        raise ValueError(f"{name} has shape {list(value.shape)}, expected {list(target.shape)}")
    # A sharded tensor: each process keeps its part of the whole.
    if isinstance(target, torch.distributed.tensor.DTensor):
        value = torch.distributed.tensor.distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(value)


def _damaged(file: Path, why: str | BaseException) -> AtollError:
    """Create the error for a checkpoint that cannot be resumed."""
    # A checkpoint that does not fit into memory is intact.
    if isinstance(why, BaseException):
        refuse_out_of_memory(why, file)
        why = _last_line(why)
    return AtollError(f"{file}: damaged ({why}); {_REMEDY}")


def _hashes_of(rank: int) -> str:
    # Removed before the checkpoint gets its name.
    return f"hashes-{rank}.json"


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
