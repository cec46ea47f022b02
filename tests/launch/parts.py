"""A real training, small enough for a test and long enough to be killed in the middle."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from atoll.launch.job import Job, jobs_of
from atoll.launch.loop import TrackedJob
from atoll.manifest import load_manifest
from tests.conftest import write_run

NAME = "0-eps-cosine"
ENOUGH = 24  # steps, after which there are checkpoints


def long_run(path: Path) -> Path:
    write_run(path)
    text = (path / "atoll.yaml").read_text()
    (path / "atoll.yaml").write_text(text.replace("steps: 8", "steps: 300"))
    return path


def part_of(run: Path) -> Job:
    return next(job for job in jobs_of(run, load_manifest(run)) if job.name == NAME)


def weights(run: Path) -> dict[str, bytes]:
    tensors = load_file(run / "experts" / NAME / "weights.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


class Once:
    """An `update` for `run_jobs` that calls `act` on the first part once, in the middle of its training."""

    def __init__(self, act) -> None:  # type: ignore[no-untyped-def]
        self.act, self.at = act, 0
        self.after: list[int] = []  # the steps seen after that

    def __call__(self, parts: list[TrackedJob]) -> None:
        part = parts[0]
        step = part.metrics.get("step", 0)
        if not self.at and part.fresh and step >= ENOUGH:
            self.at = step
            self.act(part)
        elif self.at and part.fresh and part.restarts:
            self.after.append(step)

    def resumed(self) -> bool:
        """Whether the part resumed from a checkpoint near the step at which it was stopped, not from the start."""
        return bool(self.after) and min(self.after) >= self.at - 6


@pytest.fixture(scope="session")
def whole_weights(tmp_path_factory) -> dict[str, bytes]:
    """The weights of a training that was never interrupted."""
    from atoll.train.expert import train_expert

    run = long_run(tmp_path_factory.mktemp("whole") / "run")
    train_expert(run, load_manifest(run), NAME)
    return weights(run)
