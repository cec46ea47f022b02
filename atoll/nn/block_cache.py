"""First-block caching: where a step changes little, what the blocks after the first one did is taken from before.

If the first block's residual is nearly what it was when the whole network was last asked, then so, by experience, is
the sum of all the others'. It costs quality, and how much depends on the threshold. After ParaAttention's first block
cache, which diffusers has too (after TeaCache, arXiv 2411.19108); here every sample of a batch decides for itself.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


class BlockCache:
    """What one network's blocks did to the samples that it was asked for.

    Args:
        threshold: of the relative change |r - r'|/|r'| of the first block's residual r (mean absolute values over a
            sample's tokens), below which the other blocks are not asked.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.calls = self.skipped = 0  # samples, of all calls
        self._kept: dict[
            Hashable, tuple[Tensor, Tensor]
        ] = {}  # of a sample: the first residual, the others' sum; [N,D]

    def through(
        self,
        keys: Sequence[Hashable],
        tokens: Tensor,
        once: Tensor,
        others: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The tokens [B,N,D] after all blocks.

        Args:
            keys: of the samples; one that comes twice in a batch is computed twice.
            tokens, once: before and after the first block.
            others: (rows [b], once[rows]) -> after all other blocks [b,N,D].
        """
        residual = once - tokens  # [B,N,D]
        known = [row for row, key in enumerate(keys) if key in self._kept]
        skipped: list[int] = []
        if known:
            before = torch.stack([self._kept[keys[row]][0] for row in known])  # [b,N,D]
            change = (residual[known] - before).abs().mean((1, 2)) / before.abs().mean((1, 2))  # [b]
            skipped = [row for row, little in zip(known, (change < self.threshold).tolist(), strict=True) if little]
        self.calls, self.skipped = self.calls + len(keys), self.skipped + len(skipped)
        done = torch.empty_like(once)
        if skipped:
            done[skipped] = once[skipped] + torch.stack([self._kept[keys[row]][1] for row in skipped])
        asked = sorted(set(range(len(keys))) - set(skipped))
        if asked:
            rows = torch.tensor(asked, device=once.device)
            computed = others(rows, once[rows])
            done[rows] = computed
            for place, row in enumerate(asked):
                self._kept[keys[row]] = (residual[row].clone(), computed[place] - once[row])
        return done
