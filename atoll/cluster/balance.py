"""The balanced coarse stage: no cluster holds more than LARGEST times the mean."""

import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.errors import AtollError

# No cluster holds more training images than LARGEST times the mean, nor (but for rounding to whole fine centroids)
# fewer than SMALLEST times the mean.
SMALLEST, LARGEST = 0.75, 1.25


def weighted_means(points: Tensor, weights: Tensor, labels: Tensor, k: int) -> Tensor:
    """The weighted mean [k,D] float64 of the points of each label; zero where there are none."""
    members = F.one_hot(labels, k).double() * weights.unsqueeze(1)  # [n,k]
    return (members.T @ points.double()) / members.sum(0).clamp(min=1).unsqueeze(1)


def balanced(points: Tensor, weights: Tensor, labels: Tensor, k: int) -> Tensor:
    """Labels [n] of a k-means whose clusters weigh SMALLEST to LARGEST times the mean.

    Alternates between the means and the cheapest assignment within the bounds, as Lloyd's algorithm does without any.
    Raises AtollError if single points weigh too much for that.
    """
    mean = float(weights.sum()) / k
    for _ in range(50):
        distances = torch.cdist(points.double(), weighted_means(points, weights, labels, k)).square()  # [n,k]
        before, labels = labels, transport(distances, weights, SMALLEST * mean, LARGEST * mean)
        if torch.equal(labels, before):
            break
    heaviest = float(labels.bincount(weights, minlength=k).max())
    if heaviest > LARGEST * mean:
        raise AtollError(
            f"no balance: a cluster would hold {heaviest:.0f} images where the mean is {mean:.1f}; one fine centroid "
            f"has {float(weights.max()):.0f}; raise clusters.fine, or take clusters.method: free"
        )
    return labels


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
