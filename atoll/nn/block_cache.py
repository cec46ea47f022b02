"""First-block caching: if a step changes little, the residual of all blocks after the first is reused.

If the first block's residual is close to its value at the last full evaluation, the sum of the other blocks' residuals
usually is too. Reusing it costs some quality; the threshold sets how much. The idea is ParaAttention's and diffusers'
(after TeaCache, arXiv 2411.19108). Here each sample of a batch decides on its own.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


class BlockCache:
    """The cached residuals of one network, by sample.

    Args:
        threshold: relative change |r - r'|/|r'| of the first block's residual r (mean absolute value over a sample's
            tokens) below which the other blocks are skipped.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.calls = self.skipped = 0  # samples, over all calls
        # By sample: the first block's residual and the sum of the others', [N,D] each.
        self._residuals: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def through(
        self,
        keys: Sequence[Hashable],
        tokens: Tensor,
        once: Tensor,
        others: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the tokens [B,N,D] after all blocks.

        Args:
            keys: one per sample; a sample that occurs twice in a batch is computed twice.
            tokens: before the first block [B,N,D].
            once: after the first block [B,N,D].
            others: (rows [b], once[rows]) -> tokens after all other blocks [b,N,D].
        """
        # Which samples changed little since their last full evaluation?
        residual = once - tokens  # [B,N,D]
        known = [row for row, key in enumerate(keys) if key in self._residuals]
        skipped: list[int] = []
        if known:
            before = torch.stack([self._residuals[keys[row]][0] for row in known])  # [b,N,D]
            change = (residual[known] - before).abs().mean((1, 2)) / before.abs().mean((1, 2))  # [b]
            skipped = [row for row, little in zip(known, (change < self.threshold).tolist(), strict=True) if little]
        self.calls, self.skipped = self.calls + len(keys), self.skipped + len(skipped)
        output = torch.empty_like(once)
        # Skipped samples: add the cached residual.
        if skipped:
            output[skipped] = once[skipped] + torch.stack([self._residuals[keys[row]][1] for row in skipped])
        # The others: run the blocks and cache what they did.
        active = sorted(set(range(len(keys))) - set(skipped))
        if active:
            rows = torch.tensor(active, device=once.device)
            computed = others(rows, once[rows])
            output[rows] = computed
            for place, row in enumerate(active):
                self._residuals[keys[row]] = (residual[row].clone(), computed[place] - once[row])
        return output
