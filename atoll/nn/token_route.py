"""Image tokens that pass some blocks by: a hook of `atoll.nn.mmdit` for training on a part of the tokens."""

from dataclasses import dataclass

from torch import Tensor

from atoll.errors import AtollError


@dataclass(frozen=True, eq=False)
class TokenRoute:
    """Image tokens that pass through some blocks; the others skip these (TREAD, arXiv 2501.04765).

    Attributes:
        first, last: blocks first..last-1 are the ones that others skip.
        kept: the tokens that pass, [B,n] int64, different ones in a row.
    """

    first: int
    last: int
    kept: Tensor

    def take(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """The kept tokens of [B,N,...], or with `dim` 2 of [1 or B,1,N,...]."""
        index = self.kept.reshape(len(self.kept), *(1,) * (dim - 1), -1, *(1,) * (tokens.dim() - dim - 1))
        tokens = tokens.expand(len(self.kept), *tokens.shape[1:])
        return tokens.gather(dim, index.expand(*tokens.shape[:dim], -1, *tokens.shape[dim + 1 :]))

    def put(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """The tokens [B,N,D] with the kept ones [B,n,D] in their places."""
        return tokens.scatter(1, self.kept[..., None].expand_as(kept), kept)  # [B,N,D]

    def check(self, rows: int, tokens: int, depth: int) -> None:
        """Raise AtollError unless the route fits a batch of `rows`, each of so many tokens, and a network's depth."""
        if not 0 <= self.first < self.last <= depth:
            raise AtollError(f"route: got blocks {self.first}..{self.last}, expected 0 <= first < last <= {depth}")
        if self.kept.dim() != 2 or len(self.kept) != rows or not 0 < self.kept.shape[1] <= tokens:
            raise AtollError(
                f"route: got kept tokens of shape {list(self.kept.shape)}, expected [{rows}, 1 to {tokens}]"
            )
