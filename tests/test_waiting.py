"""The tests' own waits: slow is no failure, silence is one, and a failure shows what the processes wrote."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import waiting
from tests.waiting import Heartbeat, communicate, run_ranks, run_to_end, wait_until

HANG = "print('before the silence', flush=True); import time; time.sleep(3600)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: `clock[0] += seconds`."""
    now = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    return now


def test_whatever_moves_may_take_any_time(clock) -> None:
    steps = [0]
    heartbeat = Heartbeat(lambda: steps[0])
    for _ in range(10):
        clock[0] += waiting.SILENCE - 1
        steps[0] += 1
        assert not heartbeat.stopped()
    clock[0] += waiting.SILENCE + 1
    assert heartbeat.stopped()


def test_a_wait_without_progress_fails(clock) -> None:
    def never() -> bool:
        clock[0] += 100
        return False

    with pytest.raises(AssertionError, match="no progress for 900 s; the last was 'step 3'"):
        wait_until(never, progress=lambda: "step 3")


def test_a_wait_for_a_process_that_ended_fails_with_its_output() -> None:
    process = subprocess.Popen(python("print('no data')"), stdout=subprocess.PIPE, text=True)
    with pytest.raises(AssertionError, match=r"process ended with 0: .*no data"):
        wait_until(lambda: False, process=process)


def test_a_process_that_ends_returns_all_its_output() -> None:
    done = run_to_end(python("import sys; print('out' * 50_000); sys.exit('err')"))
    assert (done.returncode, done.stdout, done.stderr) == (1, "out" * 50_000 + "\n", "err\n")


def test_a_silent_process_is_killed_and_its_output_shown(clock) -> None:
    process = subprocess.Popen(python(HANG), stdout=subprocess.PIPE, text=True)

    def progress() -> None:
        clock[0] += 200

    with pytest.raises(AssertionError, match=r"for 900 s; it wrote .*before the silence"):
        communicate(process, progress)
    assert process.wait() == -9


def test_ranks_that_end_with_0_are_no_failure(tmp_path) -> None:
    run_ranks(python("print('done')"), [dict(os.environ)] * 2, tmp_path)
    assert [log.read_text() for log in sorted(tmp_path.iterdir())] == ["done\n", "done\n"]


def test_a_rank_that_fails_ends_the_others_and_shows_what_all_wrote(tmp_path) -> None:
    code = f"import os, sys\nif os.environ['RANK'] == '1': sys.exit('no latents')\n{HANG}"
    environments = [{**os.environ, "RANK": rank} for rank in "01"]
    with pytest.raises(AssertionError, match=r"(?s)^a rank failed\n--- rank 0 ended with -9.*no latents"):
        run_ranks(python(code), environments, tmp_path)


def test_silent_ranks_are_killed_and_what_they_wrote_is_shown(monkeypatch, tmp_path) -> None:
    now = [0.0]

    def monotonic() -> float:
        """Stands still until both have written, then runs."""
        logs: list[Path] = list(tmp_path.glob("rank-*.log"))
        now[0] += 300 * (sum("silence" in log.read_text() for log in logs) == 2)
        return now[0]

    monkeypatch.setattr(waiting.time, "monotonic", monotonic)
    expected = r"(?s)no rank wrote anything for 900 s\n--- rank 0 .*before the silence.*rank 1 .*before the silence"
    with pytest.raises(AssertionError, match=expected):
        run_ranks(python(HANG), [dict(os.environ)] * 2, tmp_path)


def test_no_test_has_a_deadline_of_its_own() -> None:
    clock = re.compile(r"\btimeout=\d|\b(monotonic|perf_counter|time)\(\) *[-<>+]|\.(wait|join)\(\d")
    here = {"waiting.py", Path(__file__).name}
    files = [file for file in Path(__file__).parent.rglob("*.py") if file.name not in here]
    assert [file.name for file in files if clock.search(file.read_text())] == []
