"""An unfinished encoding: encoded.partial/ holds one shard per finished block until all are done and `seal` joins them.

plan.json           the card of the encoding and its blocks; a resumed encoding must match it
00012.safetensors   the columns of block 12's good samples, if it has any; of buckets, latent@336x192 for each size
00012.jsonl         its skipped samples, with reasons
00012.notes         parts of its good samples that were left out or changed, if any
00012.files         size, time and hash of the files it was read from, if any
targets.safetensors the components of the targets, if any are stored
source.parquet      size and time of all files of the source, if any, when the encoding started
00012.parquet       key, caption, split, pixels (a hash of them), other_captions if an image has several, with buckets
                    the size; written last: a block with this file is done
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from atoll.data.fingerprint import (
    SOURCE_FILES,
    FileRecord,
    Listing,
    changes,
    read_records,
    sealed_records,
    write_records,
)
from atoll.data.names import json_line
from atoll.data.statistics import ChannelSums
from atoll.data.tally import Tally, count_notes, tally_of
from atoll.data.types import Block, Skipped
from atoll.encoders.weights import same
from atoll.errors import AtollError
from atoll.storage.artifact import load_card, read_json, write_bytes, write_card, write_json
from atoll.storage.cards import EncodedCard, EncodingPlan
from atoll.storage.lock import hold
from atoll.storage.memory import refuse_out_of_memory
from atoll.storage.shards import OTHERS, ShardWriter, unpack
from atoll.storage.verified import sha256_once

PLAN = "plan.json"
SKIPPED = "skipped.jsonl"
TEXT = ("key", "caption", "split")
_TEXTS = (*TEXT, OTHERS)
_SHA256 = "sha256"  # in the metadata of a block's parquet file: the hash of its tensors
_SUMS = "sums"  # beside it: the sums of its training latents, per channel
SIZE = "size"  # the column of the images' sizes, with buckets


@dataclass
class BlockRows:
    """The good samples of a block that have one size.

    Attributes:
        text: key, caption, split and other_captions of each.
        pixels: 16-byte hashes of their pixels.
        columns: their tensors [rows, ...].
    """

    text: dict[str, list[str]]
    pixels: list[bytes]
    columns: dict[str, Tensor]


class PartialEncoding:
    """The directory of an unfinished encoding. One process at a time plans and seals; any number write blocks."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> "PartialEncoding":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def prepare(
        self, card: EncodedCard, blocks: Sequence[Block], listing: Listing | None, resume: bool, restart: bool
    ) -> None:
        """Create the directory, or open that of an interrupted encoding, and lock it.

        Args:
            card: the card of the encoding.
            blocks: all blocks of the source.
            listing: the files of the source; None if it has none.
            resume: continue an interrupted encoding.
            restart: discard an interrupted encoding.

        Raises:
            AtollError: another process holds the lock; an unfinished encoding exists and neither resume nor restart is
                set; or the unfinished encoding does not match.
        """
        # A hash of the names keeps the plan small for a source of a million blocks.
        names = hashlib.sha256(json.dumps([block.name for block in blocks]).encode()).hexdigest()
        plan = EncodingPlan(card=card, blocks=len(blocks), names_sha256=names)
        # Never write into a directory that this program did not create.
        if self.path.exists() and not (self.path / PLAN).is_file() and any(self.path.glob("[!.]*")):
            raise AtollError(f"{self.path}: exists and is no unfinished encoding (it has no {PLAN}); move it away")
        self.path.mkdir(parents=True, exist_ok=True)
        # Lock before looking at the plan: two processes must not both start one.
        self._lock = hold(self.path, "encoding")
        if (self.path / PLAN).is_file():
            if restart:
                # Only visible files: the lock stays in place.
                for file in self.path.glob("[!.]*"):
                    file.unlink()
            elif not resume:
                raise AtollError(
                    f"{self.path}: an unfinished encoding; go on with --resume, or start anew with --force"
                )
            else:
                self._compare(plan, listing)
                return
        if listing is not None:
            write_records(self.path / SOURCE_FILES, sealed_records(listing, []))
        write_card(self.path / PLAN, plan)

    def _compare(self, plan: EncodingPlan, listing: Listing | None) -> None:
        """Raise AtollError unless the unfinished encoding has the same plan and its files have not changed."""
        there = load_card(self.path / PLAN, EncodingPlan)
        # Check the files first: edited data also change the card, and this error names them.
        self._compare_files(there.blocks, listing)
        begun, expected = there.card.plain(), plan.card.plain()
        for key, wanted in {**expected, "targets": expected.get("targets")}.items():
            if not same(got := begun.get(key), wanted):
                raise AtollError(
                    f"{self.path}: was begun with {key} {got}, atoll.yaml names {wanted}; start anew with --force"
                )
        if (there.blocks, there.names_sha256) != (plan.blocks, plan.names_sha256):
            raise AtollError(f"{self.path}: the source's blocks are others than when it was begun; use --force")

    def _compare_files(self, blocks: int, listing: Listing | None) -> None:
        """Raise AtollError if files were added, removed or resized, or if files of an encoded block were edited."""
        begun = read_records(self.path / SOURCE_FILES)
        if listing is None or begun is None:
            return
        # Replace the stamps, so that only additions, removals and sizes are compared here.
        names = changes(listing, [record._replace(stamp=listing.stamps.get(record.name, "")) for record in begun])
        # Records of encoded blocks carry hashes: an edit after encoding shows even if the size is the same.
        encoded = (self.file(number, "files") for number in range(blocks) if self.is_done(number))
        records = [record for file in encoded if file.is_file() for record in read_records(file) or ()]
        edited = changes(listing, records, complete=False)
        if names or edited:
            raise AtollError(f"{self.path}: the data changed since it was begun ({names or edited}); use --force")

    def is_done(self, number: int) -> bool:
        return self.file(number, "parquet").is_file()

    def write(
        self,
        number: int,
        parts: Mapping[str, BlockRows],
        skipped: list[Skipped],
        notes: Sequence[str] = (),
        files: Sequence[FileRecord] = (),
    ) -> None:
        """Write the result of a block; the block is done once its last file is written.

        Args:
            number: number of the block.
            parts: the good samples by their size; without buckets, all of them under "".
            skipped: the other samples.
            notes: notes on the good samples.
            files: records of the files that were read.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq
        from safetensors.torch import save

        # Every file is written atomically; the parquet file is last and marks the block as done.
        lines = [_line(sample) for sample in skipped]
        write_bytes(self.file(number, "jsonl"), "".join(lines).encode())
        if notes:
            write_json(self.file(number, "notes"), count_notes(notes))
        if files:
            write_records(self.file(number, "files"), files)
        digest = ""
        pixels = [sha for rows in parts.values() for sha in rows.pixels]
        if pixels:
            content = save({_name(name, size): c for size, rows in parts.items() for name, c in rows.columns.items()})
            digest = hashlib.sha256(content).hexdigest()
            write_bytes(self.file(number, "safetensors"), content)
        text = {name: [value for rows in parts.values() for value in rows.text[name]] for name in _TEXTS}
        if not any(text[OTHERS]):
            del text[OTHERS]
        if parts and "" not in parts:
            text[SIZE] = [size for size, rows in parts.items() for _ in rows.pixels]
        arrays = {name: pa.array(values, pa.string()) for name, values in text.items()}
        sink = pa.BufferOutputStream()
        table = pa.table({**arrays, "pixels": pa.array(pixels, pa.binary(16))})
        # The hash of the tensors is compared when the block is sealed, perhaps days later.
        sums = _added(ChannelSums.of(rows.columns, rows.text["split"]) for rows in parts.values())
        metadata = {_SHA256: digest, _SUMS: sums.to_json()}
        pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
        write_bytes(self.file(number, "parquet"), sink.getvalue().to_pybytes())

    def tally(self, number: int) -> Tally:
        """Return the counts of a finished block."""
        text, notes = self.texts(number), self.file(number, "notes")
        others = [len(unpack(other)) for other in text[OTHERS]]
        return tally_of(text["caption"], others, self.skipped(number), read_json(notes) if notes.is_file() else [])

    def list_skipped(self, blocks: int) -> Path:
        """Write the samples skipped so far to one file and return its path."""
        lines = [
            line
            for n in range(blocks)
            if self.is_done(n)
            for line in self.file(n, "jsonl").read_bytes().splitlines(True)
        ]
        write_bytes(self.path / SKIPPED, b"".join(lines))
        return self.path / SKIPPED

    def add(self, writer: ShardWriter, number: int, text: dict[str, list[str]], gone: set[int]) -> ChannelSums:
        """Add a block to the sealed shards: its file unchanged, or the rows that are not dropped.

        Returns:
            The sums of its training latents.
        """
        remaining = [i for i in range(len(text["key"])) if i not in gone]
        if not remaining:
            return ChannelSums()
        file, expected = self.file(number, "safetensors"), self._sha256(number)
        done = self.file(number, "parquet")
        if expected is not None and sha256_once(file) != expected:
            raise AtollError(f"{file}: its contents are not those that were written; remove {done.name} and --resume")
        known = None if gone else self._sums(number)
        if SIZE in text or gone:
            # Rewriting is needed only for blocks that lose rows, and for those of several sizes.
            parts = _remaining(_load(file), text, gone)
            for rows in parts:
                keys, captions, splits, others = (rows.text[name] for name in _TEXTS)
                writer.append(keys, captions, splits, rows.columns, others)
            sums = known or _added(ChannelSums.of(rows.columns, rows.text["split"]) for rows in parts)
        else:
            # The common case: the file is taken over without reading its tensors.
            sums = known or ChannelSums.of(_load(file), text["split"])
            writer.adopt(file, *(text[name] for name in _TEXTS))
        if not sums.finite:
            raise AtollError(f"{file}: a latent in it is NaN or infinite; remove {done.name} and --resume")
        return sums

    def file(self, number: int, kind: str) -> Path:
        """Return the file of a block of a kind, such as \"safetensors\"."""
        return self.path / f"{number:05d}.{kind}"

    def read(self, number: int, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Read columns of the good samples of a finished block."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self.file(number, "parquet")
        try:
            value: dict[str, list[Any]] = (
                pq.ParquetFile(file).read(columns=list(columns), use_threads=False).to_pydict()
            )
            return value
        except (OSError, pa.ArrowException) as error:
            refuse_out_of_memory(error, file)
            raise AtollError(f"{file}: cannot be read ({error}); remove it and go on with --resume") from error

    def texts(self, number: int) -> dict[str, list[str]]:
        """Return the texts of a block: `TEXT`, other_captions ("" where no image has several), with buckets sizes."""
        import pyarrow.parquet as pq

        there = pq.read_schema(self.file(number, "parquet")).names
        text = self.read(number, [name for name in (*_TEXTS, SIZE) if name in there])
        return {OTHERS: [""] * len(text["key"]), **text}

    def _sha256(self, number: int) -> str | None:
        """Return the hash of a block's tensors when they were written; None for a block of a time before hashes."""
        return self._metadata(number, _SHA256)

    def _sums(self, number: int) -> ChannelSums | None:
        """Return the sums of a block's training latents; None for a block of a time before sums."""
        text = self._metadata(number, _SUMS)
        return None if text is None else ChannelSums.from_json(text)

    def _metadata(self, number: int, key: str) -> str | None:
        """Read a text from the metadata of a block's parquet file; None if it is empty or not there."""
        import pyarrow.parquet as pq

        metadata = pq.read_schema(self.file(number, "parquet")).metadata or {}
        value = metadata.get(key.encode())
        return value.decode() if value else None

    def skipped(self, number: int) -> Iterator[dict[str, str]]:
        """Yield the lines on the skipped samples of a finished block."""
        with self.file(number, "jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def _load(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _remaining(tensors: Mapping[str, Tensor], text: Mapping[str, list[str]], gone: set[int]) -> list[BlockRows]:
    """Return the rows of a block that are not dropped, size by size.

    The shards of a rare size hold the rows of many blocks, so blocks of several sizes are always written again.

    Args:
        tensors: of the block's file.
        text: key, caption, split and other_captions of each row, with buckets its size.
        gone: the rows that are dropped.
    """
    sizes = text.get(SIZE) or [""] * len(text["key"])
    parts = []
    for size in dict.fromkeys(sizes):
        rows = [i for i, other in enumerate(sizes) if other == size]
        # Positions among the rows of this size, which are those of its tensors.
        chosen = torch.tensor([place for place, i in enumerate(rows) if i not in gone], dtype=torch.long)
        columns = {name.partition("@")[0]: c[chosen] for name, c in tensors.items() if name == _name(name, size)}
        own = {name: [text[name][i] for i in rows if i not in gone] for name in _TEXTS}
        if len(chosen):
            parts.append(BlockRows(own, [], columns))
    return parts


def _name(name: str, size: str) -> str:
    """The name of a column of the images of one size: latent@336x192; without buckets its own."""
    return f"{name.partition('@')[0]}@{size}" if size else name


def _added(sums: Iterable[ChannelSums]) -> ChannelSums:
    return sum(sums, ChannelSums())


def _line(sample: Skipped) -> str:
    apart = {} if sample.failed else {"failed": False}
    return json_line({"key": sample.key, "reason": sample.reason, **apart})
