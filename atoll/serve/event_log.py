"""The events of one job, for any number of readers, each from where it stopped, in bounded memory."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoggedEvent:
    """An event: its number, from 1; its name; its JSON."""

    id: int
    name: str
    data: str


class EventLog:
    """Events in order; for one event loop.

    Only the newest progress is stored, and of the previews the newest ones: a slow reader misses what is out of date,
    and nothing waits for it. All other events stay.

    Args:
        preview_bytes: size of the previews.

    Attributes:
        closed: whether the last event is there.
        last_id: the number of the newest event.
    """

    def __init__(self, preview_bytes: int):
        self._preview_limit, self._preview_bytes = preview_bytes, 0
        self._events: list[LoggedEvent] = []
        self._changed = asyncio.Event()
        self.closed = False
        self.last_id = 0

    @property
    def bytes(self) -> int:
        """The size of all events."""
        return sum(len(event.data) for event in self._events)

    def append(self, name: str, data: dict[str, Any], last: bool = False) -> None:
        """Add an event, and wake the readers. last: there are no more."""
        assert not self.closed
        self.last_id += 1
        event = LoggedEvent(self.last_id, name, json.dumps(data, allow_nan=False, separators=(",", ":")))
        if name == "progress":
            self._events = [other for other in self._events if other.name != "progress"]
        self._events.append(event)
        if name == "preview":
            self._preview_bytes += len(event.data)
            self._drop_previews()
        self.closed = last
        # Each reader waits for the event that was current when it last looked.
        self._changed.set()
        self._changed = asyncio.Event()

    def _drop_previews(self) -> None:
        """Drop the oldest previews until the others fit; the newest one stays in any case."""
        for event in [event for event in self._events if event.name == "preview"][:-1]:
            if self._preview_bytes <= self._preview_limit:
                return
            self._events.remove(event)
            self._preview_bytes -= len(event.data)

    async def follow(self, after: int = 0) -> AsyncIterator[LoggedEvent]:
        """Yield the events with numbers above `after`, those to come too, until the last one."""
        while True:
            changed = self._changed
            for event in [event for event in self._events if event.id > after]:
                after = event.id
                yield event
            if self.closed and after >= self.last_id:
                return
            await changed.wait()
