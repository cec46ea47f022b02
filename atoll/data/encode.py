"""Encode images and captions to shards of latents, features and captions in encoded/: `atoll encode`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from atoll.data.block import Frozen, encode_block
from atoll.data.captions_file import CaptionedSource
from atoll.data.crop import Framing
from atoll.data.fingerprint import SOURCE_FILES, changes, read_records, write_records
from atoll.data.lengths import CutCaptions, cut_line
from atoll.data.partial import PartialEncoding
from atoll.data.pool import Decoders
from atoll.data.seal import seal
from atoll.data.sources import build_source
from atoll.data.tally import Tally
from atoll.data.targets import components_like, prepare_components
from atoll.data.types import Block, Source
from atoll.data.watch import EncodeProgress, Watch
from atoll.encoders.codec.statistics import uses_measured
from atoll.encoders.targets import COMPONENTS
from atoll.encoders.text import build_encoder
from atoll.encoders.text.encoder import TextEncoder
from atoll.encoders.weights import same
from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.manifest import Manifest
from atoll.manifest.stored import check_stored
from atoll.runtime.device import cores
from atoll.storage.artifact import sha256_file
from atoll.storage.cards import EncodedCard, ImagesRecord
from atoll.storage.layout import RunLayout
from atoll.storage.shards import INDEX, Shards, refuse_foreign

EncodeBackend = Literal["local", "ray"]


def encode_run(
    run: Path,
    manifest: Manifest,
    *,
    force: bool = False,
    resume: bool = False,
    on: EncodeBackend = "local",
    workers: int | None = None,
    max_skipped: float | None = None,
    allow_uncaptioned: bool | None = None,
    progress: EncodeProgress | None = None,
) -> str:
    """Encode the manifest's data into `run`/encoded.

    Finished blocks are not encoded again. The directory appears only when it is complete; until then all files are in
    `run`/encoded.partial. `resume` continues there after an interruption and loses only the unfinished blocks. The
    index's card holds source, framing, codec, condition encoder and feature. The same data give equal bytes on one kind
    of machine, regardless of interruptions and the number of workers.

    Args:
        run: the run's directory.
        manifest: its settings.
        force: replace another encoding; throw away one that was interrupted.
        resume: continue an interrupted encoding.
        on: "local", or "ray": every node of a Ray cluster, over a file system that all of them share.
        workers: processes that decode (local; 0: only this process) or encode (ray). None: chosen by the hardware.
        max_skipped: overrides the manifest.
        allow_uncaptioned: overrides the manifest.
        progress: called with the images done, the total if known, and a note.

    Returns:
        A summary and notes on the data, one per line.

    Raises:
        AtollError: `run`/encoded holds another encoding, or the data were edited since; an interrupted encoding is
            there and neither resume nor force is set; too many samples failed; captions exist and none is read;
            a training needs targets that are not stored; or as `build_source`, `build_codec`, `build_feature`,
            `build_encoder`.
    """
    check_stored(manifest)
    overrides = {"max_skipped": max_skipped, "allow_uncaptioned": allow_uncaptioned}
    changed = {name: value for name, value in overrides.items() if value is not None}
    manifest = manifest.model_copy(update={"data": manifest.data.model_copy(update=changed)})
    # The card identifies the encoding; comparing it needs no network to run.
    out = RunLayout(run).encoded
    source, frozen = build_source(manifest.data), Frozen.build(manifest)
    encoder = build_encoder(manifest.condition)
    like = components_like(run, manifest.targets, frozen)
    card = card_of(source, frozen, encoder, manifest, like)
    if not force and _is_there(out, card, source, manifest):
        return f"{out} is there already: {len(Shards(out)):,} images"
    # Check before hours of work that the result may replace what is at `out`.
    refuse_foreign(out, INDEX)
    blocks, listing = source.blocks(), source.listing()
    with PartialEncoding(RunLayout(run).encoded_partial) as partial:
        partial.prepare(card, blocks, listing, resume, restart=force and not resume)
        # All blocks need one set of components, also those that other machines encode.
        decoders = _decoders(frozen) if workers is None or on == "ray" else workers
        frozen = prepare_components(
            source,
            blocks,
            frozen,
            partial,
            like=like,
            seed=manifest.seed,
            workers=decoders,
            progress=progress,
        )
        card = _with_targets(card, frozen, partial.path / COMPONENTS)
        watch = Watch(partial, blocks, manifest.data, progress)
        # Blocks that an interrupted encoding finished are skipped.
        todo = [(number, block) for number, block in enumerate(blocks) if not partial.is_done(number)]
        if on == "ray":
            from atoll.data.ray import encode_blocks

            encode_blocks(todo, source, manifest, partial, workers, watch)
        else:
            _encode_here(todo, source, frozen, partial, workers, watch)
        # Judge the whole encoding before it is sealed, so that a bad one stays resumable.
        watch.check(final=True)
        if isinstance(source, CaptionedSource):
            source.check(watch.tally)
        cut = CutCaptions(encoder, watch.tally.good + watch.tally.others)
        tally = seal(
            partial,
            out,
            card,
            blocks=len(blocks),
            tally=watch.tally,
            skip_duplicates=manifest.data.skips_duplicates,
            listing=listing,
            cut=cut,
            layout=frozen.layout,
        )
    said = _say(out, source, tally, cut, encoder.length, frozen.framing.sizes)
    return f"{said}\n{_say_statistics(out)}" if uses_measured(manifest.codec) else said


def card_of(
    source: Source, frozen: Frozen, encoder: TextEncoder, manifest: Manifest, like: Path | None = None
) -> EncodedCard:
    """Return the card of an encoding; two encodings are the same if their cards are.

    like: the file of the targets' components, if they are not fitted to these data.
    """
    data = manifest.data
    card = EncodedCard(
        source={**source.config(), "sha256": source.fingerprint()},
        images=ImagesRecord(
            size=data.size,
            channels=frozen.framing.channels,
            smallest_side=data.smallest_side,
            duplicates="skip" if data.skips_duplicates else "keep",
            flips=data.flips,
            **_buckets(frozen.framing),
        ),
        codec=frozen.codec.config(),
        condition=encoder.config(),
        feature=frozen.feature.config(),
        precision=frozen.precision,
    )
    return _with_targets(card, frozen, like)


def _with_targets(card: EncodedCard, frozen: Frozen, components: Path | None) -> EncodedCard:
    """Return the card with the record of the targets, if any are stored. components: their file, if it exists."""
    if frozen.targets is None:
        return card
    sha256 = sha256_file(components) if components is not None else None
    return card.model_copy(update={"targets": frozen.targets.record(sha256)})


def _buckets(framing: Framing) -> dict[str, Any]:
    """Return the entries of the card that only buckets have."""
    return {"sizes": [*map(str, framing.sizes)], "max_cut": framing.max_cut} if framing.sizes else {}


def _is_there(out: Path, card: EncodedCard, source: Source, manifest: Manifest) -> bool:
    """Return whether `out` holds shards with this card, encoded from the current data.

    Raises:
        AtollError: it holds shards with another card, or the data changed since they were encoded.
    """
    if not (out / INDEX).is_file():
        return False
    there = Shards(out).data_card
    if _without_hash(there.source) == _without_hash(card.source):
        _refuse_changes(out, source, contents=there.source != card.source)
    present, expected = there.plain(), card.plain()
    # Components that atoll.yaml does not name are fitted to the data; none are expected if it asks for no targets.
    if isinstance(fitted := present.get("targets"), dict) and "sha256" not in (expected.get("targets") or {}):
        del fitted["sha256"]
    for key, wanted in {**expected, "targets": expected.get("targets")}.items():
        if key == "precision" and manifest.data.precision == "auto":
            continue
        if not same(present.get(key), wanted):
            raise AtollError(
                f"{out}: was encoded with {key} {present.get(key)}, atoll.yaml names {wanted}; "
                "replace it with --force, or name another run"
            )
    return True


def _without_hash(source: Any) -> Any:
    return {**source, "sha256": None} if isinstance(source, dict) else source


def _refuse_changes(out: Path, source: Source, contents: bool) -> None:
    """Raise AtollError with their names if files were added, removed or edited since they were encoded.

    Args:
        out: the shards.
        source: the current data.
        contents: compare all contents if names, sizes and times are the same.
    """
    listing, records = source.listing(), read_records(out / SOURCE_FILES)
    if listing is None or records is None:
        return
    differences = changes(listing, records)
    # The card says that something changed, and sizes and times do not show it: compare contents.
    if contents and not differences:
        differences = changes(listing, records, contents=True)
    if not differences and any(listing.stamps.get(record.name, "") != record.stamp for record in records):
        # Copied or touched: their new times spare the next comparison the reading.
        write_records(out / SOURCE_FILES, [r._replace(stamp=listing.stamps.get(r.name, "")) for r in records])
    if differences:
        raise AtollError(
            f"{out}: the data changed since they were encoded ({differences}); encode them again with --force, or "
            "name another run"
        )


def _encode_here(
    todo: Sequence[tuple[int, Block]],
    source: Source,
    frozen: Frozen,
    partial: PartialEncoding,
    workers: int | None,
    watch: Watch,
) -> None:
    with Decoders(frozen.framing, _decoders(frozen) if workers is None else workers) as decoders:
        for number, block in todo:
            encode_block(number, block, source, frozen, decoders, partial, watch.advance)
            watch.finish(number)


def _decoders(frozen: Frozen) -> int:
    """Return the default number of decoders: all cores to feed a GPU, half of them beside networks on a CPU."""
    return cores() if frozen.device.type != "cpu" else max(1, cores() // 2)


def _say(out: Path, source: Source, tally: Tally, cut: CutCaptions, length: int, sizes: Sequence[ImageSize]) -> str:
    """Return the summary of an encoding and the notes on its data."""
    lines = [f"{out} written: {tally.good:,} images"]
    if sizes:
        filled = [f"{tally.sizes[str(size)]:,} of {size}" for size in sizes if tally.sizes[str(size)]]
        empty = [str(size) for size in sizes if not tally.sizes[str(size)]]
        lines.append(f"buckets: {', '.join(filled)}" + (f"; no image fills {', '.join(empty)}" if empty else ""))
    if tally.skipped:
        lines.append(f"skipped: {tally.reasons()}; {out / 'skipped.jsonl'} lists them")
    lines += [f"not counted as failures: {line}" for line in tally.apart_lines()]
    lines += [*source.notes(), *tally.note_lines()]
    if tally.uncaptioned:
        lines.append(f"{tally.uncaptioned:,} images have no caption: they train the model without one")
    if tally.several:
        lines.append(
            f"{tally.several:,} images have several captions, {tally.several + tally.others:,} in all: each step of "
            "training draws one"
        )
    if (counts := cut.counts()) is not None:
        lines.append(cut_line(counts, length))
    return "\n".join(lines)


def _say_statistics(out: Path) -> str:
    """Return the line on the statistics that `atoll cluster` will normalise by."""
    statistics = Shards(out).card(EncodedCard).statistics
    if statistics is None:
        return "no training image, and so no statistics of the latents"
    mean, std = statistics.mean, statistics.std
    return (
        f"latents of {len(mean)} channels: means of {min(mean):.2f} to {max(mean):.2f}, deviations of {min(std):.2f} "
        f"to {max(std):.2f}; `atoll cluster` normalises them"
    )
