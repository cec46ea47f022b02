"""Simulate the collective: islands of different speed, hours and luck, each training its experts alone.

The assignment is fixed beforehand, since owners do not communicate: the longest expert first, each to the island that
would finish it first. From then on islands are independent; each draws its failures in the order of its own training
hours. So with the same seed and assignment, an island that is faster or runs more hours a day never finishes later: its
failures come after the same hours of training, and it has trained more at each of them.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from atoll.errors import AtollError

DAY = 24.0  # hours
STUCK = 100_000  # failures of one island after which it counts as making no progress


class IslandSettings(BaseModel):
    """One line of islands.yaml.

    Attributes:
        gpu: a name that `atoll plan` knows; `gpus` of them work as one. Alternatively tflops (bf16, dense) with
            memory_gb.
        failures_per_day: per day of training. A failure loses the training since the last checkpoint, and
            `repair_hours`.
        dropouts_per_day: per day of training. A dropout also costs `replace_days`, until another machine of the kind
            is there, and a new download.
        slowdown: 0.1 makes the island 8 % slower than stated on average, rarely 20 % (a straggler).
        experts: "any", or clusters and full names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    gpu: str | None = None
    tflops: float | None = Field(None, gt=0)
    memory_gb: float | None = Field(None, gt=0)
    gpus: PositiveInt = 1
    mfu: float | None = Field(None, gt=0, le=1)
    hours_per_day: float = Field(24, gt=0, le=24)
    failures_per_day: float = Field(0, ge=0)
    dropouts_per_day: float = Field(0, ge=0)
    repair_hours: float = Field(0.5, ge=0)
    replace_days: float = Field(2, ge=0)
    slowdown: float = Field(0, ge=0, le=1)
    download_mbit: float | None = Field(None, gt=0)  # per second; None: no download
    usd_hour: float | None = Field(None, ge=0)
    experts: Literal["any"] | tuple[str, ...] = "any"

    @field_validator("name", "gpu", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        # A name in quotes and a number in YAML mean the same GPU.
        return str(value) if isinstance(value, int) else value  # YAML reads 4090 as a number

    @field_validator("experts", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        # One expert may be named without a list.
        if isinstance(value, int) or (isinstance(value, str) and value != "any"):
            value = [value]
        return [str(item) for item in value] if isinstance(value, list | tuple) else value


def load_islands(file: Path) -> tuple[IslandSettings, ...]:
    """Read islands.yaml.

    Raises:
        AtollError: the file is missing, is no list of islands, or has an unknown key or a bad value.
    """
    # Parse: a list of islands, perhaps under the key `islands`.
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AtollError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
    if isinstance(content, dict) and list(content) == ["islands"]:
        content = content["islands"]
    if not isinstance(content, list) or not content or not all(isinstance(item, dict) for item in content):
        raise AtollError(f"{file}: expected a list of islands such as `- {{name: anna, gpu: 4090, hours_per_day: 12}}`")
    # Validate each island.
    islands: list[IslandSettings] = []
    for number, item in enumerate(content):
        try:
            island = IslandSettings(**{str(key): value for key, value in item.items()})
        except ValidationError as error:
            raise AtollError(f"{file}: island {item.get('name', number)}: {_problem(error)}") from None
        if (island.gpu is None) == (island.tflops is None) or (island.tflops and not island.memory_gb):
            raise AtollError(f"{file}: island {island.name}: give it either gpu, or tflops and memory_gb")
        islands.append(island)
    # Names must be unique.
    names = [island.name for island in islands]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise AtollError(f"{file}: two islands are called {twice}; rename one")
    return tuple(islands)


def _problem(error: ValidationError) -> str:
    # The first problem is enough: later ones often follow from it.
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}; expected one of {', '.join(IslandSettings.model_fields)}"
    return f"{key}: {first['msg']}"


@dataclass(frozen=True)
class Work:
    """One expert's training.

    Attributes:
        images: steps times batch.
        interval: images between checkpoints.
        download: bytes.
    """

    name: str
    images: float
    interval: float
    download: float = 0.0


@dataclass(frozen=True)
class SimulatedIsland:
    """An island of the simulation. images_per_s: by expert, only those that it can and may train."""

    settings: IslandSettings
    images_per_s: Mapping[str, float]

    def download_hours(self, work: Work) -> float:
        # Without a stated bandwidth, downloads are not counted.
        rate = self.settings.download_mbit
        return 0.0 if rate is None else work.download * 8 / (rate * 1e6) / 3600

    def running_hours(self, work: Work) -> float:
        """Hours of the machine for one expert if nothing happens."""
        return work.images / self.images_per_s[work.name] / 3600 + self.download_hours(work)

    def calendar_hours(self, running: float) -> float:
        """Calendar hours of `running` machine hours; the machine runs the first hours_per_day of every day."""
        # The machine is off for the rest of each day, except the last one.
        per_day = self.settings.hours_per_day
        nights = max(0, math.ceil(running / per_day) - 1)
        return running + nights * (DAY - per_day)


WorkAssignment = dict[str, tuple[Work, ...]]  # by island, in the order of training


def assign(works: Sequence[Work], islands: Sequence[SimulatedIsland]) -> WorkAssignment:
    """Assign the longest expert first, each to the island that would finish it first.

    Raises:
        AtollError: an expert that no island can or may train.
    """
    # Machine hours assigned to each island so far, and its queue.
    load = {island.settings.name: 0.0 for island in islands}
    queue: dict[str, list[Work]] = {name: [] for name in load}

    # Sort by the time on the fastest island, longest first.
    def longest_first(work: Work) -> tuple[float, str]:
        able = [island for island in islands if work.name in island.images_per_s]
        if not able:
            raise AtollError(
                f"no island for expert {work.name}: none may train it and has the memory; add one to the file"
            )
        return -min(island.running_hours(work) for island in able), work.name

    for work in sorted(works, key=longest_first):
        able = [island for island in islands if work.name in island.images_per_s]
        # The island that would finish it first, nights included.
        best = min(
            able,
            key=lambda i: (i.calendar_hours(load[i.settings.name] + i.running_hours(work)), i.settings.name),
        )
        load[best.settings.name] += best.running_hours(work)
        queue[best.settings.name].append(work)
    return {name: tuple(works) for name, works in queue.items()}


@dataclass(frozen=True)
class Outcome:
    """The result of one island.

    Attributes:
        days: calendar days.
        hours: machine hours.
        trained: images, including those lost.
        lost: images trained and lost in failures.
    """

    days: float
    hours: float
    trained: float
    lost: float
    failures: int
    dropouts: int


def run_island(island: SimulatedIsland, works: Sequence[Work], chance: random.Random) -> Outcome:
    """Simulate one island that trains its experts one after the other.

    Raises:
        AtollError: failures come so often that no checkpoint is reached.
    """
    # Draw the island's luck: its speed, and its first failure.
    s = island.settings
    # Failures and dropouts are one Poisson process; each event is assigned a kind afterwards.
    rate = s.failures_per_day + s.dropouts_per_day  # per DAY hours of training
    speed = 1 / (1 + s.slowdown * abs(chance.gauss(0, 1)))
    next_failure = chance.expovariate(rate) * DAY if rate else float("inf")  # in hours of training from the start
    clock = hours = away = trained = lost = 0.0  # clock: hours of training
    failures = dropouts = 0
    for work in works:
        # A slow island trains fewer images an hour.
        per_hour = island.images_per_s[work.name] * speed * 3600
        hours += island.download_hours(work)
        done = 0.0
        # Failures before the expert is finished: fall back to the last checkpoint, repair or replace, go on.
        while clock + (work.images - done) / per_hour > next_failure:
            # Train up to the failure, then fall back to the last checkpoint.
            progress = (next_failure - clock) * per_hour
            done, trained, hours = done + progress, trained + progress, hours + next_failure - clock
            saved = done // work.interval * work.interval
            lost, done, clock = lost + done - saved, saved, next_failure
            # Which of the two was it?
            if chance.random() * rate < s.dropouts_per_day:
                dropouts, away = dropouts + 1, away + s.replace_days * DAY
                hours += island.download_hours(work)
            else:
                failures, hours = failures + 1, hours + s.repair_hours
            next_failure = clock + chance.expovariate(rate) * DAY
            if failures + dropouts > STUCK:
                raise AtollError(
                    f"island {s.name}: {rate:g} failures a day, no progress with {work.name}; save more often "
                    "(train.checkpoint_every)"
                )
        # The rest of the expert, undisturbed.
        rest = work.images - done
        clock, hours, trained = clock + rest / per_hour, hours + rest / per_hour, trained + rest
    # The wait for a replacement is calendar time, also outside the machine's hours.
    days = (island.calendar_hours(hours) + away) / DAY if works else 0.0
    return Outcome(days, hours, trained, lost, failures, dropouts)


@dataclass(frozen=True)
class Simulation:
    """The summary of many trials.

    Attributes:
        median_days, p90_days: calendar days until the last island finishes.
        idle: fraction of the islands' hours, up to the end, in which they have no more work or wait for a replacement.
        lost: fraction of the training that is done twice.
        failures, dropouts: per trial.
        hours: mean machine hours of each island.
        days: median calendar days until each island finishes.
        decides: how often each island is the last.
    """

    trials: int
    seed: int
    median_days: float
    p90_days: float
    idle: float
    lost: float
    failures: float
    dropouts: float
    hours: dict[str, float]
    days: dict[str, float]
    decides: dict[str, float]
    assignment: dict[str, tuple[str, ...]]


def simulate(
    works: Sequence[Work],
    islands: Sequence[SimulatedIsland],
    trials: int = 1000,
    seed: int = 0,
    assignment: WorkAssignment | None = None,
) -> Simulation:
    """Simulate the collective `trials` times. The result depends on the arguments only.

    Args:
        assignment: the experts of each island, in order; None: that of `assign`.

    Raises:
        AtollError: an expert without an island, or an island without progress.
    """
    # A fixed assignment makes two simulations comparable.
    assignment = assignment or assign(works, islands)
    names = [island.settings.name for island in islands]
    # One random generator for each island and trial: what one island draws does not change another's luck.
    runs = [
        [run_island(i, assignment[i.settings.name], random.Random(f"{seed}/{t}/{i.settings.name}")) for i in islands]
        for t in range(trials)
    ]
    # The last island decides when a trial ends.
    ends = [max(outcome.days for outcome in run) for run in runs]
    last = [names[max(range(len(run)), key=lambda i, run=run: run[i].days)] for run in runs]  # type: ignore[misc]
    # Hours that the islands offer up to the end, and hours that they use.
    per_day = [island.settings.hours_per_day for island in islands]
    offered = [sum(end * hours for hours in per_day) for end in ends]
    used = [sum(outcome.hours for outcome in run) for run in runs]
    every = [outcome for run in runs for outcome in run]
    # Medians and means over the trials.
    return Simulation(
        trials=trials,
        seed=seed,
        median_days=quantile(ends, 0.5),
        p90_days=quantile(ends, 0.9),
        idle=max(0.0, 1 - sum(used) / sum(offered)),
        lost=sum(outcome.lost for outcome in every) / sum(outcome.trained for outcome in every),
        failures=sum(outcome.failures for outcome in every) / trials,
        dropouts=sum(outcome.dropouts for outcome in every) / trials,
        hours={name: sum(run[i].hours for run in runs) / trials for i, name in enumerate(names)},
        days={name: quantile([run[i].days for run in runs], 0.5) for i, name in enumerate(names)},
        decides={name: last.count(name) / trials for name in names if name in last},
        assignment={name: tuple(work.name for work in works) for name, works in assignment.items()},
    )


def quantile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that at least this fraction of them does not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * fraction) - 1)]
