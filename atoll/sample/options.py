"""The options of `atoll sample` that are checked together, and the images of each prompt."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, StrictStr

from atoll.errors import AtollError
from atoll.storage import bounds
from atoll.storage.cards import CardRecord

MAX_IMAGES = 100_000  # of one prompt
ImageCount = Annotated[int, Field(strict=True, ge=1, le=MAX_IMAGES)]


class PromptLine(CardRecord):
    """One line of a prompt file.

    Attributes:
        prompt: the prompt.
        negative_prompt: None: that of the command line.
        seed: of the first image; the others count up. None: the command line decides.
        n: number of images; None: that of the command line.
    """

    prompt: StrictStr
    negative_prompt: StrictStr | None = None
    seed: bounds.Seed | None = None
    n: ImageCount | None = None


@dataclass(frozen=True)
class PromptImages:
    """The images of one prompt.

    Attributes:
        number: of the prompt, from 1.
        prompt: the prompt.
        negative_prompt: "" is the null condition.
        seeds: one per image.
    """

    number: int
    prompt: str
    negative_prompt: str
    seeds: Sequence[int]


@dataclass(frozen=True)
class ImageOptions:
    """The command line's options for the images of each prompt.

    Args:
        negative_prompt: for prompts without their own.
        n: images per prompt; None: 1, or one per seed of `seeds`.
        seed: of the first image of all; the others count up. None: 0.
        seeds: of each prompt's images, in place of `seed`.

    Raises:
        AtollError: fewer than one image, seed and seeds together, or another number of seeds than n.
    """

    negative_prompt: str = ""
    n: int | None = None
    seed: int | None = None
    seeds: Sequence[int] | None = None

    def __post_init__(self) -> None:
        # Options that contradict each other.
        if self.n is not None and not 1 <= self.n <= MAX_IMAGES:
            raise AtollError(f"--n is {self.n}; expected a number of images per prompt, 1 to {MAX_IMAGES:,}")
        if self.seeds is None:
            return
        if self.seed is not None:
            raise AtollError("--seed and --seeds were both given; expected one of them")
        if self.n is not None and self.n != len(self.seeds):
            raise AtollError(f"--n is {self.n} but --seeds has {len(self.seeds)}; expected equal numbers")

    def images(self, lines: Iterable[PromptLine], where: str = "line") -> Iterator[PromptImages]:
        """Return the images of each prompt, without reading ahead.

        Args:
            lines: the prompts.
            where: what a line is called in messages.

        Raises:
            AtollError: a line with a seed or a number of its own besides --seeds.
        """
        # Seeds count up over all images, so that no two prompts share their noise by accident.
        counted = 0
        for number, line in enumerate(lines, start=1):
            if self.seeds is not None and (line.seed, line.n) != (None, None):
                raise AtollError(f"{where} {number} has a seed or n of its own; remove it, or leave --seeds out")
            n = line.n or self.n or 1
            first = (self.seed or 0) + counted if line.seed is None else line.seed
            seeds = range(first, first + n) if self.seeds is None else self.seeds
            counted += len(seeds)
            negative = self.negative_prompt if line.negative_prompt is None else line.negative_prompt
            yield PromptImages(number, line.prompt, negative, seeds)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse seeds: "0,1,2", "0-9" (both included), or "0-3,7".

    Raises:
        AtollError: another form, a seed beyond 64 bits, one that comes twice, or too many.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d{1,19})(?:-(\d{1,19}))?\s*", part, re.ASCII)
        if match is None:
            raise AtollError(f"--seeds is {text!r:.60}; expected numbers and ranges, such as 0,1,2 or 0-9")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise AtollError(f"--seeds has {part.strip()}; expected the lower seed first, such as {high}-{low}")
        # Checked before the range is expanded: it may be of any length.
        if low < -(2**63) or high >= 2**63 or len(seeds) + high - low >= MAX_IMAGES:
            raise AtollError(f"--seeds has {part.strip()}; expected at most {MAX_IMAGES:,} seeds of 64 bits")
        seeds += range(low, high + 1)
    # Two images of one prompt and one seed would have one name.
    if len(set(seeds)) < len(seeds):
        raise AtollError(f"--seeds has {len(seeds)}, {len(set(seeds))} of them different; expected each seed once")
    return tuple(seeds)


def parse_range(text: str) -> tuple[float, float]:
    """Parse two times: "0.2,0.8". Raises AtollError for another form or times outside 0 to 1."""
    # The lower time first, as in `Pipeline`.
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise AtollError(f"--guidance-range is {text!r:.60}; expected two times from 0 to 1, such as 0.2,0.8")
    return low, high


def check_output(
    out: str,
    prompts: Sequence[str] | None,
    prompts_file: str | None,
    *,
    side: int | None,
    trace: Path | None,
    batch: int | None,
) -> bool:
    """Return whether `out` is a directory of images, in place of a sheet.

    Raises:
        AtollError: no prompts, prompts of two origins, or an option that belongs to the other kind of output.
    """
    # A trailing slash says what is not there yet.
    directory = out.endswith("/") or Path(out).is_dir()
    if prompts and prompts_file is not None:
        raise AtollError("prompts and --prompts were both given; expected one of them")
    if not prompts and prompts_file is None:
        raise AtollError("no prompts; expected at least one, or --prompts FILE")
    # Options of a grid, and those of files.
    grid = [name for name, value in (("--side", side), ("--trace", trace)) if value is not None]
    files = [name for name, value in (("--prompts", prompts_file), ("--batch", batch)) if value is not None]
    if directory and grid:
        raise AtollError(
            f"{grid[0]} belongs to a grid of images; leave it out, or name an image file in place of {out}"
        )
    if not directory and files:
        raise AtollError(
            f"{files[0]} writes one file per image; name a directory in place of {out}, such as -o images/"
        )
    return directory
