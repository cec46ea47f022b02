"""Training states on disk, from which training goes on bit for bit; the last one stays whole until the next one is.

    checkpoint.safetensors     all tensors, and the numbers as its metadata: of one process, or of replicas
    checkpoint-000300.dcp/     torch.distributed.checkpoint's parts, and numbers.json: of sharded weights

Either is read by any number of processes, replicated or sharded.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.artifact import read_json, write_json
from atoll.errors import AtollError
from atoll.train.island import Island
from atoll.train.state import Numbers, State

CHECKPOINT = "checkpoint.safetensors"
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()  # a checkpoint that is being written becomes whole, whatever ended the training

    def exists(self) -> bool:
        return (self.directory / CHECKPOINT).exists() or bool(self._sharded())

    def clear(self) -> None:
        """Throws all away; the others wait for the first process."""
        self.finish()
        if self.island.is_first:
            (self.directory / CHECKPOINT).unlink(missing_ok=True)
            for path in self._sharded():
                shutil.rmtree(path)
        self.island.wait()

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
        sharded = self._sharded()
        file = self.directory / CHECKPOINT
        if sharded and (not file.exists() or _step_of(sharded[-1]) > self._numbers(file).step):
            self._load_sharded(sharded[-1], state)
            return
        state.numbers = self._numbers(file)
        self._read(file, state.tensors())

    def _write(self, tensors: dict[str, Tensor], numbers: dict[str, str]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        temporary = self.directory / f".{CHECKPOINT}.{os.getpid()}.tmp"
        try:
            save_file(tensors, temporary, numbers)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.directory / CHECKPOINT)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise AtollError(
                f"{self.directory / CHECKPOINT}: cannot be written ({getattr(error, 'strerror', None) or error}); "
                "the one before is untouched: make room and go on with --resume"
            ) from error

    def _numbers(self, file: Path) -> Numbers:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata() or {}
            self._check(file, metadata.get("mark"))
            return Numbers(**json.loads(metadata["numbers"]))
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
                    if isinstance(tensor, torch.distributed.tensor.DTensor):
                        value = torch.distributed.tensor.distribute_tensor(
                            value.to(tensor.device), tensor.device_mesh, tensor.placements
                        )
                    tensor.copy_(value)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise AtollError(f"{file}: damaged ({error}); start again with --restart") from None

    def _sharded(self) -> list[Path]:
        """The whole ones, the newest last."""
        return sorted(self.directory.glob("checkpoint-*.dcp"), key=_step_of)

    def _save_sharded(self, state: State) -> None:
        from torch.distributed import checkpoint

        path = self.directory / f"checkpoint-{state.numbers.step:09d}.dcp"
        temporary = path.with_name(f".{path.name}.tmp")
        if self.island.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        self.island.wait()
        checkpoint.save(dict(state.tensors()), checkpoint_id=temporary)
        self.island.wait()
        if self.island.is_first:
            write_json(temporary / NUMBERS, {"mark": self.mark, "numbers": state.text()})
            older = self._sharded()
            if path.exists():  # the same step again, after a rollback
                shutil.rmtree(path)
            os.replace(temporary, path)
            for old in older:
                if old != path:
                    shutil.rmtree(old, ignore_errors=True)
        self.island.wait()

    def _load_sharded(self, path: Path, state: State) -> None:
        from torch.distributed import checkpoint

        found = read_json(path / NUMBERS)
        self._check(path, found.get("mark"))
        state.numbers = Numbers(**found["numbers"])
        checkpoint.load(dict(state.tensors()), checkpoint_id=path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-").removesuffix(".dcp"))
