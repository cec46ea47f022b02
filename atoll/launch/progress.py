"""The live table of a launch: one line per training, and the time left for all."""

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from atoll.launch.local import Job

_COLOURS = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "bold red"}


class LaunchView:
    """`with LaunchView("training", slots) as view: run_jobs(jobs, slots, view.update)`.

    On a terminal a table that repaints itself; elsewhere (a log, CI) a line every ten seconds.
    """

    def __init__(self, title: str, slots: int, console: Console | None = None):
        self.title, self.slots = title, slots
        self.console = console or Console(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self.began = time.monotonic()
        self.spoke = float("-inf")

    def __enter__(self) -> "LaunchView":
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def update(self, jobs: list[Job]) -> None:
        if self.live:
            self.live.update(self.table(jobs))
            return
        now = time.monotonic()
        if now - self.spoke >= 10 or all(job.state in ("done", "failed") for job in jobs):
            self.spoke = now
            running = ", ".join(_in_words(job) for job in jobs if job.state == "running")
            finished = sum(job.state == "done" for job in jobs)
            self.console.print(
                f"{self.title}: {finished}/{len(jobs)} done; {running or 'none running'}; "
                f"{_clock(seconds_left(jobs, self.slots))} left",
                highlight=False,
                soft_wrap=True,
            )

    def table(self, jobs: list[Job]) -> Group:
        table = Table(box=None, pad_edge=False)
        for name, align in (("training", "left"), ("", "left"), ("step", "right"), ("loss", "right")):
            table.add_column(name, justify=align)  # type: ignore[arg-type]
        for name in ("images/s", "left"):
            table.add_column(name, justify="right")
        for job in jobs:
            m = job.metrics
            step = job.steps if job.state == "done" else m.get("step", 0)
            table.add_row(
                Text(f"{job.name} ({job.state})", style=_COLOURS[job.state]),
                ProgressBar(total=job.steps, completed=step, width=24),
                f"{step}/{job.steps}",
                f"{m['loss']:.4f}" if m else "",
                f"{m['images_per_s']:.0f}" if m and job.state == "running" else "",
                _clock(m["eta_s"]) if m and job.state == "running" else "",
            )
        elapsed = _clock(time.monotonic() - self.began)
        left = _clock(seconds_left(jobs, self.slots))
        return Group(Text(f"{self.title}: {elapsed} gone, {left} left", style="bold"), table)


def _in_words(job: Job) -> str:
    m = job.metrics
    if not m:
        return f"{job.name} starting"
    return f"{job.name} {m['step']}/{job.steps} loss {m['loss']:.4f} {m['images_per_s']:.0f} images/s"


def seconds_left(jobs: list[Job], slots: int) -> float | None:
    """An estimate from the running jobs' rates: all images still to come, over the images per second of all slots."""
    running = [job for job in jobs if job.state == "running" and job.metrics]
    if not running:
        return None if any(job.state == "waiting" for job in jobs) else 0.0
    rate = sum(job.metrics["images_per_s"] for job in running) / len(running)
    waiting = sum(job.work for job in jobs if job.state == "waiting") / rate
    remaining = [float(job.metrics["eta_s"]) for job in running]
    return max(max(remaining), (sum(remaining) + waiting) / slots)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
