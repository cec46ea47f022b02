"""A text encoder for class names from a closed list: each is one token, a one-hot vector."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field

from atoll.condition import Condition, Tokens
from atoll.encoders.text.encoder import TextEncoder
from atoll.errors import AtollError
from atoll.storage import bounds


class LabelConfig(BaseModel):
    """The configuration of a label encoder.

    Attributes:
        labels: the class names; the path of a text file with one per line (blank lines are ignored); or the number of
            classes, which are then called 0, 1, 2, ...
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["label"] = "label"
    labels: (
        Annotated[tuple[str, ...], Field(max_length=bounds.MAX_LABELS)]
        | str
        | Annotated[int, Field(strict=True, ge=1, le=bounds.MAX_LABELS)]
    )


class LabelEncoder(TextEncoder):
    """A class name as one-hot states [B, 1, n] and pooled [B, n]; the empty caption, no class, is zeros.

    Cards store the names themselves, so that their numbers never change with a file.

    Args:
        labels: the class names.

    Raises:
        AtollError: no labels, an empty one (it would be the null condition), or a repeated one.
    """

    name = "label"
    zero_padding = True  # there is none: one token, zeros for no class
    length = 1

    def __init__(self, labels: Sequence[str]):
        # Names must be unique, and none may be the empty caption.
        self._labels = tuple(label.strip() for label in labels)
        if not self._labels or "" in self._labels:
            raise AtollError(
                f"condition encoder 'label': {'an empty label' if self._labels else 'no labels'}; "
                "expected at least one class name, none of them empty"
            )
        self._numbers = {label: number for number, label in enumerate(self._labels, start=1)}  # 0 is the null condition
        if len(self._numbers) < len(self._labels):
            twice = next(label for label in self._labels if self._labels.count(label) > 1)
            raise AtollError(f"condition encoder 'label': the label {twice!r} is repeated; rename or remove one")
        # A one-hot vector is as wide as the list.
        self.dim = self.pooled_dim = len(self._labels)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Tokenize B class names to [B, 1].

        Raises:
            AtollError: a caption that is not a label; the text names the nearest label.
        """
        # One token per caption: the number of its label.
        ids = torch.tensor([self._number(caption.strip()) for caption in captions], dtype=torch.int64).reshape(-1, 1)
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

    def encode(self, tokens: Tokens) -> Condition:
        # Number 0, the null condition, has no place in the vector: it is all zeros.
        states = F.one_hot(tokens.ids, self.dim + 1)[..., 1:].float()  # [B,1,n]
        return Condition(states, tokens.mask, states[:, 0])

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "labels": list(self._labels)}

    def _number(self, caption: str) -> int:
        # The empty caption is the null condition.
        if not caption:
            return 0
        # A caption that is no label is a mistake in the data: name the nearest label.
        number = self._numbers.get(caption)
        if number is None:
            near = difflib.get_close_matches(caption, self._labels, n=1, cutoff=0)
            raise AtollError(
                f"{caption!r} is none of the {self.dim} labels; the nearest is {near[0]!r}: correct the caption, "
                "or add it to condition.labels"
            )
        return number


def read_labels(labels: tuple[str, ...] | str | int) -> tuple[str, ...]:
    """Return the labels: as they are, the lines of a file, or as many numbers.

    Raises:
        AtollError: the file cannot be read.
    """
    # A tuple holds the labels themselves, a text names their file, a number counts them.
    if isinstance(labels, int):
        return tuple(map(str, range(labels)))
    if not isinstance(labels, str):
        return labels
    # One label per line; a byte-order mark is ignored.
    path = Path(os.path.expanduser(os.path.expandvars(labels)))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AtollError(
            f"condition.labels: {path} cannot be read ({error}); name a text file, one label a line"
        ) from None
    return tuple(line for line in text.splitlines() if line.strip())
