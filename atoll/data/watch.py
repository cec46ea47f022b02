"""Monitor an encoding: count samples, report progress, and stop when too many fail."""

import time
from collections.abc import Callable, Sequence

from atoll.data.partial import PartialEncoding
from atoll.data.tally import Tally
from atoll.data.types import Block
from atoll.errors import AtollError
from atoll.manifest import DataSettings

EncodeProgress = Callable[[int, int | None, str], None]  # (images done, images in all if known, a note)

ENOUGH = 1000  # samples after which too many failures stop the work before its end


class Watch:
    """The counts of a running encoding."""

    def __init__(
        self,
        partial: PartialEncoding,
        blocks: Sequence[Block],
        settings: DataSettings,
        progress: EncodeProgress | None,
    ):
        self.partial, self.blocks, self.settings, self.progress = partial, blocks, settings, progress
        self.tally, self.done = Tally(), 0  # of finished blocks
        # Blocks that an earlier process finished count too.
        for number in range(len(blocks)):
            if partial.is_done(number):
                self._count(number)
        self.under_way = [0, 0]  # good and skipped of the block that is being encoded
        self.before, self.start = self.tally.read, time.perf_counter()

    def advance(self, good: int, skipped: int) -> None:
        """Count some samples of an unfinished block."""
        self.under_way[0] += good
        self.under_way[1] += skipped
        self._report()

    def finish(self, number: int) -> None:
        """Count a finished block. Raises AtollError as `check`."""
        self.under_way = [0, 0]
        self._count(number)
        self._report()
        self.check(final=False)

    def check(self, final: bool) -> None:
        """Check the finished blocks.

        Raises:
            AtollError: too many samples failed, captions are beside the images and none is read, or at the end
                there is nothing to use.
        """
        tally, limit = self.tally, self.settings.max_skipped
        failed, read = tally.skipped.total(), tally.read
        # A few failures at the start are no basis for stopping; at the end every number counts.
        if failed > limit * read and (final or read >= ENOUGH):
            listed = self.partial.list_skipped(len(self.blocks))
            # Suggest to continue only if some samples are usable.
            or_else = (
                f", or go on with --resume --max-skipped {min(1.0, failed / read + 0.01):.2f}" if tally.good else ""
            )
            raise AtollError(f"{tally.failure(limit)}; {listed} lists them; mend the source{or_else}")
        if (unread := tally.unread_captions()) and not self.settings.allow_uncaptioned:
            raise AtollError(
                f"none of {tally.good:,} images has a caption, and there are {unread}; or go on without captions: "
                "--resume --allow-uncaptioned"
            )
        if final and not tally.good:
            reasons = [*tally.apart_lines(), *([tally.reasons()] if failed else [])]
            why = f": {'; '.join(reasons)}" if reasons else ""
            raise AtollError(f"the source holds no images that can be used{why}; check data.path")

    def _count(self, number: int) -> None:
        self.tally.add(self.partial.tally(number))
        self.done += 1

    def _report(self) -> None:
        if self.progress is None:
            return
        read = self.tally.read + sum(self.under_way)
        known = [block.samples for block in self.blocks]
        total = None
        # Use exact counts if all blocks have them, else extrapolate from the finished blocks.
        if all(samples is not None for samples in known):
            total = sum(samples for samples in known if samples is not None)
        elif self.done:
            total = max(
                read, round(self.tally.read / self.done * len(self.blocks))
            )  # the blocks to come are like these
        # The rate covers only the samples of this process.
        rate = (read - self.before) / (time.perf_counter() - self.start)
        skipped = self.tally.skipped.total() + self.under_way[1]
        self.progress(read, total, f"{rate:,.0f} images/s, {skipped:,} skipped")
