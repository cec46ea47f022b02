"""Seal a finished encoding: join its blocks to encoded/, without repeated keys and images."""

import shutil
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from atoll.data.fingerprint import SOURCE_FILES, Listing, read_records, sealed_records, write_records
from atoll.data.lengths import CutCaptions
from atoll.data.names import json_line
from atoll.data.partial import SIZE, SKIPPED, PartialEncoding
from atoll.data.statistics import ChannelSums
from atoll.data.tally import Tally
from atoll.encoders.targets import COMPONENTS
from atoll.storage.cards import EncodedCard, EncodedCounts
from atoll.storage.shards import OTHERS, ShardWriter, repeats, unpack


class ShardLayout(NamedTuple):
    """How rows are laid out in shards.

    Attributes:
        shapes: with buckets, the main shapes of the columns that have others; None without.
        rows: with buckets, the rows of a shard; without, each block is one.
    """

    shapes: Mapping[str, Sequence[int]] | None = None
    rows: int = 4096


def seal(
    partial: PartialEncoding,
    out: Path,
    card: EncodedCard,
    *,
    blocks: int,
    tally: Tally,
    skip_duplicates: bool,
    listing: Listing | None,
    cut: CutCaptions,
    layout: ShardLayout,
) -> Tally:
    """Combine the finished blocks, in order, into `out`, and remove the directory of the unfinished encoding.

    Samples with an earlier key are dropped, and with `skip_duplicates` those with earlier pixels. Memory grows only
    with the number of dropped samples.

    Args:
        partial: all of whose blocks are done.
        out: the directory to create.
        card: card of the shards; the counts and the statistics of the latents are added.
        blocks: number of blocks.
        tally: counts of all blocks.
        skip_duplicates: drop samples with equal pixels.
        listing: the files of the source; their record is written beside the shards.
        cut: counts truncated captions.
        layout: of the shards.

    Returns:
        The final tally.
    """
    dropped = _repeated(partial, blocks, tally.good, skip_duplicates)
    # The report names the first sample with the same key or pixels.
    names = _keys_of(partial, blocks, {first for _, first in dropped.values()})
    final, sums = replace(tally, skipped=Counter(tally.skipped)), ChannelSums()
    with (
        ShardWriter(out, card, layout.rows, layout.shapes) as writer,
        (partial.path / SKIPPED).open("w", encoding="utf-8") as listed,
    ):
        start = 0
        for number in range(blocks):
            text = partial.texts(number)
            # Row numbers count over all blocks; `gone` counts within this one.
            gone = [i for i in range(len(text["key"])) if start + i in dropped]
            listed.writelines(map(json_line, partial.skipped(number)))
            for i in gone:
                kind, first = dropped[start + i]
                listed.write(_drop(final, text, i, kind, names[first]))
            # Add the rows that remain, and count truncated captions among them only.
            sums += partial.add(writer, number, text, set(gone))
            final.sizes.update(size for i, size in enumerate(text.get(SIZE, ())) if start + i not in dropped)
            for i, caption in enumerate(text["caption"]):
                if start + i not in dropped:
                    cut.add([caption, *(other for other, _ in unpack(text[OTHERS][i]))])
            start += len(text["key"])
        # Close before attaching, so that all lines are on disk.
        listed.close()
        writer.attach(partial.path / SKIPPED)
        if card.targets is not None:
            writer.attach(partial.path / COMPONENTS)
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
        files = (partial.file(number, "files") for number in range(blocks))
        records = [record for file in files if file.is_file() for record in read_records(file) or ()]
        write_records(out / SOURCE_FILES, sealed_records(listing, records))
    # The sealed directory is complete; only now may the blocks go.
    shutil.rmtree(partial.path)
    return final


def _repeated(partial: PartialEncoding, blocks: int, rows: int, skip_duplicates: bool) -> dict[int, tuple[str, int]]:
    """Return the rows to drop, each with the reason and the earlier row that it repeats."""
    # Repeated keys first: a row dropped for its key must not make another row a duplicate.
    keys = repeats(lambda: _values(partial, "key", blocks), rows)
    dropped = {row: ("repeated key", first) for row, first in keys.items()}
    if skip_duplicates:
        same = repeats(lambda: _values(partial, "pixels", blocks, set(dropped)), rows)
        dropped.update({row: ("duplicate", first) for row, first in same.items()})
    return dropped


def _drop(final: Tally, text: Mapping[str, Sequence[Any]], row: int, kind: str, first: str) -> str:
    """Take a dropped row of a block out of the counts, and return its line for the list of skipped samples."""
    final.skipped[kind] += 1
    final.good -= 1
    final.uncaptioned -= text["caption"][row] == ""
    further = len(unpack(text[OTHERS][row]))
    final.several, final.others = final.several - (further > 0), final.others - further
    what = "the key of" if kind == "repeated key" else "the same pixels as"
    return json_line({"key": text["key"][row], "reason": f"{kind}: {what} {first!r}"})


def _values(partial: PartialEncoding, name: str, blocks: int, without: Container[int] = ()) -> Iterator[list[Any]]:
    """Yield a column block by block; the rows in `without` become objects that equal nothing else."""
    start = 0
    for number in range(blocks):
        values = partial.read(number, (name,))[name]
        yield [object() if start + i in without else value for i, value in enumerate(values)] if without else values
        start += len(values)


def _keys_of(partial: PartialEncoding, blocks: int, rows: set[int]) -> dict[int, str]:
    """Return the keys of some rows."""
    keys, start = {}, 0
    for part in _values(partial, "key", blocks) if rows else ():
        keys.update({start + i: key for i, key in enumerate(part) if start + i in rows})
        start += len(part)
    return keys


def _more_counts(tally: Tally, cut: CutCaptions) -> dict[str, Any]:
    """Return the optional counts: further captions, skipped without failure and noted, by kind, truncated captions."""
    apart = {kind: details.total() for kind, details in sorted(tally.apart_by_kind().items())}
    counts = {
        "several": tally.several,
        "others": tally.others,
        "apart": apart,
        "notes": dict(sorted(tally.notes.items())),
        "cut": cut.counts(),
        "sizes": dict(sorted(tally.sizes.items())),
    }
    return {name: value for name, value in counts.items() if value}
