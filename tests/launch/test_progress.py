"""The table and the log of a launch."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from atoll.launch.loop import TrackedJob
from atoll.launch.progress import LaunchView, seconds_left
from tests.launch.stub import job

STEP = {"step": 4, "loss": 0.25, "images_per_s": 10.0, "eta_s": 65.0}


def part(tmp_path, name: str, state: str = "waiting", images: float = 100.0, **more) -> TrackedJob:
    return TrackedJob(job(tmp_path, name, images=images), state, **more)  # type: ignore[arg-type]


def running(tmp_path, name: str, **more) -> TrackedJob:
    return part(tmp_path, name, "running", metrics={**STEP, **more}, fresh=True)


def table(parts: list[TrackedJob], width: int, height: int = 40, slots: int | None = 2) -> list[str]:
    console = Console(record=True, width=width, height=height, file=io.StringIO(), force_terminal=True)
    console.print(LaunchView("glyphs", slots, console).table(parts))
    return console.export_text().splitlines()


def test_time_left_includes_waiting_parts(tmp_path) -> None:
    parts = [running(tmp_path, "a", eta_s=4.0), part(tmp_path, "b")]
    assert seconds_left(parts, slots=1) == 14.0
    assert seconds_left(parts, slots=2) == 10.0  # not less than the longest part takes alone
    assert seconds_left(parts, slots=None) == 14.0  # a queue that holds one now
    assert seconds_left(parts[1:], slots=1) is None
    assert seconds_left([part(tmp_path, "a", "done", metrics=STEP)], slots=1) == 0.0


def test_time_left_adds_what_others_wait_for(tmp_path) -> None:
    common = running(tmp_path, "common", eta_s=30.0)
    after = [TrackedJob(replace(job(tmp_path, name, images=100.0), after="common")) for name in "ab"]
    assert seconds_left([common, *after], slots=2) == 30 + 10
    assert seconds_left([common, *after], slots=1) == 30 + 20
    assert seconds_left([part(tmp_path, "common", "done", metrics=STEP), running(tmp_path, "c"), *after], 3) == 65.0


def test_parts_of_another_launch_are_named_and_take_no_slot(tmp_path) -> None:
    who = "trained by another launch (process 4711 on islet)"
    other = part(tmp_path, "a", "elsewhere", metrics={**STEP, "eta_s": 99.0}, fresh=True, error=who)
    lines = table([other, part(tmp_path, "b", "done", metrics=STEP)], 100)
    assert lines[0].startswith("glyphs: 1 of 2 done, 1 trained by another launch, 0:00 elapsed, about 1:39 left")
    assert lines[-1] == f"a: {who}"
    assert seconds_left([other, running(tmp_path, "b", eta_s=4.0)], slots=1) == 99.0
    assert seconds_left([part(tmp_path, "a", "elsewhere")], slots=1) is None


@pytest.mark.parametrize("width", [80, 100, 160])
def test_table_has_a_row_per_part_with_its_state(tmp_path, width) -> None:
    died = part(tmp_path, "2-flow-linear", restarts=1, error="killed by SIGKILL")
    failed = part(tmp_path, "3-flow-linear", "failed", error="atoll: no shards")
    parts = [
        running(tmp_path, "0-eps-cosine"), part(tmp_path, "1-x0-linear-beta", "running", restarts=2), died, failed,
        part(tmp_path, "router"), part(tmp_path, "monolith", "done", metrics=STEP),
    ]  # fmt: skip
    lines = table(parts, width)
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("glyphs: 1 of 6 done, 1 failed, 0:00 elapsed, about ")
    assert lines[1].split() == ["part", "state", "step", "loss", "images/s", "left", "restarts"]
    cells = [[cell for cell in line.split() if "━" not in cell and "╺" not in cell] for line in lines[2:]]
    assert cells[0] == ["0-eps-cosine", "running", "4/10", "0.2500", "10", "1:05"]
    assert cells[1] == ["1-x0-linear-beta", "starting", "0/10", "2"]
    assert cells[2] == ["2-flow-linear", "restarting", "0/10", "1"]
    assert cells[3] == ["3-flow-linear", "failed", "0/10"]
    assert cells[4] == ["router", "waiting", "0/10"]
    assert cells[5] == ["monolith", "done", "10/10", "0.2500"]
    assert lines[8] == "2-flow-linear: killed by SIGKILL"
    assert lines[9] == "3-flow-linear: atoll: no shards"


@pytest.mark.parametrize("width", [80, 100])
def test_large_numbers_are_never_cut(tmp_path, width) -> None:
    one = running(tmp_path, "12-a-name-that-somebody-chose", step=123456, eta_s=200_000.0)
    one.restarts, one.job = 12, replace(one.job, steps=800_000)
    cells = table([one], width)[2].split()
    assert [cell for cell in cells if "━" not in cell][1:] == [
        "running", "123456/800000", "0.2500", "10", "2d", "7:33", "12",
    ]  # fmt: skip


def test_metrics_from_before_a_restart_show_no_rate(tmp_path) -> None:
    again = part(tmp_path, "a", "running", metrics=STEP)
    assert table([again], 100)[2].split()[:2] == ["a", "starting"]
    assert "1:05" not in "".join(table([again], 100))


def test_low_console_shows_parts_of_highest_priority(tmp_path) -> None:
    parts = [part(tmp_path, f"{n}-done", "done") for n in range(20)]
    parts += [running(tmp_path, f"{n}-run") for n in range(20, 24)]
    parts += [part(tmp_path, f"{n}-wait") for n in range(24, 60)]
    parts += [part(tmp_path, "60-bad", "failed", error="no shards")]
    lines = table(parts, 100, height=20)
    assert len(lines) < 20
    assert [line.split()[0] for line in lines[2:7]] == ["20-run", "21-run", "22-run", "23-run", "24-wait"]
    assert "and 20 done, 26 waiting" in lines
    assert lines[-1] == "60-bad: no shards"


def test_a_part_that_was_not_started_does_not_count_as_failed(tmp_path) -> None:
    text, error = io.StringIO(), "common, from which it starts, failed"
    parts = [part(tmp_path, "common", "failed", error="no shards"), part(tmp_path, "a", "not started", error=error)]
    with LaunchView("glyphs", 1, Console(file=text, width=80)) as view:
        view.update(parts)
    lines = text.getvalue().splitlines()
    assert lines[:2] == ["common failed: no shards", f"a not started: {error}"]
    assert lines[-1].startswith("glyphs: 0 of 2 done, 1 failed, 1 not started, ")
    rows = table(parts, 100)
    assert (rows[3].split()[:3], rows[-1]) == (["a", "not", "started"], f"a: {error}")


def test_without_a_terminal_events_and_summaries_are_logged(tmp_path, monkeypatch) -> None:
    text, now = io.StringIO(), [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    one, two = running(tmp_path, "one"), part(tmp_path, "two")
    with LaunchView("glyphs", 1, Console(file=text, width=60)) as view:
        for _ in range(4):
            now[0] += 4
            view.update([one, two])
        one.state = "done"
        two.state, two.restarts, two.error = "waiting", 1, "killed by SIGSEGV: [red]words"
        view.update([one, two])
        two.state, two.error = "failed", "atoll: no shards"
        view.update([one, two])
    lines = text.getvalue().splitlines()
    assert lines[0].endswith("one 4/10 loss 0.2500 10 images/s")
    assert lines[1].startswith("glyphs: 0 of 2 done, 0:16 elapsed")
    assert lines[2:] == [
        "one done",
        "two restarts: killed by SIGSEGV: [red]words",
        "two failed: atoll: no shards",
        "glyphs: 1 of 2 done, 1 failed, 0:16 elapsed",
    ]


def test_table_repaints_itself_on_a_terminal(tmp_path) -> None:
    text = io.StringIO()
    with LaunchView("glyphs", 2, Console(file=text, force_terminal=True, width=100)) as view:
        view.update([running(tmp_path, "one")])
    assert "4/10" in text.getvalue()
