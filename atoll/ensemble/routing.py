"""How the router's probabilities over clusters become weights: one small frozen class per routing.

| name | weights |
|---|---|
| `top-1`, `top-2`, ... | the k most probable clusters, renormalised (HDDM section 3.4, DDM section 4) |
| `full` | every cluster with its probability: the exact mixture (HDDM Eq. 1) |
| `threshold-0.1` | clusters of at least that probability, renormalised; the most probable one in any case |
| `nucleus-0.9` | the fewest clusters that together hold that probability, renormalised (Holtzman et al. 2020) |
| `nucleus-0.9@0.7` | the same for probabilities sharpened by a temperature: softmax(log p / 0.7) |
| `sample-1`, `sample-2` | that many clusters drawn by their probabilities at each step, each draw with equal weight |
| `oracle` | the cluster that the caller passes for each sample, for evaluation |
| `oracle-3` | cluster 3 for every sample |
| `time-switch-0.5:A:B` | expert A at t >= 0.5, expert B below, without a router (HDDM section 4.3) |

To add a routing: derive a frozen dataclass from `Routing` (`examples`, `needs_router`, `parse`, `weights`) and add one
line to `ROUTINGS` at the end of this file. `parse_routing`, atoll.yaml, the command line and the error texts follow;
the table above, the help of `atoll sample --routing` and `NAMES` in tests/ensemble/test_routing.py are written by hand.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atoll.errors import AtollError

_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_COUNT = r"([1-9]\d{0,8})"


@dataclass(frozen=True, eq=False)
class RoutingContext:
    """What a routing may use besides the probabilities.

    Attributes:
        x: the samples [B, ...].
        t: their times [B] in [0, 1]; None only if the routing does not use them.
        cluster: each sample's own cluster [B] int64, if the caller knows it.
        names: the experts' names, E of them.
    """

    x: Tensor
    t: Tensor | None = None
    cluster: Tensor | None = None
    names: Sequence[str] = ()


class Routing(ABC):
    """How log-probabilities become weights.

    Attributes:
        examples: how a person writes it, for error texts.
        needs_router: whether several experts cannot be routed this way without a router.
        over_experts: whether `weights` returns weights of the experts [B, E] instead of the clusters [B, K].
    """

    examples: ClassVar[str]
    needs_router: ClassVar[bool]
    over_experts: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> "Routing | None":
        """Return the routing that `text` names, or None if it is not one of this class."""

    @abstractmethod
    def weights(self, log_p: Tensor, context: RoutingContext) -> Tensor:
        """Return weights [B, K] (or [B, E], see `over_experts`) whose rows sum to 1.

        A cluster with log-probability -inf (no expert covers it) keeps weight 0.

        Args:
            log_p: log-probabilities of the clusters [B, K].
            context: the samples themselves.
        """

    def check(self, names: Sequence[str]) -> None:  # noqa: B027  # most routings name no expert
        """Raise AtollError if the routing names an expert that is not among `names`."""


@dataclass(frozen=True)
class TopK(Routing):
    """The k most probable clusters, renormalised; all of them if there are fewer."""

    k: int
    examples = "top-1, top-2, ..."
    needs_router = True

    @classmethod
    def parse(cls, text: str) -> "TopK | None":
        match = _match(f"top-{_COUNT}", text)
        return cls(int(match[1])) if match else None

    def weights(self, log_p: Tensor, context: RoutingContext) -> Tensor:
        # A softmax over the k values is their renormalisation.
        values, clusters = log_p.topk(min(self.k, log_p.shape[1]), dim=1)  # [B, k]
        return torch.zeros_like(log_p).scatter_(1, clusters, torch.softmax(values, dim=1))


@dataclass(frozen=True)
class Full(Routing):
    """Every cluster with its probability: the exact mixture."""

    examples = "full"
    needs_router = True

    @classmethod
    def parse(cls, text: str) -> "Full | None":
        return cls() if text == "full" else None

    def weights(self, log_p: Tensor, context: RoutingContext) -> Tensor:
        # Clusters without an expert have log-probability -inf; the softmax renormalises the rest.
        return torch.softmax(log_p, dim=1)


@dataclass(frozen=True)
class Threshold(Routing):
    """The probabilities of at least `minimum`, renormalised; the largest one in any case."""

    minimum: float
    examples = "threshold-0.1"
    needs_router = True

    @classmethod
    def parse(cls, text: str) -> "Threshold | None":
        match = _match(f"threshold-{_NUMBER}", text)
        return cls(float(match[1])) if match and float(match[1]) < 1 else None

    def weights(self, log_p: Tensor, context: RoutingContext) -> Tensor:
        # A tie for the largest probability keeps all of the tied clusters.
        p = torch.softmax(log_p, dim=1)
        large = (p >= self.minimum) | (p == p.amax(1, keepdim=True))
        return torch.softmax(log_p.masked_fill(~large, -torch.inf), dim=1)


@dataclass(frozen=True)
class Nucleus(Routing):
    """The most probable clusters up to the one with which they hold `mass`, renormalised."""

    mass: float
    temperature: float = 1.0
    examples = "nucleus-0.9, nucleus-0.9@0.7 (with a temperature)"
    needs_router = True

    @classmethod
    def parse(cls, text: str) -> "Nucleus | None":
        match = _match(f"nucleus-{_NUMBER}(?:@{_NUMBER})?", text)
        if match is None:
            return None
        # A number out of range is no nucleus: `parse_routing` then raises.
        mass, temperature = float(match[1]), float(match[2] or 1)
        return cls(mass, temperature) if 0 < mass <= 1 and temperature > 0 else None

    def weights(self, log_p: Tensor, context: RoutingContext) -> Tensor:
        # A cluster is inside if those before it do not hold the mass yet.
        p, order = torch.softmax(log_p / self.temperature, dim=1).sort(dim=1, descending=True, stable=True)
        inside = p.cumsum(1) - p < self.mass
        # The most probable cluster is always inside, whatever the rounding.
        inside[:, 0] = True
        p = torch.where(inside, p, 0)
        return torch.zeros_like(log_p).scatter_(1, order, p / p.sum(1, keepdim=True))


@dataclass(frozen=True)
class Sample(Routing):
    """`count` clusters drawn by their probabilities, with replacement; each weight is its fraction of the draws.

    The mean over draws is `full`. The draws depend on the sample x alone, so an image is the same in any batch and in
    any run.
    """

    count: int
    examples = "sample-1"
    needs_router = True

    @classmethod
    def parse(cls, text: str) -> "Sample | None":
        # Zero draws would leave no expert.
        match = _match(f"sample-{_COUNT}", text)
        return cls(int(match[1])) if match else None

    def weights(self, log_p: Tensor, context: RoutingContext) -> Tensor:
        # The inverse of the cumulative distribution, at numbers that are a hash of x.
        cumulative = torch.softmax(log_p.double(), dim=1).cumsum(1)  # [B, K]
        cumulative = cumulative / cumulative[:, -1:]  # exactly 1 from the last cluster on that has an expert
        u = _uniform(context.x, self.count).to(cumulative)  # [B, count]
        clusters = torch.searchsorted(cumulative, u, right=True).clamp(max=log_p.shape[1] - 1)
        return torch.zeros_like(log_p).scatter_add_(1, clusters, torch.full_like(u, 1 / self.count).to(log_p))


@dataclass(frozen=True)
class Oracle(Routing):
    """All weight on one cluster; if no expert covers it, the others' probabilities.

    Attributes:
        cluster: the same cluster for every sample; None: the cluster of each sample in the context.
    """

    cluster: int | None = None
    examples = "oracle, oracle-3"
    needs_router = False

    @classmethod
    def parse(cls, text: str) -> "Oracle | None":
        match = _match(r"oracle(?:-(\d{1,9}))?", text)
        return cls(None if match[1] is None else int(match[1])) if match else None

    def weights(self, log_p: Tensor, context: RoutingContext) -> Tensor:
        """Return weights [B, K].

        Raises:
            AtollError: there are no clusters in the context, not one per sample, or one of them does not exist.
        """
        # One cluster for all, or each sample's own.
        cluster = context.cluster
        if self.cluster is not None:
            cluster = torch.full((len(log_p),), self.cluster, device=log_p.device)
        if cluster is None:
            raise AtollError(
                "routing oracle needs each sample's cluster; pass `cluster`, or use oracle-3 for cluster 3"
            )
        if cluster.shape != (len(log_p),) or not ((cluster >= 0) & (cluster < log_p.shape[1])).all():
            got = cluster.tolist() if cluster.numel() < 10 else f"{cluster.numel()} of them"
            raise AtollError(f"routing oracle: clusters {got}; expected {len(log_p)} numbers below {log_p.shape[1]}")

        # All weight on it, if an expert covers it.
        own = cluster.to(log_p.device)[:, None]  # [B, 1]
        one_hot = torch.zeros_like(log_p).scatter_(1, own, 1.0)
        return torch.where(log_p.isfinite().gather(1, own), one_hot, torch.softmax(log_p, dim=1))


@dataclass(frozen=True)
class TimeSwitch(Routing):
    """The expert named `above` at t >= time, the expert named `below` at smaller t."""

    time: float
    above: str
    below: str
    examples = "time-switch-0.5:ABOVE:BELOW (two experts' names)"
    needs_router = False
    over_experts = True

    @classmethod
    def parse(cls, text: str) -> "TimeSwitch | None":
        match = _match(f"time-switch-{_NUMBER}:([^:]+):([^:]+)", text)
        return cls(float(match[1]), match[2], match[3]) if match and float(match[1]) <= 1 else None

    def weights(self, log_p: Tensor, context: RoutingContext) -> Tensor:
        assert context.t is not None
        # The two experts split the samples by time.
        weights = context.x.new_zeros(len(context.x), len(context.names))  # [B, E]
        above = context.t >= self.time
        weights[above, context.names.index(self.above)] = 1
        weights[~above, context.names.index(self.below)] = 1
        return weights

    def check(self, names: Sequence[str]) -> None:
        # A name that occurs twice would be ambiguous.
        for name in (self.above, self.below):
            if list(names).count(name) != 1:
                routing = f"time-switch-{self.time:g}:{self.above}:{self.below}"
                raise AtollError(f"routing {routing}: no expert {name!r}; expected one of {', '.join(names)}")


# Every routing there is: a new one is one class above and one line here.
ROUTINGS: tuple[type[Routing], ...] = (
    TopK,
    Full,
    Threshold,
    Nucleus,
    Sample,
    Oracle,
    TimeSwitch,
)


def parse_routing(text: str) -> Routing:
    """Return the routing that a name such as "top-2" means.

    Raises:
        AtollError: an unknown name, or a number out of its range.
    """
    # At most one class takes a name.
    for kind in ROUTINGS:
        routing = kind.parse(text)
        if routing is not None:
            return routing
    # The error lists every routing with an example.
    *others, last = (kind.examples for kind in ROUTINGS)
    raise AtollError(f"unknown routing {text!r}; expected {', '.join(others)} or {last}")


def _match(pattern: str, text: str) -> re.Match[str] | None:
    # ASCII digits only: float() would also read other scripts.
    return re.fullmatch(pattern, text, re.ASCII)


def _uniform(x: Tensor, count: int) -> Tensor:
    """Return uniform numbers [B, count] in [0, 1), float64: a hash of each sample."""
    # Six bytes per number: 48 bits, which float64 holds exactly.
    rows = [hashlib.shake_128(row.tobytes()).digest(6 * count) for row in x.detach().float().cpu().numpy()]
    numbers = [[int.from_bytes(row[6 * i : 6 * i + 6]) / 2**48 for i in range(count)] for row in rows]
    return torch.tensor(numbers, dtype=torch.float64).reshape(len(x), count)
