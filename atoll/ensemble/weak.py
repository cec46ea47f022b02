"""Autoguidance: guidance away from a worse version of the model (Karras et al. 2024, arXiv 2406.02507).

    u = u_weak + g (u - u_weak)

In place of the null condition, a weak ensemble answers the same prompt at the same x and t: experts of fewer training
steps, of another average, or smaller ones. Both make the same errors, the weak one larger ones, so their difference
points away from errors and not towards what is typical of the prompt.

The weak ensemble is weighted by the main ensemble's weights of the clusters, never by its own router. Otherwise the
difference would also be that of two routings: p u - q u_weak with p > q leads to the clusters that one router prefers
more than the other does, however good their experts are; and a routing that cuts off or draws clusters could select
other clusters for both. By the same weights it is sum_k p_k (u_k - u_weak_k), the experts' own.
"""

import torch
from torch import Tensor

from atoll.ensemble.owners import Owners
from atoll.errors import AtollError
from atoll.shapes import per_sample


def guide(u: Tensor, u_weak: Tensor, scale: Tensor | None) -> Tensor:
    """Return u_weak + g (u - u_weak), [B, ...].

    Args:
        u: the main ensemble's velocity [B, ...].
        u_weak: the weak ensemble's [B, ...]; where there is no guidance it is not used.
        scale: g [B]; 1 is no guidance.
    """
    assert scale is not None  # a query with a weak ensemble has one
    # Without guidance it is u itself, which the formula would round.
    g = per_sample(scale, u)
    return torch.where(g != 1.0, u_weak + g * (u - u_weak), u)


def check_weak(owners: Owners, weak_owners: Owners, *, clusters: bool, nested: bool) -> None:
    """Raise AtollError unless an ensemble's weights are weights of a weak ensemble, too.

    Args:
        owners: of the main ensemble's clusters.
        weak_owners: those of the weak one.
        clusters: whether the main ensemble's routing weighs clusters.
        nested: whether the weak ensemble has a weak one itself.
    """
    if nested:
        raise AtollError("the weak ensemble has a weak ensemble itself; expected one without")
    # A routing over experts checks their names itself; a single expert has no weights to share.
    if not clusters:
        if owners.experts == 1 and weak_owners.experts > 1:
            raise AtollError(
                f"a weak ensemble of {weak_owners.experts} experts for a single expert without a router; expected one "
                "expert, which is evaluated where this one is"
            )
        return
    # Otherwise weight would be lost, at some level at least.
    covered, covered_weakly = (
        set(one.nonzero().squeeze(1).tolist()) for one in (owners.somewhere(), weak_owners.everywhere())
    )
    if missing := sorted(covered - covered_weakly):
        raise AtollError(
            f"the weak ensemble has no expert of cluster {', '.join(map(str, missing))}; expected one of each of the "
            f"{len(covered)} clusters that the ensemble covers"
        )
