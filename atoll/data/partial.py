"""The encoding in the making: encoded.partial/, one shard per finished block, until all are there and it is sealed.

plan.json           the card of the encoding and its blocks: whoever goes on must want the same
00012.safetensors   the columns of block 12's good samples, if it has any
00012.jsonl         what was skipped in it, and why
00012.parquet       key, caption, split, pixels (a hash of them); written last: a block is done if it is there
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from atoll.data.types import Block, Skipped
from atoll.encoders.weights import same
from atoll.errors import AtollError
from atoll.storage.artifact import check_card, read_json, write_bytes, write_json
from atoll.storage.lock import hold
from atoll.storage.shards import ShardWriter, repeats

PLAN = "plan.json"
SKIPPED = "skipped.jsonl"
TEXT = ("key", "caption", "split")


@dataclass
class Tally:
    """How many samples were good, and how many of them have no caption; the others by the kind of their reason."""

    good: int = 0
    uncaptioned: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def read(self) -> int:
        return self.good + self.skipped.total()

    def add(self, other: "Tally") -> None:
        self.good, self.uncaptioned = self.good + other.good, self.uncaptioned + other.uncaptioned
        self.skipped += other.skipped

    def reasons(self) -> str:
        """The reasons in a line, the commonest first: "12 too small, 3 truncated"."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.skipped.most_common())


def kind_of(reason: str) -> str:
    """What reasons of one kind share: the words before the particulars."""
    return re.split(r"[:(]", reason, maxsplit=1)[0].strip()


