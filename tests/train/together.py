"""One of the processes of an island under test; it runs several trainings in turn.

RANK and WORLD_SIZE are set; the argument is a JSON list of trainings, see `Training`.
"""

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import atoll.train.expert
from atoll.manifest import load_manifest
from atoll.train.expert import train_expert
from tests.waiting import run_ranks


@dataclass
class Training:
    """run: its directory. stop: the step at which the processes die without saving. poison: batches with a NaN loss."""

    run: str
    stop: int = 0
    resume: bool = False
    poison: tuple[int, ...] = ()
    port: int = 0


class Stop(Exception):
    pass


def take_part(training: Training) -> None:
    os.environ["MASTER_PORT"] = str(training.port)
    batch, losses = atoll.train.denoiser.Denoising.batch, atoll.train.denoiser.Denoising.losses

    def poisoned(self, index, rows):
        print(f"{Path(training.run).name}: batch {index}")  # whoever waits for the ranks sees that they move
        if training.stop and index >= training.stop:
            raise Stop
        factor = float("nan") if index in training.poison else 1.0
        return {**batch(self, index, rows), "factor": torch.full((rows.stop - rows.start,), factor)}

    atoll.train.denoiser.Denoising.batch = poisoned
    atoll.train.denoiser.Denoising.losses = lambda self, module, part: losses(self, module, part) * part["factor"]
    try:
        train_expert(Path(training.run), load_manifest(Path(training.run)), "1", resume=training.resume)
    except Stop:
        pass
    finally:
        atoll.train.denoiser.Denoising.batch, atoll.train.denoiser.Denoising.losses = batch, losses


def start(trainings: list[Training], count: int = 2) -> None:
    """Run the trainings in `count` processes. Raises AssertionError with what each rank wrote if one failed."""
    from torch.distributed import TCPStore

    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in trainings]
    for training, store in zip(trainings, stores, strict=True):
        training.port = store.port
    where = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(count)}
    command = [sys.executable, "-u", "-m", "tests.train.together", json.dumps([asdict(t) for t in trainings])]
    environments = [
        {**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        for rank in range(count)
    ]
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(command, environments, Path(folder), cwd=Path(__file__).parents[2])


if __name__ == "__main__":
    for item in json.loads(sys.argv[1]):
        take_part(Training(**item))
    os._exit(0)
