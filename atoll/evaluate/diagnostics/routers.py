"""How well a router knows a noisy latent's cluster, by noise level: accuracy, cross-entropy, calibration, confusion.

A router may be right and yet too sure of itself, or unsure: top-1 routing asks for accuracy alone, the exact mixture
(routing "full") for probabilities that are true.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.condition import Condition, Conditions
from atoll.ensemble import RouterNetwork
from atoll.errors import AtollError
from atoll.evaluate.metrics.frechet import noisy_latents

LEVELS = tuple((2 * i + 1) / 20 for i in range(10))  # t, as of the denoising error
BINS = 15  # of the calibration error (Guo et al. 2017)

# The condition of given rows [b] int64; for captions whose states would not fit into memory all at once.
ConditionOf = Callable[[Tensor], Condition | Conditions]
Given = Condition | Conditions | ConditionOf | None


@dataclass(frozen=True, eq=False)
class RouterRows:
    """Some rows of `HeldOut`, with their condition."""

    x0: Tensor
    labels: Tensor
    seeds: Sequence[int]
    condition: Condition | Conditions | None


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Latents that no expert was trained on, with the clusters that they belong to.

    Attributes:
        x0: latents [n, ...].
        labels: each one's cluster [n] int64.
        seeds: one per latent: its noise depends on its seed and the level alone, whatever is being measured.
        condition: of n rows, or a function of row numbers; None for unconditional networks.

    Raises:
        AtollError: no latents, or not as many labels and seeds as latents.
    """

    x0: Tensor
    labels: Tensor
    seeds: Sequence[int]
    condition: Given = None

    def __post_init__(self) -> None:
        n = len(self.x0)
        if n == 0 or self.labels.shape != (n,) or len(self.seeds) != n:
            raise AtollError(
                f"{n} held-out latents with labels {list(self.labels.shape)} and {len(self.seeds)} seeds; expected at "
                "least one latent, and a label and a seed for each"
            )
        if self.labels.is_floating_point() or int(self.labels.min()) < 0:
            raise AtollError(
                f"held-out labels of {self.labels.dtype}, least {self.labels.min()}; expected clusters from 0"
            )

    @property
    def clusters(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1

    def batches(self, size: int, device: torch.device | str) -> Iterator[RouterRows]:
        """Parts of at most `size` rows, on the device."""
        for rows in torch.arange(len(self.x0)).split(size):
            first, last = int(rows[0]), int(rows[-1]) + 1
            yield RouterRows(
                self.x0[first:last].to(device),
                self.labels[first:last].to(device),
                self.seeds[first:last],
                rows_of(self.condition, rows, device),
            )


def rows_of(condition: Given, rows: Tensor, device: torch.device | str) -> Condition | Conditions | None:
    """The condition of the given rows [b], on the device."""
    if condition is None:
        return None
    chosen = condition.index(rows) if isinstance(condition, Condition | Conditions) else condition(rows)
    return chosen.to(device)


@dataclass(frozen=True)
class RouterScores:
    """A router's answers on n held-out latents, at the times `levels` of the linear path [M].

    Attributes:
        count: n.
        majority: the share of the most frequent cluster: the accuracy of a router that always names it.
        entropy: of the clusters' shares, in nats: the cross-entropy of a router that knows the shares alone.
        accuracy: share of latents whose most probable cluster is their own [M].
        cross_entropy: mean of -log p(own cluster), in nats [M]; infinite where a router once rules out the truth.
        ece: expected calibration error [M], see `calibration_error`.
        ece_floor: what a router without any calibration error would be expected to have with so few latents [M].
        confusion: latents of cluster k (row) that are taken for cluster j (column), [M, K, K] counts.
    """

    count: int
    majority: float
    entropy: float
    levels: tuple[float, ...]
    accuracy: tuple[float, ...]
    cross_entropy: tuple[float, ...]
    ece: tuple[float, ...]
    ece_floor: tuple[float, ...]
    confusion: tuple[tuple[tuple[int, ...], ...], ...]


class Reliability:
    """Confidence against accuracy in bins of equal width, of answers that arrive in batches; memory BINS."""

    def __init__(self) -> None:
        self.bins = torch.zeros(BINS, 3, dtype=torch.float64)  # answers, sum of their confidences, right ones

    def update(self, confidence: Tensor, right: Tensor) -> None:
        """Adds the largest probabilities [n] and whether they stood at the true class [n] bool."""
        confidence, right = confidence.cpu().double(), right.cpu().double()
        # Guo et al.: bin m holds ((m - 1)/M, m/M].
        index = (torch.ceil(confidence * BINS) - 1).long().clamp(0, BINS - 1)
        self.bins.index_add_(0, index, torch.stack([torch.ones_like(confidence), confidence, right], dim=1))

    @property
    def error(self) -> float:
        """sum_m n_m/n |accuracy_m - confidence_m|."""
        count, confidence, right = self.bins.unbind(1)
        return float((right - confidence).abs().sum() / count.sum())

    @property
    def floor(self) -> float:
        """The error to be expected of true probabilities: in a bin with mean confidence c the number of right answers
        has a standard deviation of sqrt(n_m c (1 - c)), and a Gaussian's mean absolute value is sqrt(2/pi) of it."""
        count, confidence, _ = self.bins.unbind(1)
        mean = confidence / count.clamp(min=1)
        return float((2 / math.pi * count * mean * (1 - mean)).clamp(min=0).sqrt().sum() / count.sum())


def calibration_error(log_p: Tensor, labels: Tensor) -> float:
    """The expected calibration error of the largest probability, in 15 bins of equal width (Guo et al. 2017, Eq. 3).

    It is biased upwards by the number of answers: `Reliability.floor` says how far.

    Args:
        log_p: log-probabilities [n, K].
        labels: [n] int64.
    """
    bins = Reliability()
    confidence, answers = log_p.max(1)
    bins.update(confidence.exp(), answers == labels)
    return bins.error


@torch.inference_mode()
def measure_router(
    router: RouterNetwork,
    held_out: HeldOut,
    levels: Sequence[float] = LEVELS,
    encoder: int = 0,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> RouterScores:
    """Asks the router for the clusters of x_t = (1 - t) x0 + t eps, the noise that of `squared_errors`.

    Args:
        router: (x, t, pooled) -> log p [B, K].
        held_out: latents with their clusters.
        levels: times t of the linear path.
        encoder: which of several conditions' pooled vector the router sees (`Ensemble.router_encoder`).
        batch: latents at a time; memory is K^2 per level beside it.
        device: where the router is.

    Raises:
        AtollError: a label beyond the router's clusters.
    """
    bins = [Reliability() for _ in levels]
    surprise = torch.zeros(len(levels), dtype=torch.float64)
    confusion = None
    for part in held_out.batches(batch, device):
        given = part.condition.parts[encoder] if isinstance(part.condition, Conditions) else part.condition
        pooled = given.pooled if isinstance(given, Condition) else None
        for level, (x, _, t) in enumerate(noisy_latents(part.x0, levels, part.seeds)):
            log_p = router(x, t, pooled)  # [B, K]
            k = log_p.shape[1]
            if confusion is None:
                if held_out.clusters > k:
                    raise AtollError(
                        f"held-out latents of cluster {held_out.clusters - 1}, but the router knows {k} clusters; "
                        "expected labels of the assignment that it was trained on"
                    )
                confusion = torch.zeros(len(levels), k * k, dtype=torch.long)
            confidence, answers = log_p.max(1)
            bins[level].update(confidence.exp(), answers == part.labels)
            surprise[level] -= log_p.gather(1, part.labels[:, None]).cpu().double().sum()
            confusion[level] += torch.bincount((part.labels * k + answers).cpu(), minlength=k * k)
    assert confusion is not None  # there is at least one latent
    return _scores(held_out, levels, bins, surprise, confusion)


def _scores(
    held_out: HeldOut, levels: Sequence[float], bins: Sequence[Reliability], surprise: Tensor, confusion: Tensor
) -> RouterScores:
    n, k = len(held_out.x0), math.isqrt(confusion.shape[1])
    counts = confusion.reshape(len(levels), k, k)
    shares = torch.bincount(held_out.labels.cpu()).double() / n
    right = counts.diagonal(dim1=1, dim2=2).sum(1).double()
    return RouterScores(
        count=n,
        majority=float(shares.max()),
        entropy=float(-torch.special.xlogy(shares, shares).sum()),
        levels=tuple(levels),
        accuracy=tuple((right / n).tolist()),
        cross_entropy=tuple((surprise / n).tolist()),
        ece=tuple(b.error for b in bins),
        ece_floor=tuple(b.floor for b in bins),
        confusion=tuple(tuple(tuple(row) for row in level) for level in counts.tolist()),
    )
