"""An unfinished encoding: encoded.partial/ holds one shard per finished block until all are done and it is sealed.

plan.json           the card of the encoding and its blocks; a resumed encoding must match it
00012.safetensors   the columns of block 12's good samples, if it has any
00012.jsonl         its skipped samples, with reasons
00012.notes         parts of its good samples that were left out or changed, if any
00012.files         size, time and hash of the files it was read from, if any
source.parquet      size and time of all files of the source, if any, when the encoding started
00012.parquet       key, caption, split, pixels (a hash of them), and other_captions if an image has several; written
                    last: a block with this file is done
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
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
from atoll.data.lengths import CutCaptions
from atoll.data.names import json_line
from atoll.data.statistics import ChannelSums
from atoll.data.tally import Tally, count_notes, tally_of
from atoll.data.types import Block, Skipped
from atoll.encoders.weights import same
from atoll.errors import AtollError
from atoll.storage.artifact import load_card, read_json, write_bytes, write_card, write_json
from atoll.storage.cards import EncodedCard, EncodedCounts, EncodingPlan
from atoll.storage.lock import hold
from atoll.storage.memory import refuse_out_of_memory
from atoll.storage.shards import OTHERS, ShardWriter, repeats, unpack
from atoll.storage.verified import sha256_once

PLAN = "plan.json"
SKIPPED = "skipped.jsonl"
TEXT = ("key", "caption", "split")
_SHA256 = "sha256"  # in the metadata of a block's parquet file: the hash of its tensors
_SUMS = "sums"  # beside it: the sums of its training latents, per channel


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
        begun = there.card.plain()
        for key, wanted in plan.card.plain().items():
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
        encoded = (self._file(number, "files") for number in range(blocks) if self.is_done(number))
        records = [record for file in encoded if file.is_file() for record in read_records(file) or ()]
        edited = changes(listing, records, complete=False)
        if names or edited:
            raise AtollError(f"{self.path}: the data changed since it was begun ({names or edited}); use --force")

    def is_done(self, number: int) -> bool:
        return self._file(number, "parquet").is_file()

    def write(
        self,
        number: int,
        text: dict[str, list[str]],
        pixels: list[bytes],
        columns: dict[str, Tensor],
        skipped: list[Skipped],
        notes: Sequence[str] = (),
        files: Sequence[FileRecord] = (),
    ) -> None:
        """Write the result of a block; the block is done once its last file is written.

        Args:
            number: number of the block.
            text: key, caption and split of the good samples, and their other_captions.
            pixels: 16-byte hashes of their pixels.
            columns: their tensors [rows, ...].
            skipped: the other samples.
            notes: notes on the good samples.
            files: records of the files that were read.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq
        from safetensors.torch import save

        # Every file is written atomically; the parquet file is last and marks the block as done.
        lines = [_line(sample) for sample in skipped]
        write_bytes(self._file(number, "jsonl"), "".join(lines).encode())
        if notes:
            write_json(self._file(number, "notes"), count_notes(notes))
        if files:
            write_records(self._file(number, "files"), files)
        digest = ""
        if pixels:
            content = save(columns)
            digest = hashlib.sha256(content).hexdigest()
            write_bytes(self._file(number, "safetensors"), content)
        names = (*TEXT, OTHERS) if any(text.get(OTHERS, ())) else TEXT
        arrays = {name: pa.array(text[name], pa.string()) for name in names}
        sink = pa.BufferOutputStream()
        table = pa.table({**arrays, "pixels": pa.array(pixels, pa.binary(16))})
        # The hash of the tensors is compared when the block is sealed, perhaps days later.
        sums = ChannelSums.of(columns, text["split"])
        metadata = {_SHA256: digest, _SUMS: sums.to_json()}
        pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
        write_bytes(self._file(number, "parquet"), sink.getvalue().to_pybytes())

    def tally(self, number: int) -> Tally:
        """Return the counts of a finished block."""
        text, notes = self._texts(number), self._file(number, "notes")
        others = [len(unpack(other)) for other in text[OTHERS]]
        return tally_of(text["caption"], others, self._skipped(number), read_json(notes) if notes.is_file() else [])

    def seal(
        self,
        out: Path,
        card: EncodedCard,
        blocks: int,
        tally: Tally,
        skip_duplicates: bool,
        listing: Listing | None,
        cut: CutCaptions,
    ) -> Tally:
        """Combine the finished blocks, in order, into `out`, and remove the directory.

        Samples with an earlier key are dropped, and with `skip_duplicates` those with earlier pixels. Memory grows only
        with the number of dropped samples.

        Args:
            out: the directory to create.
            card: card of the shards; the counts and the statistics of the latents are added.
            blocks: number of blocks.
            tally: counts of all blocks.
            skip_duplicates: drop samples with equal pixels.
            listing: the files of the source; their record is written beside the shards.
            cut: counts truncated captions.

        Returns:
            The final tally.
        """
        # Find repeated keys first: a row dropped for its key must not make another row a duplicate.
        rows = tally.good
        dropped = {
            row: ("repeated key", first) for row, first in repeats(lambda: self._column("key", blocks), rows).items()
        }
        if skip_duplicates:
            same = repeats(lambda: self._column("pixels", blocks, set(dropped)), rows)
            dropped.update({row: ("duplicate", first) for row, first in same.items()})
        # The report names the first sample with the same key or pixels.
        names = self._keys_of(blocks, {first for _, first in dropped.values()})
        final, sums = replace(tally, skipped=Counter(tally.skipped)), ChannelSums()
        with ShardWriter(out, card) as writer, (self.path / SKIPPED).open("w", encoding="utf-8") as listed:
            start = 0
            for number in range(blocks):
                text = self._texts(number)
                # Row numbers count over all blocks; `gone` counts within this one.
                gone = [i for i in range(len(text["key"])) if start + i in dropped]
                listed.writelines(map(json_line, self._skipped(number)))
                for i in gone:
                    kind, first = dropped[start + i]
                    what = "the key of" if kind == "repeated key" else "the same pixels as"
                    entry = {"key": text["key"][i], "reason": f"{kind}: {what} {names[first]!r}"}
                    listed.write(json_line(entry))
                    final.skipped[kind] += 1
                    final.good -= 1
                    final.uncaptioned -= text["caption"][i] == ""
                    further = len(unpack(text[OTHERS][i]))
                    final.several, final.others = final.several - (further > 0), final.others - further
                # Add the rows that remain, and count truncated captions among them only.
                sums += self._add(writer, number, text, set(gone))
                for i, caption in enumerate(text["caption"]):
                    if start + i not in dropped:
                        cut.add([caption, *(other for other, _ in unpack(text[OTHERS][i]))])
                start += len(text["key"])
            # Close before attaching, so that all lines are on disk.
            listed.close()
            writer.attach(self.path / SKIPPED)
            counts = EncodedCounts(
                good=final.good,
                uncaptioned=final.uncaptioned,
                skipped=dict(sorted(final.skipped.items())),
                **_more_counts(final, cut),
            )
            # In the order of the blocks, so that the sums depend neither on who encoded them nor on interruptions.
            measured = {} if (statistics := sums.statistics()) is None else {"statistics": statistics}
            writer.card = card.model_copy(update={"counts": counts, **measured})
        if listing is not None:
            files = (self._file(number, "files") for number in range(blocks))
            records = [record for file in files if file.is_file() for record in read_records(file) or ()]
            write_records(out / SOURCE_FILES, sealed_records(listing, records))
        # The sealed directory is complete; only now may the blocks go.
        shutil.rmtree(self.path)
        return final

    def list_skipped(self, blocks: int) -> Path:
        """Write the samples skipped so far to one file and return its path."""
        lines = [
            line
            for n in range(blocks)
            if self.is_done(n)
            for line in self._file(n, "jsonl").read_bytes().splitlines(True)
        ]
        write_bytes(self.path / SKIPPED, b"".join(lines))
        return self.path / SKIPPED

    def _add(self, writer: ShardWriter, number: int, text: dict[str, list[str]], gone: set[int]) -> ChannelSums:
        """Add a block to the sealed shards: its file unchanged, or the rows that are not dropped.

        Returns:
            The sums of its training latents.
        """
        remaining = [i for i in range(len(text["key"])) if i not in gone]
        if not remaining:
            return ChannelSums()
        file, expected = self._file(number, "safetensors"), self._sha256(number)
        if expected is not None and sha256_once(file) != expected:
            done = self._file(number, "parquet")
            raise AtollError(f"{file}: its contents are not those that were written; remove {done.name} and --resume")
        keys, captions, splits, others = ([text[name][i] for i in remaining] for name in (*TEXT, OTHERS))
        if gone:
            # Rewriting is needed only for blocks that lose rows.
            columns = {name: column[torch.tensor(remaining)] for name, column in _load(file).items()}
            sums = ChannelSums.of(columns, splits)
            writer.append(keys, captions, splits, columns, others)
        else:
            # The common case: the file is taken over without reading its tensors.
            sums = self._sums(number) or ChannelSums.of(_load(file), splits)
            writer.adopt(file, keys, captions, splits, others)
        if not sums.finite:
            raise AtollError(f"{file}: a latent in it is NaN or infinite; remove {self._file(number, 'parquet').name} "
                             "and --resume")  # fmt: skip
        return sums

    def _column(self, name: str, blocks: int, without: Container[int] = ()) -> Iterator[list[Any]]:
        """Yield a column block by block; the rows in `without` become objects that equal nothing else."""
        start = 0
        for number in range(blocks):
            values = self._read(number, (name,))[name]
            yield [object() if start + i in without else value for i, value in enumerate(values)] if without else values
            start += len(values)

    def _keys_of(self, blocks: int, rows: set[int]) -> dict[int, str]:
        keys, start = {}, 0
        for part in self._column("key", blocks) if rows else ():
            keys.update({start + i: key for i, key in enumerate(part) if start + i in rows})
            start += len(part)
        return keys

    def _file(self, number: int, kind: str) -> Path:
        return self.path / f"{number:05d}.{kind}"

    def _read(self, number: int, columns: Sequence[str]) -> dict[str, list[Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self._file(number, "parquet")
        try:
            value: dict[str, list[Any]] = (
                pq.ParquetFile(file).read(columns=list(columns), use_threads=False).to_pydict()
            )
            return value
        except (OSError, pa.ArrowException) as error:
            refuse_out_of_memory(error, file)
            raise AtollError(f"{file}: cannot be read ({error}); remove it and go on with --resume") from error

    def _texts(self, number: int) -> dict[str, list[str]]:
        """Return the texts of a block: `TEXT`, and other_captions, which are "" where no image has several."""
        import pyarrow.parquet as pq

        there = OTHERS in pq.read_schema(self._file(number, "parquet")).names
        text = self._read(number, (*TEXT, OTHERS) if there else TEXT)
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

        metadata = pq.read_schema(self._file(number, "parquet")).metadata or {}
        value = metadata.get(key.encode())
        return value.decode() if value else None

    def _skipped(self, number: int) -> Iterator[dict[str, str]]:
        with self._file(number, "jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def _load(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _line(sample: Skipped) -> str:
    apart = {} if sample.failed else {"failed": False}
    return json_line({"key": sample.key, "reason": sample.reason, **apart})


def _more_counts(tally: Tally, cut: CutCaptions) -> dict[str, Any]:
    """Return the optional counts: further captions, skipped without failure and noted, by kind, truncated captions."""
    apart = {kind: details.total() for kind, details in sorted(tally.apart_by_kind().items())}
    counts = {
        "several": tally.several,
        "others": tally.others,
        "apart": apart,
        "notes": dict(sorted(tally.notes.items())),
        "cut": cut.counts(),
    }
    return {name: value for name, value in counts.items() if value}
