"""Where the tokens of a latent lie: one rule for every size, so that one network serves several.

A network has a base grid, that of the size that its weights were first trained at. Tokens of this grid lie at whole
numbers from 0 on. Those of any other grid share its centre, and their step is the one with which the grid covers the
same area, equally long by row and by column:

    position(i) = (i - (n - 1)/2) s + (n_base - 1)/2,    s = sqrt(N_base / N)

So what is in the middle of an image lies at one position in every aspect, nothing is distorted, and a larger grid is
interpolated into the positions that the weights know (position interpolation: arXiv 2306.15595 for rotations, PixArt-
Sigma, arXiv 2403.04692, for sinusoids) instead of reaching beyond them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.nn.rotary import grid_positions
from atoll.storage import bounds

TokenGrid = tuple[int, int]  # rows and columns of tokens


def sincos_positions(rows: int, columns: int, width: int, span: float | None = None) -> Tensor:
    """Fixed 2D positions [rows*columns, width]: half of the width for the column, half for the row.

    The column comes first, as in DiT's get_2d_sincos_pos_embed (despite its variable names).

    Args:
        rows, columns: tokens of a column and of a row of the grid.
        width: D, a multiple of 4.
        span: None places tokens at 0, 1, 2, ...; a number at equal steps in [0, span), as PixArt does for a network of
            another size.
    """
    steps = [torch.arange(n, dtype=torch.float64) * (1 if span is None else span / n) for n in (rows, columns)]
    row, column = torch.meshgrid(steps, indexing="ij")  # [rows,columns]
    return sincos(torch.stack([row, column], dim=2).flatten(0, 1), width)


def sincos(positions: Tensor, width: int) -> Tensor:
    """Sinusoids [N, width], float32, of (row, column) [N, 2]: half for the column, then half for the row."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))  # [D/4]
    row, column = positions.double().T
    angles = torch.stack([column, row]).reshape(2, -1, 1) * frequencies  # [2,N,D/4]
    by_column, by_row = torch.cat([angles.sin(), angles.cos()], dim=2)  # [N,D/2] each
    return torch.cat([by_column, by_row], dim=1).float()  # [N,D]


class SincosTable:
    """The fixed positions of a network, whose buffer holds those of its own size; computed once for others.

    Args:
        grid: of the network's own size.
        base: see the head of this file.
        width: D.
    """

    def __init__(self, grid: TokenGrid, base: TokenGrid, width: int):
        self._grid, self._base, self._width = grid, base, width
        self._others: dict[TokenGrid, Tensor] = {}
        self._is_checked = False

    def own(self) -> Tensor:
        """Return the positions [N,D] of the network's own size."""
        return sincos(positions_of(self._grid, self._base), self._width)

    def has(self, buffer: Tensor) -> bool:
        """Return whether positions [N,D] of the network's own size are these sinusoids."""
        # Weights may be rounded to bfloat16.
        return torch.allclose(buffer.float().cpu(), self.own(), atol=0.02)

    def at(self, grid: TokenGrid, buffer: Tensor) -> Tensor:
        """Return the positions [N,D] of a grid.

        Args:
            grid: of the latent.
            buffer: the network's own positions, as they were loaded.

        Raises:
            AtollError: another grid than the network's own, whose positions are not these sinusoids.
        """
        if grid == self._grid:
            return buffer
        if not self._is_checked:
            # A converted network brings positions of its own, for one size.
            if not self.has(buffer):
                raise AtollError(
                    f"latent: got a grid of {grid[0]} x {grid[1]} tokens; this network has positions of its own, for "
                    f"{self._grid[0]} x {self._grid[1]} alone: keep to its size"
                )
            self._is_checked = True
        if grid not in self._others:
            self._others[grid] = sincos(positions_of(grid, self._base), self._width)
        positions = self._others[grid] = self._others[grid].to(buffer.device)
        return positions


def sincos_table(size: Sequence[int], base_size: Sequence[int] | None, patch: int, width: int) -> SincosTable:
    """Return the table for a network of latents of a size (H, W), with the base size of its configuration."""
    grid, base = ((H // patch, W // patch) for H, W in (size, base_size or size))
    return SincosTable(grid, base, width)


def token_grid(x: Tensor, time: Tensor, channels: int, patch: int) -> TokenGrid:
    """Return the grid of tokens of a latent.

    Args:
        x: [B, C, H, W].
        time: [B].
        channels: C.
        patch: side of a token.

    Raises:
        AtollError: another number of channels or times, sides that the patch does not divide, or too many tokens.
    """
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % patch or x.shape[3] % patch:
        raise AtollError(
            f"latent: got shape {list(x.shape)}, expected [B, {channels}, H, W] with sides that are multiples of the "
            f"patch, {patch}; encode with the codec that the network was built for"
        )
    if time.shape != x.shape[:1]:
        raise AtollError(f"time: got shape {list(time.shape)}, expected [{len(x)}]; use time.expand({len(x)})")
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    if rows * columns > bounds.MAX_PATCHES:
        raise AtollError(f"latent: {rows * columns:,} tokens, expected at most {bounds.MAX_PATCHES:,}; sample smaller")
    return rows, columns


def positions_of(grid: TokenGrid, base: TokenGrid, device: torch.device | None = None) -> Tensor:
    """Return (row, column) of every token of a grid, row by row: [N,2], float32."""
    if grid == base:
        return grid_positions(*grid, device)
    step = math.sqrt(base[0] * base[1] / (grid[0] * grid[1]))
    centre = torch.tensor([[(n - 1) / 2] for n in grid], dtype=torch.float64)  # [2,1]
    base_centre = torch.tensor([[(n - 1) / 2] for n in base], dtype=torch.float64)
    # In float64: a rounded step would shift the far tokens.
    places = grid_positions(*grid).double().T  # [2,N]
    return ((places - centre) * step + base_centre).T.to(device, torch.float32)  # [N,2]
