"""A fake Slurm that runs what submitit submits: sbatch, srun, squeue, sacct, scancel, scontrol as local processes.

It is one script under six names. The directory FAKE_SLURM holds for each job `<id>.sh`, `<id>.state` and, once its task
runs, `<id>.pid`; other commands write requests to `<id>.requeue` and `<id>.cancel`. While the file `hold` exists, no
job starts; while `refuse` exists, no job is accepted.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol")


def install(directory: Path) -> Path:
    """Write the commands into `bin` of the directory; returns that, to be put before PATH."""
    bin_directory = directory / "bin"
    bin_directory.mkdir(parents=True)
    for name in NAMES:
        command = bin_directory / name
        command.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
        command.chmod(0o755)
    return bin_directory


def sbatch(here: Path, arguments: list[str]) -> None:
    if (here / "refuse").exists():
        sys.exit("sbatch: error: QOSMaxSubmitJobPerUserLimit")
    number = len(list(here.glob("*.sh"))) + 1
    shutil.copy(arguments[-1], here / f"{number}.sh")
    (here / f"{number}.state").write_text("PENDING")
    null = subprocess.DEVNULL
    run = [sys.executable, __file__, "run", str(number)]
    subprocess.Popen(run, stdin=null, stdout=null, stderr=null, start_new_session=True)
    print(f"Submitted batch job {number}")


def run(here: Path, arguments: list[str]) -> None:
    """The life of a job."""
    number = arguments[0]
    one = {"SLURM_JOB_ID": number, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    state, again = here / f"{number}.state", here / f"{number}.requeue"
    while True:
        state.write_text("PENDING")
        while (here / "hold").exists():
            if (here / f"{number}.cancel").exists():
                state.write_text("CANCELLED")
                return
            time.sleep(0.02)
        state.write_text("RUNNING")
        code = subprocess.run(["bash", str(here / f"{number}.sh")], env={**os.environ, **one}).returncode
        if not again.exists():
            break
        again.unlink()
    cancelled = (here / f"{number}.cancel").exists()
    state.write_text("CANCELLED by 1" if cancelled else "FAILED" if code else "COMPLETED")


def srun(here: Path, arguments: list[str]) -> None:
    command = arguments[arguments.index("--error") + 2 :]
    (here / f"{os.environ['SLURM_JOB_ID']}.pid").write_text(str(os.getpid()))
    os.execvp(command[0], command)


def squeue(here: Path, arguments: list[str]) -> None:
    state = (here / f"{arguments[arguments.index('-j') + 1]}.state").read_text()
    if state in ("PENDING", "RUNNING"):
        print(state)


def sacct(here: Path, arguments: list[str]) -> None:
    print("JobID|State|NodeList")
    for file in here.glob("*.state"):
        print(f"{file.stem}|{file.read_text()}|here")


def scancel(here: Path, arguments: list[str]) -> None:
    (here / f"{arguments[-1]}.cancel").touch()
    task = here / f"{arguments[-1]}.pid"
    if task.exists():
        os.kill(int(task.read_text()), signal.SIGKILL)


def scontrol(here: Path, arguments: list[str]) -> None:
    (here / f"{arguments[1]}.requeue").touch()


if __name__ == "__main__":
    called = Path(sys.argv[0]).name
    words = sys.argv[1:]
    if words[:1] == ["run"]:
        called, words = "run", words[1:]
    globals()[called](Path(os.environ["FAKE_SLURM"]), words)
