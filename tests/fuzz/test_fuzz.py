"""Damaged and hostile files, at random: never a traceback, a hang or a heap of memory; what is accepted is harmless.

ATOLL_FUZZ=N tries N mutations of every subject, in place of the usual number.
"""

import os
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.fuzz.mutations import mutate_file
from tests.fuzz.sandbox import TRACEBACK, Outcome, run
from tests.fuzz.subjects import SUBJECTS, Subject, remake_hashes, write_inputs

CPU_SECONDS = 5  # more than this above the undamaged files' time is a hang
GROWN = 3 << 30  # bytes


@pytest.fixture(scope="module")
def root(trained_run, tmp_path_factory) -> Path:
    """All that is damaged, undamaged."""
    from atoll.diffusers import AtollPipeline

    path = tmp_path_factory.mktemp("fuzz") / "root"
    shutil.copytree(trained_run, path)
    write_inputs(path)
    AtollPipeline.from_pretrained(path / "ensemble").save_pretrained(path / "saved")
    return path


@pytest.mark.parametrize("name", SUBJECTS)
def test_some_damage_is_refused_in_one_line_or_harmless(root, tmp_path, name) -> None:
    check(root, tmp_path, name, range(int(os.environ.get("ATOLL_FUZZ", "4"))))


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_much_damage_is_refused_in_one_line_or_harmless(root, tmp_path, name) -> None:
    check(root, tmp_path, name, range(4, 150))


def check(root: Path, tmp_path: Path, name: str, seeds: range) -> None:
    """Damage one file at a time, as each seed says, and judge what the subject's command makes of it."""
    subject = SUBJECTS[name]
    # The undamaged files, for comparison. Paths are the same for all, since some are written down.
    work = tmp_path / "work"
    shutil.copytree(root, work)
    point_at(work, root)
    sound = run(lambda: subject.work(work), tmp_path / "log")
    assert sound.code == 0, sound.error
    expected = subject.read(work)

    problems = []
    for seed in seeds:
        rng = random.Random(f"{name} {seed}")
        shutil.rmtree(work)
        shutil.copytree(root, work)
        point_at(work, root)
        path = rng.choice(subject.paths(work))
        old = path.read_bytes()
        where = mutate_file(path, rng)
        # A stranger remakes the hashes; a broken disk does not.
        if remade := rng.random() < 0.75:
            remake_hashes(work, path, old)
        outcome = run(lambda: subject.work(work), tmp_path / "log")
        what = f"seed {seed}: {path.relative_to(work)} at {where}{', hashes remade' if remade else ''}"
        if problem := judge(subject, outcome, sound, work, expected, where):
            problems.append(f"{what}: {problem}")
    assert not problems, f"{len(problems)} of {len(seeds)}\n" + "\n".join(problems)


def judge(subject: Subject, outcome: Outcome, sound: Outcome, work: Path, expected: object, where: str) -> str | None:
    """Say what is wrong with what a command did to damaged files; None if nothing is."""
    # Resources, whatever the answer.
    is_effort = re.fullmatch(subject.efforts, where)
    if outcome.cpu_seconds > sound.cpu_seconds + CPU_SECONDS and not is_effort:
        return f"{outcome.cpu_seconds:.1f} s of processor time"
    if outcome.grown > sound.grown + GROWN:
        return f"{outcome.grown / 2**30:.1f} GiB more memory"
    # An answer: a line without control characters, and exit code 2.
    lines = outcome.error.splitlines()
    if outcome.code == TRACEBACK or outcome.code < 0 or "Traceback" in outcome.error:
        return f"exit {outcome.code}: " + " | ".join(line.strip() for line in lines[-4:])
    if unprintable := [line for line in lines if not line.isprintable()]:
        return f"control characters: {unprintable[0]!r:.200}"
    if outcome.code == 2:
        messages = [line for line in lines if not line.startswith("atoll: warning: ")]
        if len(messages) != 1 or len(messages[0]) > 1500:
            return f"{len(messages)} lines: {messages!r:.400}"
        return f"calls itself out of memory: {messages[0]}" if "out of memory" in messages[0] else None
    if outcome.code not in (0, 3):
        return f"exit {outcome.code}: {lines[-1:]}"
    # Accepted: the result is the same, unless the value is the owner's to choose.
    try:
        result = subject.read(work)
    except Exception as error:
        return f"accepted, but its result cannot be read: {type(error).__name__}: {error}"
    owned = subject.bytes_owned if where == "bytes" else re.fullmatch(subject.owned, where.rstrip("+"))
    return None if result == expected or owned else "accepted, with another result"


def point_at(work: Path, root: Path) -> None:
    """Let the copied runs read the copied images."""
    for path in work.glob("*-run/atoll.yaml"):
        path.write_text(path.read_text().replace(str(root), str(work)))
