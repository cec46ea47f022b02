"""The caption of a training row at a step: one of the image's captions, with some of its tags dropped.

Tags are the parts of a caption between commas. Dropout and order are those of kohya's sd-scripts (keep_tokens,
shuffle_caption, caption_tag_dropout_rate) and of OneTrainer's mode RANDOM: the first tags are kept in place; the others
are shuffled, then each is dropped with the same probability.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.encoders.text import LabelEncoder, TextEncoder
from atoll.errors import AtollError
from atoll.manifest import TrainSettings
from atoll.randomness import Stream, seeded
from atoll.storage.shards import Weighted, choose


@dataclass(frozen=True)
class TagDropout:
    """How the tags of a caption change.

    Attributes:
        rate: the probability with which a tag is dropped.
        keep: the first tags, which stay as they are.
        shuffle: whether the others come in random order.
    """

    rate: float = 0.0
    keep: int = 0
    shuffle: bool = False

    def __bool__(self) -> bool:
        return self.rate > 0 or self.shuffle

    def __call__(self, caption: str, random_numbers: random.Random) -> str:
        """Return the caption with its remaining tags, joined by ", "; "" if all were dropped."""
        tags = [tag.strip() for tag in caption.split(",")]
        first, rest = tags[: self.keep], tags[self.keep :]
        # Sorted by random numbers: `Random.shuffle` may differ between versions of Python, `Random.random` does not.
        if self.shuffle:
            rest = [tag for _, tag in sorted((random_numbers.random(), tag) for tag in rest)]
        rest = [tag for tag in rest if random_numbers.random() >= self.rate]
        return ", ".join(tag for tag in (*first, *rest) if tag)


ALL_TAGS = TagDropout()  # none is dropped


def tag_dropout(settings: TrainSettings, encoder: TextEncoder) -> TagDropout:
    """Return what the settings say about tags.

    Raises:
        AtollError: the encoder reads whole class names.
    """
    tags = TagDropout(settings.tag_dropout, settings.keep_tags, settings.shuffle_tags)
    if tags and isinstance(encoder, LabelEncoder):
        raise AtollError(
            "train.tag_dropout, train.shuffle_tags: the label encoder reads whole class names, not tags; leave both out"
        )
    return tags


def caption_draws(seed: int, index: int, count: int) -> Tensor:
    """Return a random number for the caption of each row of a batch, [count] int64; a function of (seed, index)."""
    return torch.randint(2**63 - 1, (count,), generator=seeded(seed, index, Stream.CAPTIONS))


def drawn_captions(
    captions: Sequence[str], others: Sequence[Sequence[Weighted]], draws: Tensor, tags: TagDropout
) -> list[str]:
    """Return one caption for each of b rows.

    Args:
        captions: their first captions, of weight 1.
        others: their other captions.
        draws: from `caption_draws`, [b] int64.
        tags: what happens to the tags.
    """
    drawn = []
    for first, more, draw in zip(captions, others, draws.tolist(), strict=True):
        # Each row has its own random numbers: how many one takes does not move those of another.
        numbers = random.Random(draw)
        caption = choose(first, more, numbers.random()) if more else first
        drawn.append(tags(caption, numbers) if tags else caption)
    return drawn
