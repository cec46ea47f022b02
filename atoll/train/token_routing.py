"""Routed tokens in training: which tokens of a batch pass all blocks (TREAD, arXiv 2501.04765).

The others skip the middle blocks, see `atoll.nn.token_route`. In the last steps all tokens pass, as in sampling.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.manifest import TokenRouteSettings, TrainSettings
from atoll.manifest.training import FEW_TOKENS
from atoll.nn import patch_of
from atoll.nn.token_route import TokenRoute
from atoll.randomness import Stream, seeded

KEPT = "kept"  # a batch's tokens that pass all blocks


@dataclass(frozen=True)
class TokenRouting:
    """The routes of a training.

    Attributes:
        settings: `train.token_route`.
        first, last: tokens skip blocks first..last-1.
        end: batches with a smaller index have a route.
        tokens: of the smallest image.
    """

    settings: TokenRouteSettings
    first: int
    last: int
    end: int
    tokens: int

    @staticmethod
    def of(
        settings: TrainSettings, network: dict[str, Any], shapes: Sequence[Sequence[int]], tap: int | None
    ) -> "TokenRouting | None":
        """Return the routes that the settings describe; None without any.

        Args:
            settings: of the training.
            network: its config.
            shapes: (C, H, W) of the latents.
            tap: the number of blocks after which all tokens are read; None: they are not.

        Raises:
            AtollError: a network without routes or with too few blocks; too few tokens; a tap within the route.
        """
        if (route := settings.token_route) is None:
            return None
        # Images of the smallest size lose most.
        tokens = min(math.prod(shape[1:]) for shape in shapes) // patch_of(network) ** 2
        first, last = route.blocks(str(network.get("name")), network.get("depth", 0), tokens)
        if tap is not None and first < tap <= last:
            raise AtollError(
                f"train.token_route: targets are read after {tap} blocks, where tokens are missing; set "
                f"train.targets_block to at most {first} or above {last}, or change first and last"
            )
        return TokenRouting(route, first, last, route.end(settings.steps), tokens)

    def warning(self) -> str | None:
        """Return a line for images that have few tokens."""
        if self.tokens > FEW_TOKENS:
            return None
        return (
            "train.token_route: routed tokens pay from about 1,024 tokens an image, and published results are worse at "
            f"256; this image has {self.tokens}"
        )

    def draw(self, seed: int, index: int, count: int, tokens: int) -> Tensor | None:
        """Return the tokens of each row that pass all blocks, [count,n] int64 in ascending order.

        A function of (seed, index) for these sizes; None for a batch without a route.
        """
        if index >= self.end:
            return None
        # The positions of the smallest of N random numbers are n different tokens.
        order = torch.rand(count, tokens, generator=seeded(seed, index, Stream.ROUTE)).argsort(dim=1, stable=True)
        return order[:, : self.settings.kept(tokens)].sort(dim=1).values

    def route(self, kept: Tensor) -> TokenRoute:
        """Return the network's argument for drawn tokens [b,n]."""
        return TokenRoute(self.first, self.last, kept)


def routed_batches(settings: TrainSettings) -> int:
    """Return how many batches have routed tokens; those that a rollback skips count, too."""
    return settings.token_route.end(settings.steps) if settings.token_route is not None else 0
