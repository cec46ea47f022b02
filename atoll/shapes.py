"""The letters that name the axes of a tensor, everywhere in Atoll.

    B batch    C H W latent channels, height, width    N image tokens    L text tokens    D width
    K clusters    E experts    T steps of a discrete schedule

The mathematics does not know the shape of a latent: there, x is [B, ...].
"""

from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` [B] as [B, 1, ...], so that they multiply `like` [B, ...] sample by sample."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
