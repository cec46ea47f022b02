"""The live table of a launch: one line per part, and the time left for all."""

import time
from collections import Counter
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from atoll.launch.loop import TrackedJob

_COLOURS = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "bold red"}
_COLOURS |= {"stopping": "yellow", "stopped": "yellow"}
_ORDER = ["failed", "running", "stopping", "stopped", "waiting", "done"]  # of what is shown where not all can be
_GAP, _BAR = 2, 16  # characters between columns, and of a progress bar
_AROUND = 4  # lines beside those of the parts: the title, the header, what is left out, the cursor's


class LaunchView:
    """`with LaunchView("glyphs", slots) as view: run_jobs(jobs, place, view.update)`. slots: None in a queue.

    On a terminal a table that repaints itself; elsewhere (a log, CI) a line every ten seconds, and one for each part
    that ends or is started again.
    """

    def __init__(self, title: str, slots: int | None, console: Console | None = None):
        self.title, self.slots = title, slots
        self.console = console or Console(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self.began = time.monotonic()
        self.spoke = float("-inf")
        self.seen: dict[str, tuple[str, int]] = {}
        self.parts: list[TrackedJob] = []

    def __enter__(self) -> "LaunchView":
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()
        elif self.parts:
            self._say(self._summary(self.parts))

    def update(self, parts: list[TrackedJob]) -> None:
        self.parts = parts
        if self.live:
            self.live.update(self.table(parts))
            return
        for part in parts:
            news = (part.state, part.restarts)
            before = self.seen.get(part.job.name, ("waiting", 0))
            if part.state in ("done", "failed", "stopped") and part.state != before[0]:
                self._say(f"{part.job.name} {part.state}" + (f": {part.error}" if part.state == "failed" else ""))
            elif part.restarts > before[1]:
                self._say(f"{part.job.name} is started again: {part.error or 'by its queue'}")
            self.seen[part.job.name] = news
        if time.monotonic() - self.spoke >= 10:
            self.spoke = time.monotonic()
            running = ", ".join(_in_words(part) for part in parts if part.state == "running")
            self._say(f"{self._summary(parts)}; {running or 'none running'}")

    def table(self, parts: list[TrackedJob]) -> Group:
        shown = self._shown(parts)
        heads = ("part", "state", "step", "loss", "images/s", "left", "restarts")
        rows = [_cells(part) for part in shown]
        # Numbers are shown whole; a name is cut, and the bar left out, where there is no room for them.
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        room = self.console.width - sum(width + _GAP for width in widths[1:])
        with_bar = room - widths[0] >= _BAR + _GAP
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
        table.add_column(heads[0], no_wrap=True, overflow="ellipsis", width=max(8, min(widths[0], room)))
        table.add_column(heads[1], no_wrap=True)
        if with_bar:
            table.add_column("", width=_BAR)
        for head, width in zip(heads[2:], widths[2:], strict=True):
            table.add_column(head, justify="right", no_wrap=True, width=width)
        for part, (name, state, *numbers) in zip(shown, rows, strict=True):
            bar = [ProgressBar(total=part.job.steps, completed=_step(part))] if with_bar else []
            table.add_row(name, Text(state, style=_COLOURS[part.state]), *bar, *numbers)
        left_out = Counter(part.state for part in parts) - Counter(part.state for part in shown)
        more = [f"and {', '.join(f'{n} {state}' for state, n in left_out.items())}"] if left_out else []
        errors = [Text(f"{p.job.name}: {p.error}", style=_COLOURS[p.state]) for p in parts if _has_error(p)]
        return Group(Text(self._summary(parts), style="bold"), table, *more, *errors)

    def _shown(self, parts: list[TrackedJob]) -> list[TrackedJob]:
        """All parts in their order; where the terminal is too low, the first in the order of interest."""
        errors = sum(1 + len(p.error) // self.console.width for p in parts if _has_error(p))
        room = max(3, self.console.height - _AROUND - errors)
        if len(parts) <= room:
            return parts
        wanted = sorted(parts, key=lambda part: _ORDER.index(part.state))[:room]
        return [part for part in parts if part in wanted]

    def _summary(self, parts: list[TrackedJob]) -> str:
        done = sum(part.state == "done" for part in parts)
        failed = sum(part.state == "failed" for part in parts)
        words = [f"{done} of {len(parts)} done", *([f"{failed} failed"] if failed else [])]
        left = seconds_left(parts, self.slots)
        words.append(f"{_clock(time.monotonic() - self.began)} gone")
        if left != 0 and not any(part.state in ("stopping", "stopped") for part in parts):
            words.append(f"about {_clock(left)} left" if left else "time left not known yet")
        return f"{self.title}: {', '.join(words)}"

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def _cells(part: TrackedJob) -> list[str]:
    m, new = part.metrics, part.fresh and part.state == "running"
    return [
        part.job.name,
        _state(part),
        f"{_step(part)}/{part.job.steps}",
        f"{m['loss']:.4f}" if m else "",
        f"{m['images_per_s']:.0f}" if new else "",
        _clock(m["eta_s"]) if new else "",
        str(part.restarts) if part.restarts else "",
    ]


def _step(part: TrackedJob) -> int:
    step: int = part.job.steps if part.state == "done" else part.metrics.get("step", 0)
    return step


def _has_error(part: TrackedJob) -> bool:
    """Whether the part failed, or is still to be started again; of one that runs again the count is enough."""
    return bool(part.error) and part.state in ("failed", "waiting")


def _state(part: TrackedJob) -> str:
    """The state, and what can be told of a start that has no step yet, and of an end that is near."""
    if part.state == "waiting" and part.submitted is None and part.restarts:
        return "restarting"
    if part.state != "running":
        return part.state
    if not part.fresh:
        return "starting"
    return "finishing" if part.metrics.get("step") == part.job.steps else "running"


def _in_words(part: TrackedJob) -> str:
    m = part.metrics
    if not part.fresh:
        return f"{part.job.name} starting"
    return f"{part.job.name} {m['step']}/{part.job.steps} loss {m['loss']:.4f} {m['images_per_s']:.0f} images/s"


def seconds_left(parts: list[TrackedJob], slots: int | None) -> float | None:
    """An estimate from the running parts' rates: all images still to come, over the images per second of all slots.

    slots: None: as many as run now. None is returned where nothing is known yet.
    """
    running = [part for part in parts if part.state == "running" and part.fresh]
    waiting = [part for part in parts if part.state == "waiting" or (part.state == "running" and not part.fresh)]
    if not running:
        return None if waiting else 0.0
    rate = sum(part.metrics["images_per_s"] for part in running) / len(running)
    remaining = [float(part.metrics["eta_s"]) for part in running] + [part.job.work / rate for part in waiting]
    slots = slots or sum(part.state == "running" for part in parts)
    value: float | None = max(max(remaining), sum(remaining) / slots)
    return value


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
