"""Many processes claim work on a store that fails, and some are killed: nothing is held twice, nothing is lost."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from atoll.collective.charter import read_collective
from atoll.collective.connect import open_store
from atoll.collective.keys import Key
from atoll.collective.leases import work_status
from atoll.collective.signed import read_signed
from atoll.collective.statements import Claim
from tests.collective.founding import found
from tests.waiting import Heartbeat

ROOT = Path(__file__).parents[2]


def race(tmp_path: Path, *, processes: int, works: int, last: int, rate: float, kill: float) -> tuple[int, int]:
    """Run claimants until all work is finished; one that is killed starts again. Return claims, and kills."""
    bucket = tmp_path / "bucket"
    store = open_store(str(bucket), make=True)
    found(store, Key.generate(), lease_seconds=1)
    running: dict[Path, subprocess.Popen[bytes]] = {}
    starts: dict[Path, int] = defaultdict(int)

    def start(here: Path) -> None:
        arguments = [bucket, here, starts[here], works, last, rate, kill]
        command = [sys.executable, "-m", "tests.collective.claimant", *map(str, arguments)]
        starts[here] += 1
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        running[here] = subprocess.Popen(command, cwd=ROOT, env=environment)

    for number in range(processes):
        here = tmp_path / f"claimant-{number}"
        here.mkdir()
        Key.generate().save(here / "key")
        start(here)
    # Start those again that were killed.
    heartbeat = Heartbeat(lambda: (sum(starts.values()), len(list(bucket.rglob("*.json")))))
    try:
        while running:
            assert not heartbeat.stopped(), "no claim and no start for a long time"
            time.sleep(0.05)
            for here, process in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[here]
                assert code in (0, -9), f"{here.name} ended with {code}"
                if code == -9:
                    start(here)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    kills = sum(starts.values()) - processes

    # Each epoch of each work item: one claim in the store, and one process at most that held it.
    collective = read_collective(store)
    held: dict[tuple[str, int], set[tuple[str, str]]] = defaultdict(set)
    for log in tmp_path.glob("claimant-*/held.jsonl"):
        for line in log.read_text().splitlines():
            work, epoch, nonce = json.loads(line)
            held[work, epoch].add((log.parent.name, nonce))
    assert [place for place, holders in held.items() if len(holders) > 1] == []
    claims = 0
    for number in range(works):
        status = work_status(store, collective, str(number))
        assert status.end == "finished"  # none is lost
        for epoch in range(1, status.claims + 1):
            path = f"work/{number}/{epoch:06d}.json"
            data = store.read(path, 10_000)
            assert data is not None
            signed = read_signed(Claim, data, path, collective.identity)
            assert {nonce for _, nonce in held[str(number), epoch]} <= {signed.statement.nonce}
        claims += status.claims
    return claims, kills


def test_no_work_is_held_twice_and_none_is_lost(tmp_path) -> None:
    claims, _ = race(tmp_path, processes=4, works=4, last=3, rate=0.05, kill=0.002)
    assert claims >= 12


@pytest.mark.slow
def test_200_claims_of_16_processes_on_a_failing_store(tmp_path) -> None:
    claims, kills = race(tmp_path, processes=16, works=25, last=8, rate=0.05, kill=0.003)
    print(f"{claims} claims, {kills} kills")
    assert claims >= 200
    assert kills > 0
