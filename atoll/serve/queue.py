"""Who is served at a tick: users share the machine equally, and short jobs come first among equals.

Each user has a virtual time: the image evaluations it received, divided by 2^priority (start-time fair queueing, Goyal
et al. 1996). The queue's own virtual time advances by what an average user receives; a user who comes, or comes back,
starts there, so waiting earns nothing and nobody who comes anew is ahead of those who wait. Virtual times are compared
in steps of `slack`: within a step, units whose experts are on the device come first, then earlier deadlines, then jobs
with the least left to do, which ends most jobs soonest.

Images under different options (`EngineJob.options`) share no evaluation, so a tick takes as long as it has options. If
there are several users, each adds at most one to a tick: otherwise one user with as many routings as images would take
almost all of the time.
"""

import math
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass

from atoll.serve.unit import EngineJob, Unit


@dataclass
class _User:
    """Attributes: virtual_time: what it received. units: its units in the queue."""

    virtual_time: float
    units: int = 0


class FairQueue:
    """Units that wait or run. For one thread.

    Args:
        slack: the image evaluations that a user may be ahead before others come first.
    """

    def __init__(self, slack: float):
        self.slack = slack
        self._units: dict[Unit, None] = {}  # in the order of arrival
        self._users: dict[str, _User] = {}
        self._virtual_time = 0.0

    def __len__(self) -> int:
        return len(self._units)

    def __iter__(self) -> Iterator[Unit]:
        return iter(self._units)

    def add(self, job: EngineJob) -> None:
        """Add all units of a job."""
        user = self._users.setdefault(job.user, _User(self._virtual_time))
        user.units += len(job.units)
        self._units |= dict.fromkeys(job.units)

    def remove(self, unit: Unit) -> None:
        """Remove a unit that is finished or given up; nothing if it is not there."""
        if unit not in self._units:
            return
        del self._units[unit]
        # A user without units is forgotten: the next one starts at the queue's virtual time.
        user = self._users[unit.job.user]
        user.units -= 1
        if not user.units:
            del self._users[unit.job.user]

    def select(self, images: int, resident: Collection[int] | None = None) -> list[Unit]:
        """Return the units of the next tick, and charge their users for one evaluation of each image.

        Args:
            images: as many images at most; at least one unit is returned, if there is any.
            resident: the experts that are on the device; None: all are.
        """

        # The order of service.
        def rank(unit: Unit) -> tuple[float, bool, float, int, int]:
            job = unit.job
            ahead = self._users[job.user].virtual_time - self._virtual_time
            absent = resident is not None and unit.experts is not None and not unit.experts.issubset(resident)
            deadline = math.inf if job.deadline is None else job.deadline
            return math.floor(ahead / self.slack), absent, deadline, job.evaluations_left, job.arrival

        # Fill the batch; a smaller unit may still fit where a larger one does not.
        selected, free, several = list[Unit](), images, len(self._users) > 1
        added_by: dict[Hashable, str] = {}  # the user who added these options to the tick
        for unit in sorted(self._units, key=rank):
            options, user = unit.job.options, unit.job.user
            if several and options not in added_by and user in added_by.values():
                continue
            if len(unit) <= free or not selected:
                selected.append(unit)
                free -= len(unit)
                added_by.setdefault(options, user)
            if free <= 0:
                break

        # Charge.
        for unit in selected:
            self._users[unit.job.user].virtual_time += len(unit) / 2.0**unit.job.handle.request.priority
        if selected:
            self._virtual_time += sum(map(len, selected)) / len(self._users)
        return selected
