"""A job's process: it holds its lock and ends with its parent; its state is read from the end of its files."""

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
    clear_stop_request,
    count_starts,
    jobs_of,
    last_metrics,
    last_output_line,
    request_stop,
    supervise,
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


def wait_for(output: Path, words: str) -> None:
    wait_until(lambda: words in (output.read_text() if output.exists() else ""))


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_every_part_becomes_a_job_longest_first(run, manifest) -> None:
    jobs = jobs_of(run, manifest)
    assert {j.name for j in jobs} == {"0-eps-cosine", "1-flow-linear", "2-x0-linear-beta", "router", "monolith"}
    assert [j.images for j in jobs] == sorted((j.images for j in jobs), reverse=True)
    assert all("--resume" in j.arguments and "--nproc" not in j.arguments for j in jobs)
    assert {str(j.result.parent.relative_to(run)) for j in jobs} >= {"experts/0-eps-cosine", "router", "monolith"}


def test_student_job_is_included_on_request(run) -> None:
    text = (run / "atoll.yaml").read_text()
    objective = "{prediction: flow, schedule: linear}"
    (run / "atoll.yaml").write_text(f"{text}\nstudent: {{objective: {objective}, train: {{steps: 5, batch: 4}}}}\n")
    manifest = load_manifest(run)
    assert "student" not in [job.name for job in jobs_of(run, manifest)]
    (job,) = [job for job in jobs_of(run, manifest, gpus=4, student=True) if job.name == "student"]
    assert job.arguments == ("-m", "atoll", "distil", "--run", str(run.resolve()), "--resume", "--quiet")
    assert (job.steps, job.images, job.gpus) == (5, 20, 1)  # it has no --nproc
    assert job.result == run.resolve() / "student" / "card.json"


def test_the_common_model_is_first_and_its_experts_come_after_it(run) -> None:
    common = "common: {objective: {prediction: flow, schedule: linear}, train: {steps: 2}}"
    text = (run / "atoll.yaml").read_text().replace("steps: 8", "steps: 8\n  init: common")
    (run / "atoll.yaml").write_text(f"{text}\n{common}\n")
    jobs = jobs_of(run, load_manifest(run))
    assert (jobs[0].name, jobs[0].images) == ("common", 12)  # though it is the shortest
    assert jobs[0].arguments[2:4] == ("train", "common")
    assert jobs[0].result == run.resolve() / "common" / "card.json"
    after = {j.name: j.after for j in jobs}
    experts = dict.fromkeys(("0-eps-cosine", "1-flow-linear", "2-x0-linear-beta"), "common")
    assert after == {**experts, "common": "", "router": "", "monolith": ""}


def test_only_parts_that_may_use_gpus_get_them(run) -> None:
    text = (run / "atoll.yaml").read_text().replace("router:", "router:\n  train: {device: cpu}")
    (run / "atoll.yaml").write_text(text)
    jobs = {j.name: j for j in jobs_of(run, load_manifest(run), gpus=4)}
    assert jobs["router"].gpus == 0
    assert jobs["0-eps-cosine"].gpus == 4
    assert jobs["0-eps-cosine"].arguments[-2:] == ("--nproc", "4")
    assert "--nproc" not in jobs["router"].arguments


def test_exit_status_has_code_and_last_line(tmp_path) -> None:
    assert wait(Process(job(tmp_path, "good", "print('all well')"))) == ExitStatus(0, "all well")
    assert wait(Process(job(tmp_path, "bad", "import sys; sys.exit('atoll: no data')"))) == ExitStatus(
        1, "atoll: no data"
    )
    assert wait(Process(job(tmp_path, "dead", "import os; os.kill(os.getpid(), 9)"))) == ExitStatus(-9, "")


def test_output_of_the_previous_start_is_kept(tmp_path) -> None:
    for output in ("first", "second", "third"):
        assert wait(Process(job(tmp_path, "a", f"print('{output}')"))).message == output
    assert (tmp_path / "a" / "output-before.log").read_text() == "second\n"


def test_process_gets_its_own_threads_and_environment(tmp_path) -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'])"
    assert wait(Process(job(tmp_path, "a", code), {"CUDA_VISIBLE_DEVICES": "3"})).message == "1 3"


def test_signals_to_the_launch_do_not_reach_its_jobs(tmp_path) -> None:
    code = "import os; print(os.getsid(0) == os.getpgid(0) == os.getpid())"
    assert wait(Process(job(tmp_path, "a", code))).message == "True"


def test_a_killed_launch_leaves_no_process_behind(tmp_path) -> None:
    starter = subprocess.Popen([sys.executable, "-c", _STARTER, str(tmp_path)])
    output = tmp_path / "a" / "output.log"
    wait_for(output, "\n")
    child = int(output.read_text())
    assert alive(child)
    starter.kill()
    starter.wait()
    wait_until(lambda: not alive(child))


def test_two_launches_do_not_train_the_same_part(tmp_path) -> None:
    mine = job(tmp_path, "a", UNTIL_STOPPED)
    first = Process(mine)
    wait_for(tmp_path / "a" / "output.log", "ready")
    second = Process(mine)
    exit_status = second.poll()
    assert exit_status is not None
    assert exit_status.code == 2
    assert "another process" in exit_status.message
    second.stop()  # does not stop the first process
    assert first.poll() is None
    first.stop()
    assert wait(first) == ExitStatus(0, "saved")
    another = Process(mine)
    wait_for(tmp_path / "a" / "output.log", "ready")
    threading.Timer(0.1, another.stop).start()
    third = Process(mine, lock_timeout=SILENCE)  # waits until the other has exited
    assert (tmp_path / "a" / "output-before.log").read_text() == "ready\nsaved\n"
    assert third.poll() is None
    wait_for(tmp_path / "a" / "output.log", "ready")
    third.stop()
    third.wait()
    assert wait(third) == ExitStatus(0, "saved")


def test_supervise_counts_starts_and_obeys_stop_requests(tmp_path) -> None:
    mine = job(tmp_path, "a", UNTIL_STOPPED)

    def rest(seconds: float) -> None:
        wait_for(tmp_path / "a" / "output.log", "ready")
        request_stop(mine)
        time.sleep(0.02)

    assert count_starts(mine, "one") == 0
    assert supervise(Process(mine), "one", rest) == ExitStatus(0, "saved")
    clear_stop_request(mine)
    assert supervise(Process(mine), "one", rest) == ExitStatus(0, "saved")
    assert (count_starts(mine, "one"), count_starts(mine, "on")) == (2, 0)


def test_last_metrics_skips_cut_lines_and_other_events(tmp_path) -> None:
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
def test_arbitrary_bytes_in_the_files_are_no_error(tmp_path_factory, content) -> None:
    mine = job(tmp_path_factory.mktemp("foreign"), "a")
    mine.directory.mkdir()
    (mine.directory / "metrics.jsonl").write_bytes(content)
    (mine.directory / "output.log").write_bytes(content)
    assert isinstance(last_metrics(mine), dict)
    assert "\n" not in last_output_line(mine)
    assert os.path.exists(mine.directory / "output.log")
