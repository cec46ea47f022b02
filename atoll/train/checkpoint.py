"""Training states on disk, from which training goes on bit for bit; the last one stays whole until the next one is.

    checkpoint.safetensors       all tensors, and the numbers as its metadata: of one process, or of replicas
    checkpoint-000300-0.dcp/     torch.distributed.checkpoint's parts, and numbers.json: of sharded weights, at step
                                 300 after no rollback

Either is read by any number of processes, replicated or sharded.
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
    """A hash of what must not change between a run and its continuation."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Checkpoints:
    """The checkpoints of one training, in its directory. mark: of what must not change, see `fingerprint`.

    Random numbers need no state: every batch is a function of (seed, index) alone.
    """

    def __init__(self, directory: Path, mark: str, island: Island):
        self.directory, self.mark, self.island = directory, mark, island
        self._files = TrainingLayout(directory)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()  # a checkpoint that is being written becomes whole, whatever ended the training

    def exists(self) -> bool:
        """Whether there is one, the same answer in every process."""
        found = self._files.checkpoint.exists() or bool(self._sharded())
        self.island.barrier()  # before the first process writes one
        return found

    def clear(self) -> None:
        """Throws all away; the others wait for the first process."""
        self.finish()
        if self.island.is_first:
            self._remove([self._files.checkpoint, *self._sharded()])
        self.island.barrier()

    def save(self, state: State) -> None:
        """Copies the state, and writes the copy while training goes on. Raises as `finish` does."""
        self.finish()
        if self.island.world > 1 and state.settings.sharding == "shard":
            self._save_sharded(state)
        elif self.island.is_first:
            numbers = {"mark": self.mark, "numbers": json.dumps(state.text())}
            copy = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in state.tensors().items()}
            self._writing = self._thread.submit(self._write, copy, numbers)

    def finish(self) -> None:
        """Waits until the last checkpoint is on the disk. Raises AtollError if it could not be written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def load(self, state: State) -> None:
        """Puts the last checkpoint into the state, in place.

        Raises:
            AtollError: the file is damaged, or was written under other settings.
        """
        self.finish()
        self.island.barrier()  # the first process may have been writing until now
        sharded = self._sharded()
        file = self._files.checkpoint
        if sharded and (not file.exists() or _age_of(sharded[-1]) > self._numbers(file).age):
            self._load_sharded(sharded[-1], state)
        else:
            state.numbers = self._numbers(file)
            self._read(file, state.tensors())
        self.island.barrier()  # the first process may write the next one only now

    def _write(self, tensors: dict[str, Tensor], numbers: dict[str, str]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        temporary = temporary_of(self._files.checkpoint)  # one that was cut short is written over
        try:
            save_file(tensors, temporary, numbers)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self._files.checkpoint)
            self._remove(self._sharded())
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise AtollError(
                f"{self._files.checkpoint}: cannot be written ({getattr(error, 'strerror', None) or error}); "
                "the one before is untouched: make room and go on with --resume"
            ) from error

    def _numbers(self, file: Path) -> Counters:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata() or {}
            self._check(file, metadata.get("mark"))
            return Counters(**json.loads(metadata["numbers"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise AtollError(f"{file}: damaged ({error}); start again with --restart") from None

    def _check(self, file: Path, mark: str | None) -> None:
        if mark != self.mark:
            raise AtollError(
                f"{file}: was written under other settings or other data; restore them, or start again with --restart"
            )

    @torch.no_grad()
    def _read(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as stored:
                for name, tensor in tensors.items():
                    value = stored.get_tensor(name)
                    if value.shape != tensor.shape:  # copy_ would repeat a smaller one
                        raise RuntimeError(f"{name} has shape {list(value.shape)}, expected {list(tensor.shape)}")
                    if isinstance(tensor, torch.distributed.tensor.DTensor):
                        value = torch.distributed.tensor.distribute_tensor(
                            value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
                        )
                    tensor.copy_(value)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise AtollError(f"{file}: damaged ({error}); start again with --restart") from None

    def _sharded(self) -> list[Path]:
        """The whole ones, the newest last."""
        return sorted(self._files.sharded_checkpoints(), key=_age_of)

    def _save_sharded(self, state: State) -> None:
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.api import CheckpointException

        step, rollbacks = state.numbers.age
        path = self._files.sharded_checkpoint(step, rollbacks)
        temporary = self._files.sharded_temporary
        if self.island.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        self.island.barrier()
        try:
            checkpoint.save(dict(state.tensors()), checkpoint_id=temporary)
        except (OSError, CheckpointException) as error:
            raise AtollError(f"{path}: cannot be written ({_last_line(error)}); the one before is untouched") from None
        self.island.barrier()
        if self.island.is_first:
            older = [self._files.checkpoint, *self._sharded()]
            write_json(temporary / NUMBERS, {"mark": self.mark, "numbers": state.text()})
            os.replace(temporary, path)
            self._remove(older)
        self.island.barrier()

    def _remove(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if path.suffix == ".dcp":
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _load_sharded(self, path: Path, state: State) -> None:
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.api import CheckpointException

        found = read_json(path / NUMBERS)
        self._check(path, found.get("mark"))
        try:
            state.numbers = Counters(**found["numbers"])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")  # one process
                checkpoint.load(dict(state.tensors()), checkpoint_id=path)
        except (OSError, KeyError, TypeError, CheckpointException) as error:
            raise AtollError(f"{path}: damaged ({_last_line(error)}); start again with --restart") from None


def _age_of(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in path.stem.split("-")[1:])


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
