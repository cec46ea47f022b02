"""How the router's probabilities over clusters become weights.

top-1, top-2, ...     the k most probable clusters, renormalised (HDDM section 3.4, DDM section 4)
full                  all clusters, as probable as they are: the exact mixture (HDDM Eq. 1)
threshold-0.1         clusters of at least that probability, renormalised; the most probable one at any rate
nucleus-0.9           the fewest clusters that hold that probability together, renormalised (Holtzman et al. 2020)
nucleus-0.9@0.7       the same of probabilities sharpened by a temperature: softmax(log p / 0.7)
sample-1, sample-2    so many clusters drawn with their probabilities at each step, each draw weighing alike
oracle                the cluster that the caller names for each sample, for evaluation
oracle-3              cluster 3 for every sample
time-switch-0.5:A:B   expert A at t >= 0.5, expert B below, whatever the router says (HDDM section 4.3)
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.errors import AtollError

EXPECTED = (
    "top-1, top-2, ..., full, threshold-0.1, nucleus-0.9, nucleus-0.9@0.7 (with a temperature), sample-1, oracle, "
    "oracle-3 or time-switch-0.5:ABOVE:BELOW (two experts' names)"
)


@dataclass(frozen=True)
class RoutingContext:
    """What a routing may look at besides the probabilities: x [B, ...]; cluster [B] int64, each sample's, if known."""

    x: Tensor
    cluster: Tensor | None = None


RoutingFunction = Callable[[Tensor, RoutingContext], Tensor]


@dataclass(frozen=True)
class TimeSwitch:
    """Above: the name of the expert at t >= time; below: of the other."""

    time: float
    above: str
    below: str


def build_routing(routing: str) -> RoutingFunction | TimeSwitch:
    """What a name such as "top-2" means: a function of log-probabilities [B, K] and of what else is asked about, to
    weights [B, K] whose rows sum to 1; or a switch between two experts.

    A cluster with log-probability -inf (no expert) keeps weight 0; with fewer than k others, all of them are used.

    Raises:
        AtollError: an unknown name, or a number out of its range.
    """
    name, _, given = routing.partition("-")
    value = _number(given.partition("@")[0]) if given else None
    if routing == "full":
        return lambda log_p, asked: torch.softmax(log_p, dim=1)
    if name == "top" and re.fullmatch(r"[1-9]\d*", given):
        return lambda log_p, asked: top_k(log_p, int(given))
    if name == "sample" and re.fullmatch(r"[1-9]\d*", given):
        return lambda log_p, asked: drawn(log_p, asked.x, int(given))
    if name == "threshold" and value is not None and "@" not in given and 0 <= value < 1:
        return lambda log_p, asked: threshold(log_p, value)
    if name == "nucleus" and value is not None and 0 < value <= 1:
        temperature = _number(given.partition("@")[2]) if "@" in given else 1.0
        if temperature is not None and temperature > 0:
            return lambda log_p, asked: nucleus(log_p, value, temperature)
    if routing == "oracle":
        return lambda log_p, asked: oracle(log_p, asked.cluster)
    if name == "oracle" and given.isdecimal() and given.isascii():
        return lambda log_p, asked: oracle(log_p, torch.full((len(log_p),), int(given), device=log_p.device))
    if match := re.fullmatch(r"time-switch-([\d.]+):([^:]+):([^:]+)", routing):
        time = _number(match[1])
        if time is not None and 0 <= time <= 1:
            return TimeSwitch(time, match[2], match[3])
    raise AtollError(f"unknown routing {routing!r}; expected {EXPECTED}")


def top_k(log_p: Tensor, k: int) -> Tensor:
    """The k most probable clusters' probabilities, renormalised; 0 elsewhere. [B, K] -> [B, K]."""
    k = min(k, log_p.shape[1])
    values, clusters = log_p.topk(k, dim=1)
    return torch.zeros_like(log_p).scatter_(1, clusters, torch.softmax(values, dim=1))


def threshold(log_p: Tensor, least: float) -> Tensor:
    """The probabilities of at least `least`, renormalised; 0 elsewhere. The largest one is kept. [B, K] -> [B, K]."""
    p = torch.softmax(log_p, dim=1)
    kept = (p >= least) | (p == p.amax(1, keepdim=True))
    return torch.softmax(log_p.masked_fill(~kept, -torch.inf), dim=1)


def nucleus(log_p: Tensor, share: float, temperature: float = 1.0) -> Tensor:
    """The most probable clusters up to the one with which they hold `share`, renormalised. [B, K] -> [B, K]."""
    p, order = torch.softmax(log_p / temperature, dim=1).sort(dim=1, descending=True, stable=True)
    kept = p.cumsum(1) - p < share
    kept[:, 0] = True
    p = torch.where(kept, p, 0)
    return torch.zeros_like(log_p).scatter_(1, order, p / p.sum(1, keepdim=True))


def drawn(log_p: Tensor, x: Tensor, count: int) -> Tensor:
    """`count` clusters drawn by their probabilities, with replacement: the share of the draws. [B, K] -> [B, K].

    Its mean over draws is `full`. What is drawn depends on the sample x [B, ...] alone, so that an image is the same
    in any batch and at any run.
    """
    cumulative = torch.softmax(log_p.double(), dim=1).cumsum(1)  # [B, K]
    cumulative = cumulative / cumulative[:, -1:]  # exactly 1 from the last cluster on that has an expert
    u = _uniform(x, count).to(cumulative)  # [B, count]
    clusters = torch.searchsorted(cumulative, u, right=True).clamp(max=log_p.shape[1] - 1)
    return torch.zeros_like(log_p).scatter_add_(1, clusters, torch.full_like(u, 1 / count).to(log_p))


def oracle(log_p: Tensor, cluster: Tensor | None) -> Tensor:
    """All weight on each sample's cluster [B]; where that has no expert, the others' probabilities. -> [B, K].

    Raises:
        AtollError: the clusters are not given, are not one per sample, or one of them does not exist.
    """
    if cluster is None:
        raise AtollError("routing oracle needs each sample's cluster; give `cluster`, or take oracle-3 for cluster 3")
    if cluster.shape != (len(log_p),) or not ((cluster >= 0) & (cluster < log_p.shape[1])).all():
        got = cluster.tolist() if cluster.numel() < 10 else f"{cluster.numel()} of them"
        raise AtollError(f"routing oracle: clusters {got}; expected {len(log_p)} numbers below {log_p.shape[1]}")
    one = torch.zeros_like(log_p).scatter_(1, cluster.to(log_p.device)[:, None], 1.0)
    there = log_p.isfinite().gather(1, cluster.to(log_p.device)[:, None])
    return torch.where(there, one, torch.softmax(log_p, dim=1))


def _uniform(x: Tensor, count: int) -> Tensor:
    """Uniform numbers [B, count] in [0, 1), float64: a hash of each sample."""
    rows = [hashlib.shake_128(row.tobytes()).digest(6 * count) for row in x.detach().float().cpu().numpy()]
    numbers = [[int.from_bytes(row[6 * i : 6 * i + 6]) / 2**48 for i in range(count)] for row in rows]
    return torch.tensor(numbers, dtype=torch.float64).reshape(len(x), count)


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?|\.\d+", text) and text.isascii() else None
