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

_COLOURS = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "bold red", "not started": "red"}
_COLOURS |= {"elsewhere": "blue", "stopping": "yellow", "stopped": "yellow"}
_PRIORITY = [
    "failed",
    "not started",
    "running",
    "elsewhere",
    "stopping",
    "stopped",
    "waiting",
    "done",
]  # if not all parts fit on the screen
_LOST = ("failed", "not started")
_GAP, _BAR = 2, 16  # characters: between columns, and the width of a progress bar
_OTHER_LINES = 4  # title, header, the parts left out, the cursor
_LOG_EVERY = 10.0  # seconds, without a terminal


class LaunchView:
    """Shows a launch: `with LaunchView("glyphs", slots) as view: run_jobs(jobs, backend, view.update)`.

    On a terminal it is a table that repaints itself; elsewhere (a log, CI) a line every ten seconds, and one for each
    part that ends or restarts.

    Args:
        title: the run's name.
        slots: jobs at a time; None: the backend has a queue of its own.
        console: where it is shown; None: stderr.
    """

    def __init__(self, title: str, slots: int | None, console: Console | None = None):
        self.title, self.slots = title, slots
        self.console = console or Console(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self.began = time.monotonic()
        self.last_log = float("-inf")
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
        # A log ends with the final counts.
        elif self.parts:
            self._log(self._summary(self.parts))

    def update(self, parts: list[TrackedJob]) -> None:
        """Show the parts as they are now."""
        self.parts = parts
        if self.live:
            self.live.update(self.table(parts))
            return
        # Without a terminal: one line per event, and a summary now and then.
        for part in parts:
            # Compare with the state that was logged last.
            before = self.seen.get(part.job.name, ("waiting", 0))
            if part.state in ("done", *_LOST, "stopped") and part.state != before[0]:
                self._log(f"{part.job.name} {part.state}" + (f": {part.error}" if part.state in _LOST else ""))
            elif part.state == "elsewhere" and part.state != before[0]:
                self._log(f"{part.job.name} is {part.error}")
            elif part.restarts > before[1]:
                self._log(f"{part.job.name} restarts: {part.error or 'requeued'}")
            self.seen[part.job.name] = (part.state, part.restarts)
        if time.monotonic() - self.last_log >= _LOG_EVERY:
            self.last_log = time.monotonic()
            running = ", ".join(_log_text(part) for part in parts if part.state == "running")
            self._log(f"{self._summary(parts)}; {running or 'none running'}")

    def table(self, parts: list[TrackedJob]) -> Group:
        """The summary, a row per part, and the errors; fits the console's width and height."""
        shown = self._shown(parts)
        heads = ("part", "state", "step", "loss", "images/s", "left", "restarts")
        rows = [_cells(part) for part in shown]
        # Numbers are never cut. If the console is narrow, the progress bar is left out and names are cut.
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
        # A finished part has a full bar, whatever its last metrics are.
        for part, (name, state, *numbers) in zip(shown, rows, strict=True):
            bar = [ProgressBar(total=part.job.steps, completed=_step(part))] if with_bar else []
            table.add_row(name, Text(state, style=_COLOURS[part.state]), *bar, *numbers)
        # Below the rows: how many parts are not shown, and the errors.
        left_out = Counter(part.state for part in parts) - Counter(part.state for part in shown)
        more = [f"and {', '.join(f'{n} {state}' for state, n in left_out.items())}"] if left_out else []
        errors = [Text(f"{p.job.name}: {p.error}", style=_COLOURS[p.state]) for p in parts if _has_error(p)]
        return Group(Text(self._summary(parts), style="bold"), table, *more, *errors)

    def _shown(self, parts: list[TrackedJob]) -> list[TrackedJob]:
        """All parts in their order; if the console is too low for all, those of highest priority."""
        # An error may wrap over several lines.
        errors = sum(1 + len(p.error) // self.console.width for p in parts if _has_error(p))
        room = max(3, self.console.height - _OTHER_LINES - errors)
        if len(parts) <= room:
            return parts
        # Choose by priority, but show the chosen ones in the usual order.
        top = sorted(parts, key=lambda part: _PRIORITY.index(part.state))[:room]
        return [part for part in parts if part in top]

    def _summary(self, parts: list[TrackedJob]) -> str:
        done = sum(part.state == "done" for part in parts)
        lost = [(sum(part.state == state for part in parts), state) for state in _LOST]
        elsewhere = sum(part.state == "elsewhere" for part in parts)
        words = [f"{done} of {len(parts)} done", *(f"{number} {state}" for number, state in lost if number)]
        words += [f"{elsewhere} trained by another launch"] if elsewhere else []
        # The estimate is left out once nothing is left, and while the launch stops.
        left = seconds_left(parts, self.slots)
        words.append(f"{_clock(time.monotonic() - self.began)} elapsed")
        if left != 0 and not any(part.state in ("stopping", "stopped") for part in parts):
            words.append(f"about {_clock(left)} left" if left else "time left unknown")
        return f"{self.title}: {', '.join(words)}"

    def _log(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def _cells(part: TrackedJob) -> list[str]:
    # A rate from before a restart says nothing about this start.
    m, has_rate = part.metrics, part.fresh and part.state in ("running", "elsewhere")
    return [
        part.job.name,
        _state(part),
        f"{_step(part)}/{part.job.steps}",
        f"{m['loss']:.4f}" if m else "",
        f"{m['images_per_s']:.0f}" if has_rate else "",
        _clock(m["eta_s"]) if has_rate else "",
        str(part.restarts) if part.restarts else "",
    ]


def _step(part: TrackedJob) -> int:
    step: int = part.job.steps if part.state == "done" else part.metrics.get("step", 0)
    return step


def _has_error(part: TrackedJob) -> bool:
    """Whether to show the part's error: it failed, was not started, waits for its restart, or is trained elsewhere."""
    # Of a part that runs again, the count of restarts is enough.
    return bool(part.error) and part.state in (*_LOST, "waiting", "elsewhere")


def _state(part: TrackedJob) -> str:
    """The state; "running" is refined by the steps: "starting" before the first, "finishing" after the last."""
    # Not submitted, but with restarts: it waits for the next one.
    if part.state == "waiting" and part.handle is None and part.restarts:
        return "restarting"
    if part.state != "running":
        return part.state
    if not part.fresh:
        return "starting"
    return "finishing" if part.metrics.get("step") == part.job.steps else "running"


def _log_text(part: TrackedJob) -> str:
    m = part.metrics
    if not part.fresh:
        return f"{part.job.name} starting"
    return f"{part.job.name} {m['step']}/{part.job.steps} loss {m['loss']:.4f} {m['images_per_s']:.0f} images/s"


def seconds_left(parts: list[TrackedJob], slots: int | None) -> float | None:
    """Estimate the seconds until all parts are done: the images left, over the images per second of all slots.

    Args:
        parts: all parts of the launch.
        slots: jobs at a time; None: as many as run now.

    Returns:
        Seconds; None if no running part has a rate yet.
    """
    # Parts without a rate of their own are assumed to run at the mean rate.
    running = [part for part in parts if part.state == "running" and part.fresh]
    waiting = [part for part in parts if part.state == "waiting" or (part.state == "running" and not part.fresh)]
    # Parts of another launch take none of the slots here, but have to end too.
    elsewhere = [part for part in parts if part.state == "elsewhere"]
    longest = max((float(part.metrics["eta_s"]) for part in elsewhere if part.fresh), default=0.0)
    if not running:
        return None if waiting or not all(part.fresh for part in elsewhere) else longest
    # A waiting part counts all its images, even if it resumes from a checkpoint.
    rate = sum(part.metrics["images_per_s"] for part in running) / len(running)
    remaining = [float(part.metrics["eta_s"]) for part in running] + [part.job.images / rate for part in waiting]
    # The longest part is a lower bound, however many slots there are.
    slots = slots or sum(part.state == "running" for part in parts)
    value: float | None = max(max(remaining), sum(remaining) / slots, longest, _in_sequence(parts, rate, slots))
    return value


def _in_sequence(parts: list[TrackedJob], rate: float, slots: int) -> float:
    """Seconds of a part for which others wait, and then of those others; 0 if none waits. rate: of one slot."""
    begun = {part.job.name: part for part in parts if part.state in ("running", "elsewhere", "waiting")}
    waiting = [part for part in parts if part.state == "waiting" and part.job.after in begun]
    if not waiting:
        return 0.0
    each = [part.job.images / rate for part in waiting]
    first = max(
        float(part.metrics["eta_s"]) if part.fresh and part.state != "waiting" else part.job.images / rate
        for part in (begun[part.job.after] for part in waiting)
    )
    return first + max(max(each), sum(each) / slots)


def _clock(seconds: float | None) -> str:
    """1:05, 2:03:04 or 2d 7:33; "?" for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
