"""Images and captions -> encoded/: shards of latents and features, the captions beside them: `atoll encode`."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from atoll.data.block import Frozen, encode_block
from atoll.data.partial import PartialEncoding, Tally
from atoll.data.pool import Decoders
from atoll.data.sources import build_source
from atoll.data.types import Block, Source
from atoll.encoders.text import build_encoder
from atoll.encoders.weights import same
from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.runtime.device import cores
from atoll.storage.layout import RunLayout
from atoll.storage.shards import INDEX, Shards, refuse_foreign

EncodeProgress = Callable[[int, int | None, str], None]  # (images done, images in all if known, a note)
EncodeBackend = Literal["local", "ray"]

_ENOUGH = 1000  # samples after which too many failures stop the work, instead of its end


def encode_run(
    run: Path,
    manifest: Manifest,
    *,
    force: bool = False,
    resume: bool = False,
    on: EncodeBackend = "local",
    workers: int | None = None,
    max_skipped: float | None = None,
    progress: EncodeProgress | None = None,
) -> str:
    """Encodes the manifest's data into `run`/encoded and says in a line or two what was done.

    What is finished already is not done again. The directory appears whole; until then all lies in
    `run`/encoded.partial, where an interrupted encoding goes on with `resume`, losing the blocks that were under way.
    The index's card tells source, framing, codec, condition encoder and feature. Twice gives equal bytes on one kind of
    machine, wherever it was interrupted and however many workers there are.

    Args:
        force: replace another encoding; throw away one that was interrupted.
        on: "local", or "ray": every node of a Ray cluster, over a file system that all of them share.
        workers: processes that decode (local; 0: none but this one) or encode (ray). None: what the machine has.
        max_skipped: instead of the manifest's.

    Raises:
        AtollError: `run`/encoded holds another encoding, an interrupted one is there and neither resume nor force was
            asked for, too many samples failed, or as `build_source`, `build_codec`, `build_feature`, `build_encoder`.
    """
    out = RunLayout(run).encoded
    source, frozen = build_source(manifest.data), Frozen.build(manifest)
    card = card_of(source, frozen, manifest)
    if not force and _is_there(out, card, manifest):
        return f"{out} is there already: {len(Shards(out)):,} images"
    refuse_foreign(out, INDEX)
    blocks = source.blocks()
    with PartialEncoding(RunLayout(run).encoded_partial) as partial:
        partial.prepare(card, blocks, resume, restart=force and not resume)
        limit = manifest.data.max_skipped if max_skipped is None else max_skipped
        watch = _Watch(partial, blocks, limit, progress)
        todo = [(number, block) for number, block in enumerate(blocks) if not partial.is_done(number)]
        if on == "ray":
            from atoll.data.ray import encode_blocks

            encode_blocks(todo, source, manifest, partial, workers, watch)
        else:
            _encode_here(todo, source, frozen, partial, workers, watch)
        watch.check(final=True)
        tally = partial.seal(out, card, len(blocks), watch.tally, manifest.data.skips_duplicates)
    return _say(out, tally)


def card_of(source: Source, frozen: Frozen, manifest: Manifest) -> dict[str, Any]:
    """What makes two encodings the same."""
    data = manifest.data
    return {
        "source": {**source.config(), "sha256": source.fingerprint()},
        "images": {
            "size": data.size,
            "channels": frozen.framing.channels,
            "smallest_side": data.smallest_side,
            "duplicates": "skip" if data.skips_duplicates else "keep",
            "flips": data.flips,
        },
        "codec": frozen.codec.config(),
        "condition": build_encoder(manifest.condition).config(),
        "feature": frozen.feature.config(),
        "precision": frozen.precision,
    }


def _is_there(out: Path, card: dict[str, Any], manifest: Manifest) -> bool:
    """Whether `out` holds shards with this card. Raises AtollError if it holds shards with another."""
    if not (out / INDEX).is_file():
        return False
    found = Shards(out).card
    for key in card.keys() - ({"precision"} if manifest.data.precision == "auto" else set()):
        if not same(found.get(key), card[key]):
            raise AtollError(
                f"{out}: was encoded with {key} {found.get(key)}, asked for is {card[key]}; "
                "replace it with --force, or name another run"
            )
    return True


def _encode_here(
    todo: Sequence[tuple[int, Block]],
    source: Source,
    frozen: Frozen,
    partial: PartialEncoding,
    workers: int | None,
    watch: "_Watch",
) -> None:
    with Decoders(frozen.framing, _decoders(frozen) if workers is None else workers) as decoders:
        for number, block in todo:
            encode_block(number, block, source, frozen, decoders, partial, watch.tell)
            watch.finished(number)


def _decoders(frozen: Frozen) -> int:
    """A GPU is fed by all cores; on a CPU the networks need most of them."""
    return cores() if frozen.device.type != "cpu" else max(1, cores() // 2)


class _Watch:
    """Counts what is done, tells the progress, and stops the work when too much fails."""

    def __init__(
        self, partial: PartialEncoding, blocks: Sequence[Block], limit: float, progress: EncodeProgress | None
    ):
        self.partial, self.blocks, self.limit, self.progress = partial, blocks, limit, progress
        self.tally, self.done = Tally(), 0  # of finished blocks
        for number in range(len(blocks)):
            if partial.is_done(number):
                self._count(number)
        self.under_way = [0, 0]  # good and skipped of the block that is being encoded
        self.before, self.start = self.tally.read, time.perf_counter()

    def tell(self, good: int, skipped: int) -> None:
        """Hears of some samples of a block that is not finished yet."""
        self.under_way[0] += good
        self.under_way[1] += skipped
        self._report()

    def finished(self, number: int) -> None:
        """Hears of a block that is finished. Raises AtollError if too many samples failed."""
        self.under_way = [0, 0]
        self._count(number)
        self._report()
        self.check(final=False)

    def check(self, final: bool) -> None:
        """Raises AtollError if more samples failed than may, or if at the end there is none."""
        failed, read = self.tally.skipped.total(), self.tally.read
        if failed > self.limit * read and (final or read >= _ENOUGH):
            listed = self.partial.list_skipped(len(self.blocks))
            raise AtollError(
                f"{failed:,} of {read:,} images cannot be used ({failed / read:.1%}; {self.limit:.1%} may fail): "
                f"{self.tally.reasons()}; {listed} lists them; mend the source, or go on with --resume --max-skipped "
                f"{min(1.0, failed / read + 0.01):.2f}"
            )
        if final and not self.tally.good:
            raise AtollError("the source holds no images that can be used; check data.path")

    def _count(self, number: int) -> None:
        self.tally.add(self.partial.tally(number))
        self.done += 1

    def _report(self) -> None:
        if self.progress is None:
            return
        read = self.tally.read + sum(self.under_way)
        known = [block.samples for block in self.blocks]
        total = None
        if all(samples is not None for samples in known):
            total = sum(samples for samples in known if samples is not None)
        elif self.done:
            total = max(
                read, round(self.tally.read / self.done * len(self.blocks))
            )  # the blocks to come are like these
        rate = (read - self.before) / (time.perf_counter() - self.start)
        self.progress(read, total, f"{rate:,.0f} images/s, {self.tally.skipped.total() + self.under_way[1]:,} skipped")


def _say(out: Path, tally: Tally) -> str:
    lines = [f"{out} written: {tally.good:,} images"]
    if tally.skipped:
        lines.append(f"skipped: {tally.reasons()}; {out / 'skipped.jsonl'} lists them")
    if tally.uncaptioned:
        lines.append(f"{tally.uncaptioned:,} images have no caption: they train the model without one")
    return "\n".join(lines)
