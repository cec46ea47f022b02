"""Experts of any objective and a router, as one velocity function on the linear path (HDDM Eq. 1, DDM Eq. 6)."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from atoll.alignment import native_velocity, snr_velocity
from atoll.calibration import Calibration
from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.objective import Objective
from atoll.routing import build_routing
from atoll.shapes import per_sample

Alignment = Literal["snr", "native"]


class Network(Protocol):
    def __call__(self, x: Tensor, time: Tensor, condition: Condition | None, /) -> Tensor:
        """x [B, ...], time [B] (t * time_scale), condition of B rows -> [B, ...]."""


class RouterNetwork(Protocol):
    def __call__(self, x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        """x [B, ...], t [B] in [0, 1], pooled condition [B, P] -> log p(cluster | x, t) [B, K]."""


@dataclass(frozen=True)
class Expert:
    """A trained denoiser.

    Attributes:
        network: network(x [B, ...], time [B], condition) -> [B, ...]; a `torch.nn.Module` or any callable.
        objective: what it was trained with.
        clusters: the clusters it covers; a generalist covers several, a monolith all.
        calibration: measured after training; None applies HDDM's x0 clamp to eps-experts instead.
        name: for messages and traces.
    """

    network: Network
    objective: Objective
    clusters: tuple[int, ...] = (0,)
    calibration: Calibration | None = None
    name: str = "expert"

    def velocity(
        self, x: Tensor, t: Tensor, condition: Condition | None = None, alignment: Alignment = "snr"
    ) -> Tensor:
        """dx/dt on the linear sampling path, [B, ...], for x [B, ...] at times t [B]."""

        def predict(asked: Tensor, time: Tensor) -> Tensor:
            return self.network(asked, time, condition)

        if alignment == "native":
            return native_velocity(predict, self.objective, x, t)
        return snr_velocity(predict, self.objective, x, t, self.calibration)


@dataclass
class Trace:
    """Who was asked when: one entry per velocity call."""

    times: list[Tensor] = field(default_factory=list)  # each [B]
    weights: list[Tensor] = field(default_factory=list)  # each [B, E]


class Ensemble:
    """Router + experts as one velocity function.

    Args:
        experts: at least one. Experts that cover the same cluster with the same breadth are replicas and share its
            weight; a broader one stands in only where no narrower one covers a cluster. A cluster nobody covers loses
            its weight to the others.
        router: (x, t, pooled) -> log p [B, K]; may be None where one expert is all there is.
        routing: "top-1", "top-2", ..., "full".
        alignment: "snr" (exact) or "native" (HDDM's formulas).
        null: the null condition, one row; needed for guidance.

    Raises:
        AtollError: no experts, an unknown routing or alignment, or several clusters without a router.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        router: RouterNetwork | None,
        routing: str = "top-2",
        alignment: Alignment = "snr",
        null: Condition | None = None,
    ):
        if not experts:
            raise AtollError("an ensemble of no experts; expected at least one")
        if alignment not in get_args(Alignment):
            raise AtollError(f"unknown alignment {alignment!r}; expected snr or native")
        self.experts = tuple(experts)
        self.router = router
        self.routing = routing
        self.alignment: Alignment = alignment
        self.null = null
        self._weigh = build_routing(routing)
        self._owners = _owners(self.experts)
        if router is None and len(self.experts) > 1:
            raise AtollError(f"{len(self.experts)} experts without a router; expected a router, or one expert alone")
        self._trace: Trace | None = None
        for expert in self.experts if alignment == "snr" else ():
            if expert.calibration is None and expert.objective.prediction == "eps":
                warnings.warn(
                    f"{expert.name}: an eps-expert without calibration; its x0 is clamped to +-20 as in HDDM "
                    "(measure one when the expert is trained)",
                    stacklevel=2,
                )

    def weights(self, x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Each expert's weight [B, E]; rows sum to 1."""
        if self.router is None:
            return x.new_ones(len(x), 1)
        log_p = self.router(x, t, pooled).to(x.dtype)
        owners = self._owners.to(log_p)
        if owners.shape[1] != log_p.shape[1]:
            grown = owners.new_zeros(len(owners), max(owners.shape[1], log_p.shape[1]))
            grown[:, : owners.shape[1]] = owners
            owners = grown
            if owners.shape[1] > log_p.shape[1]:
                raise AtollError(
                    f"the router knows {log_p.shape[1]} clusters, the experts cover cluster {owners.shape[1] - 1}; "
                    "expected a router of the experts' own assignment"
                )
        covered = owners.sum(0) > 0  # [K]
        per_cluster = self._weigh(log_p.masked_fill(~covered, -torch.inf))  # [B, K]
        share = owners / owners.sum(0).clamp(min=1)  # replicas share alike
        return per_cluster @ share.T

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None, guidance_scale: float = 1.0) -> Tensor:
        """u = sum_k p(k | x) u_k on the linear path, [B, ...], for x [B, ...] at times t [B].

        Each expert in use is called once, for all samples that chose it and both guidance branches together:
        u = u_null + g (u_cond - u_null). The router sees x alone, or the conditional branch's pooled vector.

        Raises:
            AtollError: guidance without a condition or without a null condition.
        """
        guided = guidance_scale != 1.0
        if guided and (condition is None or self.null is None):
            missing = "condition" if condition is None else "null condition (Ensemble(..., null=...))"
            raise AtollError(f"guidance_scale is {guidance_scale} but there is no {missing}")
        weights = self.weights(x, t, self._pooled(len(x), condition))
        if self._trace is not None:
            self._trace.times.append(t.detach().cpu())
            self._trace.weights.append(weights.detach().float().cpu())
        velocity = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = weights[:, index].nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            x_rows, t_rows = x[rows], t[rows]
            if condition is None:
                u = expert.velocity(x_rows, t_rows, None, self.alignment)
            elif not guided:
                u = expert.velocity(x_rows, t_rows, condition.index(rows), self.alignment)
            else:
                both = Condition.cat([condition.index(rows), self._null_rows(len(rows))])
                u_both = expert.velocity(x_rows.repeat(2, *[1] * (x.ndim - 1)), t_rows.repeat(2), both, self.alignment)
                u_condition, u_null = u_both.chunk(2)
                u = u_null + guidance_scale * (u_condition - u_null)
            velocity.index_add_(0, rows, per_sample(weights[rows, index], u) * u)
        return velocity

    def _pooled(self, count: int, condition: Condition | None) -> Tensor | None:
        """What the router sees of the prompt; the null condition's where there is no prompt."""
        if condition is not None:
            return condition.pooled
        return None if self.null is None else self._null_rows(count).pooled

    def _null_rows(self, count: int) -> Condition:
        assert self.null is not None
        return self.null.index(torch.zeros(count, dtype=torch.long, device=self.null.states.device))

    @contextmanager
    def tracing(self) -> Iterator[Trace]:
        """Records who was asked when: `with ensemble.tracing() as trace: ...`."""
        self._trace = Trace()
        try:
            yield self._trace
        finally:
            self._trace = None

    def with_options(self, routing: str | None = None, alignment: Alignment | None = None) -> "Ensemble":
        """The same experts and router under another routing or alignment."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when this ensemble was made
            return Ensemble(self.experts, self.router, routing or self.routing, alignment or self.alignment, self.null)


def _owners(experts: Sequence[Expert]) -> Tensor:
    """[E, K]: 1 where the expert is among the narrowest that cover the cluster."""
    clusters = max(max(expert.clusters) for expert in experts) + 1
    owners = torch.zeros(len(experts), clusters)
    for k in range(clusters):
        breadths = [len(expert.clusters) if k in expert.clusters else None for expert in experts]
        known = [breadth for breadth in breadths if breadth is not None]
        for index, breadth in enumerate(breadths):
            if known and breadth == min(known):
                owners[index, k] = 1
    return owners
