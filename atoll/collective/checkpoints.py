"""Shared checkpoints: a successor continues where a lost contributor stopped, bit for bit.

checkpoints/<work>/<epoch>/000001.json     signed by the epoch's holder: hash, size and slot of the file
checkpoints/<work>/<epoch>/0.safetensors   and 1.safetensors: the last two checkpoints, written in turn

A checkpoint is whatever its author made of it. Continuing from one means to trust its author until the gate has judged
the result.
"""

import os
from pathlib import Path

from atoll.collective.charter import Collective
from atoll.collective.files import MAX_FILE, digest_of
from atoll.collective.keys import Key
from atoll.collective.leases import Lease, claim_at
from atoll.collective.signed import read_signed, sign
from atoll.collective.statements import MAX_NUMBER, STATEMENT_BYTES, FileDigest, SharedCheckpoint
from atoll.collective.store import Store
from atoll.errors import AtollError

CHECKPOINTS = "checkpoints"
_SLOTS = 2
_LOOKED = 16  # statements per epoch, the last one first


def share_checkpoint(
    store: Store, collective: Collective, lease: Lease, key: Key, file: Path, last: FileDigest | None = None
) -> FileDigest | None:
    """Upload the checkpoint of a training that is running.

    Args:
        store, collective, lease, key: the holder's.
        file: checkpoint.safetensors, which training replaces as a whole while this reads it.
        last: the digest that the previous call returned; nothing happens if the file is still that one.

    Returns:
        The file's size and hash; None if there is no file.
    """
    # A second name for these bytes: training gives the first name to its next checkpoint.
    snapshot = file.with_name(f".{file.name}.shared-{os.getpid()}")
    snapshot.unlink(missing_ok=True)
    try:
        os.link(file, snapshot)
    except FileNotFoundError:
        return None
    try:
        digest = digest_of(snapshot)
        if digest == last:
            return digest
        number = _latest(store, lease.work, lease.epoch) + 1
        slot = number % _SLOTS
        # The other slot stays whole meanwhile, and its statement valid.
        store.client.put_file(_slot_path(lease.work, lease.epoch, slot), snapshot)
        statement = SharedCheckpoint(work=lease.work, epoch=lease.epoch, number=number, slot=slot, file=digest)
        store.create(_statement_path(lease.work, lease.epoch, number), sign(statement, [key], collective.identity))
        return digest
    finally:
        snapshot.unlink(missing_ok=True)


def fetch_checkpoint(store: Store, collective: Collective, work: str, before: int, file: Path) -> str:
    """Download the last checkpoint that an earlier holder shared.

    Args:
        store, collective: where to look.
        work: the work item.
        before: the epoch of the own lease; earlier ones are looked at, the last one first.
        file: where to write it.

    Returns:
        Whose it is, for people.

    Raises:
        AtollError: nobody shared one, none is whole, or `file` exists.
    """
    if file.exists():
        raise AtollError(f"{file}: exists; continue from it with --resume, or remove it")
    for epoch in range(before - 1, 0, -1):
        holder = claim_at(store, collective, work, epoch)
        latest = _latest(store, work, epoch)
        # A slot may just be written by a holder who is not as lost as it seemed, and strangers may leave junk.
        for number in range(latest, max(0, latest - _LOOKED), -1):
            place = _statement_path(work, epoch, number)
            data = store.read(place, STATEMENT_BYTES)
            try:
                signed = read_signed(SharedCheckpoint, data or b"", store.place(place), collective.identity)
                statement = signed.statement
                if holder is None or signed.signers != {holder} or not collective.may_work(holder):
                    continue
                if (statement.work, statement.epoch, statement.number) != (work, epoch, number):
                    continue
                if statement.file.size > MAX_FILE:
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                store.download(
                    _slot_path(work, epoch, statement.slot), file, statement.file.sha256, statement.file.size
                )
            except AtollError:
                continue
            return f"{collective.name_of(holder)}, epoch {epoch}"
    raise AtollError(f"work {work}: no earlier holder shared a whole checkpoint; train from the start")


def _latest(store: Store, work: str, epoch: int) -> int:
    """The number of the last statement, without gaps; 0 if there is none."""
    names = {entry.path.rsplit("/", 1)[1] for entry in store.list(f"{CHECKPOINTS}/{work}/{epoch:06d}")}
    number = 0
    while number < MAX_NUMBER and f"{number + 1:06d}.json" in names:
        number += 1
    return number


def _statement_path(work: str, epoch: int, number: int) -> str:
    return f"{CHECKPOINTS}/{work}/{epoch:06d}/{number:06d}.json"


def _slot_path(work: str, epoch: int, slot: int) -> str:
    return f"{CHECKPOINTS}/{work}/{epoch:06d}/{slot}.safetensors"
