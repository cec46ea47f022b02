"""A process that claims work on a faulty store, and may be killed at any moment: `test_race.py` runs many of them.

It records each claim before it makes it, as `atoll collective claim` does, and logs each lease that it holds.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from atoll.collective.charter import read_collective
from atoll.collective.connect import open_store
from atoll.collective.keys import Key
from atoll.collective.leases import Lease, claim, end, new_nonce, renew, work_status
from atoll.collective.store import Store, StoreError
from atoll.errors import AtollError
from tests.collective.faults import FaultyClient

Result = TypeVar("Result")


def insist(act: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Call a function until the store answers."""
    while True:
        try:
            return act(*arguments, **options)
        except StoreError:
            continue


def main(arguments: Sequence[str]) -> None:
    """Claim until all work is finished.

    Args:
        arguments: the bucket, the claimant's directory, its number of starts, the number of work items, the epoch at
            which one is finished, the fraction of requests that fail, and that of those that kill.
    """
    bucket, here, start = arguments[0], Path(arguments[1]), int(arguments[2])
    works, last = [str(number) for number in range(int(arguments[3]))], int(arguments[4])
    seed = f"{here.name} {start}"
    choice = random.Random(seed)
    # This machine's clock: off by hours, or in another year.
    offset = choice.choice([0, 3600, -7200, 86_400 * 400, -86_400 * 3650])
    clock, clock_ns = time.time, time.time_ns
    time.time, time.time_ns = lambda: clock() + offset, lambda: clock_ns() + offset * 10**9

    client = FaultyClient(
        open_store(bucket).client, choice.getrandbits(32), rate=float(arguments[5]), kill=float(arguments[6])
    )
    store = Store(client, pause=0.001)
    key = Key.load(here / "key")
    collective = insist(read_collective, store)
    pending = here / "pending.json"

    def hold(lease: Lease) -> None:
        with (here / "held.jsonl").open("a") as log:
            log.write(json.dumps([lease.work, lease.epoch, lease.nonce]) + "\n")
        pending.unlink(missing_ok=True)
        # Some train for a while, some finish, some give up, some vanish and let the lease end.
        for _ in range(choice.randrange(3)):
            insist(renew, store, collective, lease, key)
        if choice.random() < 0.9:
            state = "finished" if lease.epoch >= last else "released"
            insist(end, store, collective, lease, key, state)

    # A claim whose outcome the process did not live to see.
    if pending.exists():
        work, nonce = json.loads(pending.read_text())
        status = insist(work_status, store, collective, work)
        if (status.holder, status.nonce) == (key.id, nonce):
            hold(Lease(work, status.epoch, nonce))
    while True:
        choice.shuffle(works)
        now = insist(store.now, here.name)
        open_works = [work for work in works if insist(work_status, store, collective, work).state(now) != "finished"]
        if not open_works:
            return
        for work in open_works:
            nonce = new_nonce()
            pending.write_text(json.dumps([work, nonce]))
            try:
                hold(insist(claim, store, collective, key, work, nonce))
            except AtollError:  # held, finished, or taken by a faster one
                time.sleep(0.005)


if __name__ == "__main__":
    main(sys.argv[1:])
