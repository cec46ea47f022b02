"""How well a router predicts a noisy latent's cluster by noise level: accuracy, cross-entropy, calibration, confusion.

A router can be accurate and still overconfident or underconfident. Top-1 routing needs accuracy only; the exact mixture
(routing "full") needs calibrated probabilities.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.condition import Condition, move_to
from atoll.ensemble import RouterNetwork
from atoll.errors import AtollError
from atoll.evaluate.metrics.frechet import noisy_latents

LEVELS = tuple((2 * i + 1) / 20 for i in range(10))  # times t, those of the denoising error
BINS = 15  # for the calibration error (Guo et al. 2017)

# The conditions of rows [b] int64, one per text encoder. A function, as all captions' states may not fit into memory.
ConditionSource = Callable[[Tensor], tuple[Condition, ...]]


@dataclass(frozen=True, eq=False)
class RouterRows:
    """Some rows of `HeldOut`, with their condition."""

    x0: Tensor
    labels: Tensor
    seeds: Sequence[int]
    condition: tuple[Condition, ...] | None


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Latents that no expert was trained on, with their clusters.

    Attributes:
        x0: latents [n, ...].
        labels: cluster of each latent [n] int64.
        seeds: one per latent; its noise depends only on its seed and the level.
        condition: a function of row numbers; None for unconditional networks.

    Raises:
        AtollError: no latents, or another number of labels or seeds.
    """

    x0: Tensor
    labels: Tensor
    seeds: Sequence[int]
    condition: ConditionSource | None = None

    def __post_init__(self) -> None:
        # A wrong number of labels would shift all of them silently.
        n = len(self.x0)
        if n == 0 or self.labels.shape != (n,) or len(self.seeds) != n:
            raise AtollError(
                f"{n} held-out latents with labels {list(self.labels.shape)} and {len(self.seeds)} seeds; expected at "
                "least one latent, and a label and a seed for each"
            )
        # Labels index the router's outputs.
        if self.labels.is_floating_point() or int(self.labels.min()) < 0:
            raise AtollError(
                f"held-out labels of {self.labels.dtype}, minimum {self.labels.min()}; expected clusters from 0"
            )

    @property
    def clusters(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1

    def batches(self, size: int, device: torch.device | str) -> Iterator[RouterRows]:
        """Parts of at most `size` rows, on the device."""
        for rows in torch.arange(len(self.x0)).split(size):
            # Rows are consecutive: slices avoid a copy.
            first, last = int(rows[0]), int(rows[-1]) + 1
            yield RouterRows(
                self.x0[first:last].to(device),
                self.labels[first:last].to(device),
                self.seeds[first:last],
                rows_of(self.condition, rows, device),
            )


def rows_of(
    condition: ConditionSource | None, rows: Tensor, device: torch.device | str
) -> tuple[Condition, ...] | None:
    """The conditions of rows [b], on the device."""
    return None if condition is None else move_to(condition(rows), device)


@dataclass(frozen=True)
class RouterScores:
    """A router's predictions on n held-out latents, at the times `levels` of the linear path [M].

    Attributes:
        count: n.
        majority: fraction of the most frequent cluster, which is the accuracy of always predicting it.
        entropy: of the clusters' frequencies in nats, which is the cross-entropy of predicting them.
        levels: times t [M].
        accuracy: fraction of latents whose most probable cluster is their own [M].
        cross_entropy: mean of -log p(own cluster) in nats [M]; infinite if a probability is 0.
        ece: expected calibration error [M], see `calibration_error`.
        ece_floor: expected value of `ece` for a perfectly calibrated router with as many latents [M].
        confusion: latents of cluster k (row) that the router assigns to cluster j (column), [M, K, K] counts.
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
    """Confidence against accuracy in bins of equal width; predictions arrive in batches, memory is `BINS`."""

    def __init__(self) -> None:
        self.bins = torch.zeros(BINS, 3, dtype=torch.float64)  # predictions, sum of confidences, correct ones

    def update(self, confidence: Tensor, correct: Tensor) -> None:
        """Add the largest probabilities [n], and whether they are at the true class [n] bool."""
        # Sums on the CPU, in float64.
        confidence, correct = confidence.cpu().double(), correct.cpu().double()
        # As in Guo et al., bin m holds ((m - 1)/M, m/M].
        index = (torch.ceil(confidence * BINS) - 1).long().clamp(0, BINS - 1)
        self.bins.index_add_(0, index, torch.stack([torch.ones_like(confidence), confidence, correct], dim=1))

    @property
    def error(self) -> float:
        """The calibration error, sum_m n_m/n |accuracy_m - confidence_m|."""
        # With sums instead of means, the counts of the bins cancel.
        count, confidence, correct = self.bins.unbind(1)
        return float((correct - confidence).abs().sum() / count.sum())

    @property
    def floor(self) -> float:
        """The expected error of calibrated probabilities.

        In a bin with mean confidence c, the number of correct predictions has a standard deviation of
        sqrt(n_m c (1 - c)); a Gaussian's mean absolute value is sqrt(2/pi) times that.
        """
        count, confidence, _ = self.bins.unbind(1)
        # An empty bin contributes nothing.
        mean = confidence / count.clamp(min=1)
        return float((2 / math.pi * count * mean * (1 - mean)).clamp(min=0).sqrt().sum() / count.sum())


def calibration_error(log_p: Tensor, labels: Tensor) -> float:
    """The expected calibration error of the largest probability, in 15 bins of equal width (Guo et al. 2017, Eq. 3).

    It is biased upwards, the more the fewer the predictions are: see `Reliability.floor`.

    Args:
        log_p: log-probabilities [n, K].
        labels: true classes [n] int64.
    """
    # All predictions are one batch here.
    bins = Reliability()
    confidence, predictions = log_p.max(1)
    bins.update(confidence.exp(), predictions == labels)
    return bins.error


@torch.inference_mode()
def measure_router(
    router: RouterNetwork,
    held_out: HeldOut,
    levels: Sequence[float] = LEVELS,
    *,
    encoder: int = 0,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> RouterScores:
    """Evaluate the router on x_t = (1 - t) x0 + t eps, with the noise of `squared_errors`.

    Args:
        router: (x, t, pooled) -> log p [B, K].
        held_out: latents with their clusters.
        levels: times t of the linear path.
        encoder: index of the condition whose pooled vector the router reads, if there are several
            (`Ensemble.router_encoder`).
        batch: latents at a time; beside a batch, memory is K^2 per level.
        device: of the router.

    Raises:
        AtollError: a label beyond the router's clusters.
    """
    # Sums over the latents, at each level; the router's output sets the number of clusters.
    bins = [Reliability() for _ in levels]
    negative_log_p = torch.zeros(len(levels), dtype=torch.float64)
    confusion = None
    for rows in held_out.batches(batch, device):
        # The router reads the pooled vector alone.
        pooled = None if rows.condition is None else rows.condition[encoder].pooled
        for level, (x, _, t) in enumerate(noisy_latents(rows.x0, levels, rows.seeds)):
            log_p = router(x, t, pooled)  # [B, K]
            k = log_p.shape[1]
            if confusion is None:
                # Labels of another assignment would give meaningless numbers.
                if held_out.clusters > k:
                    raise AtollError(
                        f"held-out latents of cluster {held_out.clusters - 1}, but the router has {k} clusters; "
                        "expected labels of the assignment that it was trained on"
                    )
                confusion = torch.zeros(len(levels), k * k, dtype=torch.long)
            # Confidence and correctness, the loss, and who is taken for whom.
            confidence, predictions = log_p.max(1)
            bins[level].update(confidence.exp(), predictions == rows.labels)
            negative_log_p[level] -= log_p.gather(1, rows.labels[:, None]).cpu().double().sum()
            confusion[level] += torch.bincount((rows.labels * k + predictions).cpu(), minlength=k * k)
    # Means over all latents.
    assert confusion is not None  # there is at least one latent
    return _scores(held_out, levels, bins, negative_log_p, confusion)


def _scores(
    held_out: HeldOut, levels: Sequence[float], bins: Sequence[Reliability], negative_log_p: Tensor, confusion: Tensor
) -> RouterScores:
    """Means over n latents, from the sums at each level."""
    # The confusion is stored flat, with k^2 entries per level.
    n, k = len(held_out.x0), math.isqrt(confusion.shape[1])
    # Accuracy is the diagonal of the confusion; frequencies come from the labels.
    counts = confusion.reshape(len(levels), k, k)
    fractions = torch.bincount(held_out.labels.cpu()).double() / n
    correct = counts.diagonal(dim1=1, dim2=2).sum(1).double()
    return RouterScores(
        count=n,
        majority=float(fractions.max()),
        entropy=float(-torch.special.xlogy(fractions, fractions).sum()),
        levels=tuple(levels),
        accuracy=tuple((correct / n).tolist()),
        cross_entropy=tuple((negative_log_p / n).tolist()),
        ece=tuple(b.error for b in bins),
        ece_floor=tuple(b.floor for b in bins),
        confusion=tuple(tuple(tuple(row) for row in level) for level in counts.tolist()),
    )
