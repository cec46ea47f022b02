"""A job's process: it has its lock, ends with whoever started it, and is read from the end of its files."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from atoll.launch.job import (
    ExitStatus,
    Process,
    ask_to_stop,
    attend,
    clear_stop,
    jobs_of,
    last_metrics,
    last_words,
    starts_of,
)
from atoll.manifest import load_manifest
from tests.launch.stub import UNTIL_STOPPED, job
from tests.waiting import SILENCE, wait_until

_STARTER = """
import pathlib, sys, time
from atoll.launch.job import Process
from tests.launch.stub import job
code = "import os, time; print(os.getpid(), flush=True); time.sleep(3600)"
process = Process(job(pathlib.Path(sys.argv[1]), "a", code))
time.sleep(3600)
"""


def wait(process: Process) -> ExitStatus:
    wait_until(lambda: process.poll() is not None)
    return process.poll()


def until(said: Path, words: str) -> None:
    wait_until(lambda: words in (said.read_text() if said.exists() else ""))


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_every_part_is_a_job_the_longest_first(run, manifest) -> None:
    jobs = jobs_of(run, manifest)
    assert {j.name for j in jobs} == {"0-eps-cosine", "1-flow-linear", "2-x0-linear-beta", "router", "monolith"}
    assert [j.work for j in jobs] == sorted((j.work for j in jobs), reverse=True)
    assert all("--resume" in j.arguments and "--nproc" not in j.arguments for j in jobs)
    assert {str(j.result.parent.relative_to(run)) for j in jobs} >= {"experts/0-eps-cosine", "router", "monolith"}


def test_the_students_training_is_a_job_where_it_is_asked_for(run) -> None:
    text = (run / "atoll.yaml").read_text()
    objective = "{prediction: flow, schedule: linear}"
    (run / "atoll.yaml").write_text(f"{text}\nstudent: {{objective: {objective}, train: {{steps: 5, batch: 4}}}}\n")
    manifest = load_manifest(run)
    assert "student" not in [job.name for job in jobs_of(run, manifest)]
    (job,) = [job for job in jobs_of(run, manifest, gpus=4, student=True) if job.name == "student"]
    assert job.arguments == ("-m", "atoll", "distil", "--run", str(run.resolve()), "--resume", "--quiet")
    assert (job.steps, job.work, job.gpus) == (5, 20, 1)  # it has no --nproc
    assert job.result == run.resolve() / "student" / "card.json"


def test_gpus_are_of_parts_that_may_use_them(run) -> None:
    text = (run / "atoll.yaml").read_text().replace("router:", "router:\n  train: {device: cpu}")
    (run / "atoll.yaml").write_text(text)
    jobs = {j.name: j for j in jobs_of(run, load_manifest(run), gpus=4)}
    assert jobs["router"].gpus == 0
    assert jobs["0-eps-cosine"].gpus == 4
    assert jobs["0-eps-cosine"].arguments[-2:] == ("--nproc", "4")
    assert "--nproc" not in jobs["router"].arguments


def test_a_job_says_how_it_ended(tmp_path) -> None:
    assert wait(Process(job(tmp_path, "good", "print('all well')"))) == ExitStatus(0, "all well")
    assert wait(Process(job(tmp_path, "bad", "import sys; sys.exit('atoll: no data')"))) == ExitStatus(
        1, "atoll: no data"
    )
    assert wait(Process(job(tmp_path, "dead", "import os; os.kill(os.getpid(), 9)"))) == ExitStatus(-9, "")


def test_what_a_job_said_before_it_was_restarted_is_kept(tmp_path) -> None:
    for said in ("first", "second", "third"):
        assert wait(Process(job(tmp_path, "a", f"print('{said}')"))).words == said
    assert (tmp_path / "a" / "output-before.log").read_text() == "second\n"


def test_threads_and_environment_are_the_jobs_own(tmp_path) -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'])"
    assert wait(Process(job(tmp_path, "a", code), {"CUDA_VISIBLE_DEVICES": "3"})).words == "1 3"


def test_what_is_sent_to_the_launch_is_not_sent_to_its_jobs(tmp_path) -> None:
    code = "import os; print(os.getsid(0) == os.getpgid(0) == os.getpid())"
    assert wait(Process(job(tmp_path, "a", code))).words == "True"


def test_a_killed_launch_leaves_no_process_behind(tmp_path) -> None:
    starter = subprocess.Popen([sys.executable, "-c", _STARTER, str(tmp_path)])
    said = tmp_path / "a" / "output.log"
    until(said, "\n")
    child = int(said.read_text())
    assert alive(child)
    starter.kill()
    starter.wait()
    wait_until(lambda: not alive(child))


def test_two_launches_do_not_train_the_same_part(tmp_path) -> None:
    mine = job(tmp_path, "a", UNTIL_STOPPED)
    first = Process(mine)
    until(tmp_path / "a" / "output.log", "ready")
    second = Process(mine)
    ended = second.poll()
    assert ended is not None
    assert ended.code == 2
    assert "another process" in ended.words
    second.stop()  # not the other's process
    assert first.poll() is None
    first.stop()
    assert wait(first) == ExitStatus(0, "saved")
    another = Process(mine)
    until(tmp_path / "a" / "output.log", "ready")
    threading.Timer(0.1, another.stop).start()
    third = Process(mine, patience=SILENCE)  # it waits until the other has ended
    assert (tmp_path / "a" / "output-before.log").read_text() == "ready\nsaved\n"
    assert third.poll() is None
    until(tmp_path / "a" / "output.log", "ready")
    third.stop()
    third.wait()
    assert wait(third) == ExitStatus(0, "saved")


def test_who_attends_a_job_counts_its_start_and_hears_that_it_shall_stop(tmp_path) -> None:
    mine = job(tmp_path, "a", UNTIL_STOPPED)

    def rest(seconds: float) -> None:
        until(tmp_path / "a" / "output.log", "ready")
        ask_to_stop(mine)
        time.sleep(0.02)

    assert starts_of(mine, "one") == 0
    assert attend(Process(mine), "one", rest) == ExitStatus(0, "saved")
    clear_stop(mine)
    assert attend(Process(mine), "one", rest) == ExitStatus(0, "saved")
    assert (starts_of(mine, "one"), starts_of(mine, "on")) == (2, 0)


def test_the_last_step_is_read_past_what_is_cut_or_tells_of_something_else(tmp_path) -> None:
    mine = job(tmp_path, "a")
    assert last_metrics(mine) == {}
    mine.directory.mkdir()
    step = {"step": 2, "loss": 1.5, "images_per_s": 9.0, "eta_s": 1.0}
    lines = [json.dumps({**step, "step": 1}), json.dumps(step), "7", '{"step": 2, "val": {}}', '{"step": 3, "lo']
    (mine.directory / "metrics.jsonl").write_text("\n".join(lines))
    assert last_metrics(mine) == step
    (mine.directory / "metrics.jsonl").write_text(f"{lines[0]}\n" * 1000 + lines[1] + "\n")
    assert last_metrics(mine) == step


@given(st.binary(max_size=200))
def test_whatever_stands_in_the_files_is_no_error(tmp_path_factory, content) -> None:
    mine = job(tmp_path_factory.mktemp("foreign"), "a")
    mine.directory.mkdir()
    (mine.directory / "metrics.jsonl").write_bytes(content)
    (mine.directory / "output.log").write_bytes(content)
    assert isinstance(last_metrics(mine), dict)
    assert "\n" not in last_words(mine)
    assert os.path.exists(mine.directory / "output.log")
