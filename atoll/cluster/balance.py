"""The balanced coarse stage: no cluster holds more than LARGEST times the mean, or than an even share rounded up."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.errors import AtollError

# No cluster holds more training images than LARGEST times the mean, nor (but for rounding to whole fine centroids)
# fewer than SMALLEST times the mean. Few images do not divide that evenly: 5 in 4 clusters are 2, 1, 1, 1.
SMALLEST, LARGEST = 0.75, 1.25
_CHOICES, _NODES = 4096, 2000  # labels times points, and steps of the search, for which `whole_transport` is tried


def most_images(total: float, k: int) -> float:
    """The training images that a balanced cluster holds at most, of `total` in k clusters."""
    return max(LARGEST * total / k, math.ceil(total / k))


def weighted_means(points: Tensor, weights: Tensor, labels: Tensor, k: int) -> Tensor:
    """The weighted mean [k,D] float64 of the points of each label; zero where there are none."""
    members = F.one_hot(labels, k).double() * weights.unsqueeze(1)  # [n,k]
    return (members.T @ points.double()) / members.sum(0).clamp(min=1).unsqueeze(1)


def balanced(points: Tensor, weights: Tensor, labels: Tensor, k: int, distinct: bool = False) -> Tensor:
    """Labels [n] of a k-means whose clusters weigh SMALLEST times the mean to `most_images`.

    Alternates between the means and the cheapest assignment within the bounds, as Lloyd's algorithm does without any.

    Args:
        points: fine centroids [n, D].
        weights: the training images of each [n].
        labels: the labels to begin with [n].
        distinct: every distinct feature has a centroid of its own, so that more centroids would change nothing.

    Raises:
        AtollError: single points weigh too much for balance.
    """
    total = float(weights.sum())
    mean, most = total / k, most_images(total, k)
    for _ in range(50):
        distances = torch.cdist(points.double(), weighted_means(points, weights, labels, k)).square()  # [n,k]
        before, labels = labels, transport(distances, weights, SMALLEST * mean, most)
        if torch.equal(labels, before):
            break
    largest, heaviest = float(labels.bincount(weights, minlength=k).max()), float(weights.max())
    if largest <= most:
        return labels
    if heaviest <= most and (whole := whole_transport(distances, weights, most)) is not None:
        return whole
    words = f"no balance: a cluster would hold {largest:.0f} images where the mean is {mean:.1f}"
    if not distinct:
        raise AtollError(
            f"{words}; one fine centroid has {heaviest:.0f}; raise clusters.fine, or take clusters.method: free"
        )
    fewer = int(LARGEST * total / heaviest)
    raise AtollError(
        f"{words}; {heaviest:.0f} of the {total:.0f} training images have one and the same feature: leave duplicates "
        f"out, take another feature{f', clusters.k up to {fewer}' if 1 < fewer < k else ''}, or clusters.method: free"
    )


def whole_transport(distances: Tensor, weights: Tensor, most: float) -> Tensor | None:
    """The cheapest labels [n] where a label weighs at most `most`, by integer programming; None if none was found.

    `transport` rounds a linear program's answer, which fails where single points fill a label. This takes time that can
    grow exponentially with n, so it is for a few hundred points, and gives up after _NODES steps.

    Args:
        distances: costs [n, k].
        weights: the points' weights [n].
        most: the largest weight of a label.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron

    n, k = distances.shape
    if n * k > _CHOICES:
        return None
    solved = milp(
        (distances * weights.unsqueeze(1)).flatten().numpy(),
        integrality=np.ones(n * k),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(kron(csr_array(weights.numpy().reshape(1, n)), eye_array(k)), -np.inf, most),
            LinearConstraint(kron(eye_array(n), np.ones((1, k))), 1, 1),  # each point has one label
            LinearConstraint(kron(np.ones((1, n)), eye_array(k)), 1, np.inf),  # and each label a point
        ],
        options={"node_limit": _NODES},
    )
    if solved.x is None:
        return None
    labels = torch.from_numpy(solved.x).reshape(n, k).argmax(1)
    return labels if float(labels.bincount(weights, minlength=k).max()) <= most else None


def transport(distances: Tensor, weights: Tensor, least: float, most: float) -> Tensor:
    """The cheapest labels [n] for points of distances [n,k] and weights [n] where a label weighs `least` to `most`.

    The linear program may split a few points, at most 2 k, over several labels. These go, the heaviest first, where
    they are cheapest: among the labels that still lack weight if there are any, else among those that still have room.
    Room is left for each if no point weighs more than a quarter of the mean.
    """
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, eye_array, kron, vstack

    n, k = distances.shape
    weight_of_label = kron(csr_array(weights.numpy().reshape(1, n)), eye_array(k))  # [k, n k]
    solved = linprog(
        (distances * weights.unsqueeze(1)).flatten().numpy(),
        A_ub=vstack([weight_of_label, -weight_of_label]),
        b_ub=np.repeat([most, -least], k),
        A_eq=kron(eye_array(n), np.ones((1, k))),  # each point has one label
        b_eq=np.ones(n),
        method="highs-ds",
    )
    share = torch.from_numpy(solved.x).reshape(n, k)
    labels = share.argmax(1)
    split = share.amax(1) < 1 - 1e-6
    held = labels[~split].bincount(weights[~split], minlength=k)  # [k]
    for point in sorted(split.nonzero().flatten().tolist(), key=lambda i: (-float(weights[i]), i)):
        fits = held + weights[point] <= most
        lacks = fits & (held < least)
        cost = distances[point].where(lacks if lacks.any() else fits, torch.inf) if fits.any() else held
        labels[point] = cost.argmin()
        held[labels[point]] += weights[point]
    return labels
