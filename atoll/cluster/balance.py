"""The balanced coarse stage: no cluster holds more than LARGEST times the mean, or than an even share rounded up."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.errors import AtollError

# No cluster holds more training images than LARGEST times the mean, nor (except for rounding to whole fine centroids)
# fewer than SMALLEST times the mean. Few images do not divide that evenly: 5 in 4 clusters are 2, 1, 1, 1.
SMALLEST, LARGEST = 0.75, 1.25
# `whole_transport` is tried up to so many points times labels, and gives up after so many search nodes.
_CHOICES, _NODES = 4096, 2000
_ROUNDS = 50


def most_images(total: float, k: int) -> float:
    """Return how many of `total` training images a balanced cluster may hold, in k clusters."""
    return max(LARGEST * total / k, math.ceil(total / k))


def weighted_means(points: Tensor, weights: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return the weighted mean of the points of each label.

    Args:
        points: [n, D].
        weights: [n].
        labels: [n] int64 in 0..k-1.
        k: number of labels.

    Returns:
        [k, D] float64; zero for a label without points.
    """
    # In float64, since a cluster may sum millions of images.
    members = F.one_hot(labels, k).double() * weights.unsqueeze(1)  # [n,k]
    return (members.T @ points.double()) / members.sum(0).clamp(min=1).unsqueeze(1)


def balanced(points: Tensor, weights: Tensor, labels: Tensor, k: int, distinct: bool = False) -> Tensor:
    """Improve the labels of a k-means under bounds: each cluster weighs SMALLEST times the mean to `most_images`.

    Like Lloyd's algorithm, it alternates between means and assignment, here the cheapest one within the bounds.

    Args:
        points: fine centroids [n, D].
        weights: their training images [n].
        labels: to start from, [n] int64 in 0..k-1.
        k: number of clusters.
        distinct: every distinct feature has its own centroid already, so more centroids would change nothing.

    Returns:
        Labels [n] int64.

    Raises:
        AtollError: single points weigh too much for balance.
    """
    # Alternate until no label changes.
    total = float(weights.sum())
    mean, most = total / k, most_images(total, k)
    for _ in range(_ROUNDS):
        distances = torch.cdist(points.double(), weighted_means(points, weights, labels, k)).square()  # [n,k]
        before, labels = labels, transport(distances, weights, SMALLEST * mean, most)
        if torch.equal(labels, before):
            break
    # Rounding may break the bounds: try whole points, else explain.
    largest, heaviest = float(labels.bincount(weights, minlength=k).max()), float(weights.max())
    if largest <= most:
        return labels
    if heaviest <= most and (whole := whole_transport(distances, weights, most)) is not None:
        return whole
    # Only the user can resolve it: the message names the settings that help.
    problem = f"no balance: a cluster would hold {largest:.0f} images where the mean is {mean:.1f}"
    if not distinct:
        raise AtollError(
            f"{problem}; one fine centroid has {heaviest:.0f}; raise clusters.fine, or take clusters.method: free"
        )
    fewer = int(LARGEST * total / heaviest)
    raise AtollError(
        f"{problem}; {heaviest:.0f} of the {total:.0f} training images have the same feature: leave duplicates "
        f"out, choose another feature{f', clusters.k up to {fewer}' if 1 < fewer < k else ''}, or clusters.method: free"
    )


def whole_transport(distances: Tensor, weights: Tensor, most: float) -> Tensor | None:
    """Return the cheapest labels under the bound that no label weighs more than `most`, by integer programming.

    `transport` rounds the solution of a linear program, which fails if single points fill a label. Integer programming
    does not, but its time can grow exponentially with n, so it is for a few hundred points.

    Args:
        distances: cost of each point and label, [n, k].
        weights: of the points, [n].
        most: upper bound of a label's weight.

    Returns:
        Labels [n] int64, or None if none were found.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron

    n, k = distances.shape
    # The time can grow exponentially with the size.
    if n * k > _CHOICES:
        return None
    # One binary variable per point and label; the cost is the squared distance times the images.
    solution = milp(
        (distances * weights.unsqueeze(1)).flatten().numpy(),
        integrality=np.ones(n * k),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(kron(csr_array(weights.numpy().reshape(1, n)), eye_array(k)), -np.inf, most),
            LinearConstraint(kron(eye_array(n), np.ones((1, k))), 1, 1),  # each point has one label
            LinearConstraint(kron(np.ones((1, n)), eye_array(k)), 1, np.inf),  # each label has a point
        ],
        options={"node_limit": _NODES},
    )
    if solution.x is None:
        return None
    # The solver works with tolerances: check the bound on the rounded labels.
    labels = torch.from_numpy(solution.x).reshape(n, k).argmax(1)
    return labels if float(labels.bincount(weights, minlength=k).max()) <= most else None


def transport(distances: Tensor, weights: Tensor, least: float, most: float) -> Tensor:
    """Return the cheapest labels under the bound that every label weighs `least` to `most`.

    The linear program may split a few points, at most 2 k, over several labels. These points are then assigned whole,
    the heaviest first, to their cheapest label among those that still lack weight, or if there are none, among those
    that still have room. There is room for every point if none weighs more than a quarter of the mean.

    Args:
        distances: cost of each point and label, [n, k].
        weights: of the points, [n].
        least: lower bound of a label's weight.
        most: upper bound of a label's weight.

    Returns:
        Labels [n] int64.
    """
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, eye_array, kron, vstack

    # The transport problem as a linear program.
    n, k = distances.shape
    weight_of_label = kron(csr_array(weights.numpy().reshape(1, n)), eye_array(k))  # [k, n k]
    solution = linprog(
        (distances * weights.unsqueeze(1)).flatten().numpy(),
        A_ub=vstack([weight_of_label, -weight_of_label]),
        b_ub=np.repeat([most, -least], k),
        A_eq=kron(eye_array(n), np.ones((1, k))),  # the fractions of a point sum to 1
        b_eq=np.ones(n),
        method="highs-ds",
    )
    # Most points belong to one label alone.
    fraction = torch.from_numpy(solution.x).reshape(n, k)
    labels = fraction.argmax(1)
    # Assign the points whole that it splits over several labels.
    split = fraction.amax(1) < 1 - 1e-6
    weight = labels[~split].bincount(weights[~split], minlength=k)  # [k], of the labels so far
    # The heaviest first: light points still fit into the room that is left.
    for point in sorted(split.nonzero().flatten().tolist(), key=lambda i: (-float(weights[i]), i)):
        fits = weight + weights[point] <= most
        lacks = fits & (weight < least)
        cost = distances[point].where(lacks if lacks.any() else fits, torch.inf) if fits.any() else weight
        labels[point] = cost.argmin()
        weight[labels[point]] += weights[point]
    return labels
