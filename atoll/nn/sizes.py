"""Sizes of a transformer for latents that must fit each other."""

import math

from atoll.errors import AtollError
from atoll.storage import bounds


def check_sizes(size: tuple[int, int], patch: int, width: int, heads: int) -> None:
    """Raise AtollError unless `patch` divides both sides of `size`, and `heads` and 4 divide `width`.

    Also raise it for more tokens than attention can be computed over.
    """
    if size[0] % patch or size[1] % patch:
        raise AtollError(f"size {size[0]}x{size[1]}, patch {patch}: the patch must divide both; change one")
    if (tokens := (size[0] // patch) * (size[1] // patch)) > bounds.MAX_PATCHES:
        raise AtollError(
            f"size {size[0]}x{size[1]}, patch {patch}: {tokens:,} tokens, expected at most {bounds.MAX_PATCHES:,}; "
            "take a larger patch"
        )
    if width % heads:
        raise AtollError(f"width {width}, heads {heads}: the heads must divide the width; change one")
    if width % 4:
        raise AtollError(f"width {width}: 2D positions need a multiple of 4; take {4 * math.ceil(width / 4)}")


def check_head_width(width: int, heads: int) -> None:
    """Raise AtollError unless 4 divides the width of a head: rotary positions turn pairs, half of them by the row."""
    if (width // heads) % 4:
        raise AtollError(
            f"width {width}, heads {heads}: each head is {width // heads} wide; rotary positions need a multiple of 4"
        )