class PartialEncoding:
    """The directory of an encoding in the making. One process at a time plans and seals; any number write blocks."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> "PartialEncoding":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def prepare(self, card: dict[str, Any], blocks: Sequence[Block], resume: bool, restart: bool) -> None:
        """Makes the directory, or opens that of an interrupted encoding, and keeps others out.

        Raises:
            AtollError: another process is at work; something unfinished is there and neither resume nor restart was
                asked for; or it is of another encoding.
        """
        names = hashlib.sha256(json.dumps([block.name for block in blocks]).encode()).hexdigest()
        plan = {"format": 1, "kind": "partial", "card": card, "blocks": len(blocks), "names_sha256": names}
        if self.path.exists() and not (self.path / PLAN).is_file() and any(self.path.glob("[!.]*")):
            raise AtollError(f"{self.path}: exists and is no unfinished encoding (it has no {PLAN}); move it away")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = hold(self.path, "encoding")
        if (self.path / PLAN).is_file():
            if restart:
                for file in self.path.glob("[!.]*"):
                    file.unlink()
            elif not resume:
                raise AtollError(
                    f"{self.path}: an unfinished encoding; go on with --resume, or start anew with --force"
                )
            else:
                self._compare(plan)
                return
        write_json(self.path / PLAN, plan)

    def _compare(self, plan: dict[str, Any]) -> None:
        found = check_card(read_json(self.path / PLAN), "partial", self.path / PLAN)
        for key, value in plan["card"].items():
            if not same(got := found["card"].get(key), value):
                raise AtollError(
                    f"{self.path}: was begun with {key} {got}, asked for is {value}; start anew with --force"
                )
        if {**found, "card": 0} != {**plan, "card": 0}:
            raise AtollError(f"{self.path}: the source's blocks are others than when it was begun; use --force")

    def is_done(self, number: int) -> bool:
        return self._file(number, "parquet").is_file()

    def write(
        self,
        number: int,
        text: dict[str, list[str]],
        pixels: list[bytes],
        columns: dict[str, Tensor],
        skipped: list[Skipped],
    ) -> None:
        """Writes a block's result; it counts from the moment the last of its files is there."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        from safetensors.torch import save

        lines = [json.dumps({"key": s.key, "reason": s.reason}, ensure_ascii=False) + "\n" for s in skipped]
        write_bytes(self._file(number, "jsonl"), "".join(lines).encode())
        if pixels:
            write_bytes(self._file(number, "safetensors"), save(columns))
        arrays = {name: pa.array(text[name], pa.string()) for name in TEXT}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({**arrays, "pixels": pa.array(pixels, pa.binary(16))}), sink, compression="zstd")
        write_bytes(self._file(number, "parquet"), sink.getvalue().to_pybytes())

    def tally(self, number: int) -> Tally:
        """What a finished block holds."""
        captions = self._read(number, ("caption",))["caption"]
        kinds = Counter(kind_of(entry["reason"]) for entry in self._skipped(number))
        return Tally(len(captions), captions.count(""), kinds)

    def seal(self, out: Path, card: dict[str, Any], blocks: int, tally: Tally, skip_duplicates: bool) -> Tally:
        """Makes `out` of the finished blocks, in their order, and removes the directory. Returns the final tally.

        Samples whose key stood before are dropped, and with `skip_duplicates` those whose pixels stood before.
        Memory does not grow with the number of samples, but for those that are dropped.
        """
        rows = tally.good
        dropped = {
            row: ("repeated key", first) for row, first in repeats(lambda: self._column("key", blocks), rows).items()
        }
        if skip_duplicates:
            same = repeats(lambda: self._column("pixels", blocks, set(dropped)), rows)
            dropped.update({row: ("duplicate", first) for row, first in same.items()})
        names = self._keys_of(blocks, {first for _, first in dropped.values()})
        final = Tally(tally.good, tally.uncaptioned, Counter(tally.skipped))
        with ShardWriter(out, {}) as writer, (self.path / SKIPPED).open("w", encoding="utf-8") as listed:
            start = 0
            for number in range(blocks):
                text = self._read(number, TEXT)
                gone = [i for i in range(len(text["key"])) if start + i in dropped]
                listed.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self._skipped(number))
                for i in gone:
                    kind, first = dropped[start + i]
                    what = "the key of" if kind == "repeated key" else "the same pixels as"
                    entry = {"key": text["key"][i], "reason": f"{kind}: {what} {names[first]!r}"}
                    listed.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    final.skipped[kind] += 1
                    final.good -= 1
                    final.uncaptioned -= text["caption"][i] == ""
                self._add(writer, number, text, set(gone))
                start += len(text["key"])
            listed.close()
            writer.attach(self.path / SKIPPED)
            writer.card = {
                **card,
                "counts": {
                    "good": final.good,
                    "uncaptioned": final.uncaptioned,
                    "skipped": dict(sorted(final.skipped.items())),
                },
            }
        shutil.rmtree(self.path)
        return final

    def list_skipped(self, blocks: int) -> Path:
        """Writes what was skipped so far into one file, and returns its path."""
        lines = [
            line
            for n in range(blocks)
            if self.is_done(n)
            for line in self._file(n, "jsonl").read_bytes().splitlines(True)
        ]
        write_bytes(self.path / SKIPPED, b"".join(lines))
        return self.path / SKIPPED

    def _add(self, writer: ShardWriter, number: int, text: dict[str, list[str]], gone: set[int]) -> None:
        """Adds a block to the sealed shards: its file as it is, or what is left of its rows."""
        kept = [i for i in range(len(text["key"])) if i not in gone]
        if not kept:
            return
        file = self._file(number, "safetensors")
        chosen = [[text[name][i] for i in kept] for name in TEXT]
        if gone:
            from safetensors.torch import load_file

            columns = {name: column[torch.tensor(kept)] for name, column in load_file(file).items()}
            writer.append(chosen[0], chosen[1], chosen[2], columns)
        else:
            writer.adopt(file, chosen[0], chosen[1], chosen[2])

    def _column(self, name: str, blocks: int, without: Container[int] = ()) -> Iterator[list[Any]]:
        """A column of all blocks, part by part; the rows in `without` give something that equals nothing else."""
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
            return pq.ParquetFile(file).read(columns=list(columns), use_threads=False).to_pydict()
        except (OSError, pa.ArrowException) as error:
            raise AtollError(f"{file}: cannot be read ({error}); remove it and go on with --resume") from error

    def _skipped(self, number: int) -> Iterator[dict[str, str]]:
        with self._file(number, "jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
