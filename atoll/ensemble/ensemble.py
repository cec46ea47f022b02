"""Experts of any objective and a router, as one velocity function on the linear path (HDDM Eq. 1, DDM Eq. 6)."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from atoll.alignment import native_velocity, snr_velocity
from atoll.calibration import Calibration
from atoll.condition import Condition, Conditions
from atoll.ensemble.offload import expert_cache_of, selection_probs
from atoll.ensemble.prompt_cache import CACHE_BYTES, Prompt, PromptCache, each
from atoll.ensemble.replicas import Stacking, check_replicas, replica_shares
from atoll.ensemble.routing import RoutingContext, TimeSwitch, build_routing
from atoll.errors import AtollError
from atoll.objective import Objective
from atoll.shapes import per_sample

Alignment = Literal["snr", "native"]


class Network(Protocol):
    def __call__(self, x: Tensor, time: Tensor, condition: Any, /) -> Tensor:
        """x [B, ...], time [B] (t * time_scale), condition of B rows or None -> [B, ...].

        A condition is a `Condition`, or what the network's own `read_prompt` made of one, if it has such a method.
        """


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
        encoder: which of the prompt's conditions it reads, where there are several.
    """

    network: Network
    objective: Objective
    clusters: tuple[int, ...] = (0,)
    calibration: Calibration | None = None
    name: str = "expert"
    encoder: int = 0

    def velocity(
        self, x: Tensor, t: Tensor, condition: Prompt | None = None, alignment: Alignment = "snr", raw: bool = False
    ) -> Tensor:
        """dx/dt on the linear sampling path, [B, ...], for x [B, ...] at times t [B].

        raw: neither calibrated nor clamped; what `Stacking` combines.
        """

        def predict(asked: Tensor, time: Tensor) -> Tensor:
            return self.network(asked, time, condition)

        if alignment == "native":
            return native_velocity(predict, self.objective, x, t)
        calibration = Calibration.identity(torch.zeros((), dtype=x.dtype)) if raw else self.calibration
        return snr_velocity(predict, self.objective, x, t, calibration)


@dataclass
class Trace:
    """Who was asked when: one entry per velocity call."""

    times: list[Tensor] = field(default_factory=list)  # each [B]
    weights: list[Tensor] = field(default_factory=list)  # each [B, E]


class Ensemble:
    """Router + experts as one velocity function.

    Args:
        experts: at least one. Experts that cover the same cluster with the same breadth are replicas and are combined
            as `replicas` says; a broader one stands in only where no narrower one covers a cluster. A cluster nobody
            covers loses its weight to the others.
        router: (x, t, pooled) -> log p [B, K]; may be None where one expert is all there is, or the caller names the
            clusters (routing "oracle").
        routing: a name of `atoll.ensemble.routing`: "top-2", "full", "nucleus-0.9", ...
        alignment: "snr" (exact) or "native" (HDDM's formulas).
        null: the null condition, one row (of each encoder, where there are several); needed for guidance.
        stackings: the weights of replicas, as `atoll assemble` found them.
        replicas: "stacked" where there is a stacking for them, else alike; "inverse-error", "equal",
            "time-switch-0.5" (HDDM section 4.3).
        router_encoder: which of the prompt's conditions the router sees the pooled vector of.
        drops: an expert that answers with NaN or infinity is left out from then on; else its answer is kept.

    Raises:
        AtollError: no experts, an unknown routing, alignment or way to combine replicas, several clusters without a
            router, or a time switch between experts that are not there.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        router: RouterNetwork | None,
        routing: str = "top-2",
        alignment: Alignment = "snr",
        null: Condition | Conditions | None = None,
        stackings: Sequence[Stacking] = (),
        replicas: str = "stacked",
        router_encoder: int = 0,
        drops: bool = True,
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
        self.stackings = tuple(stackings)
        self.replicas = check_replicas(replicas)
        self.router_encoder = router_encoder
        self.drops = drops
        self.dropped: dict[str, str] = {}  # experts that failed in use, and how
        self._store = expert_cache_of([expert.network for expert in self.experts])
        self._selection_probs: list[float] = []  # of each expert to be asked next, where a store wants to know
        self._weigh = build_routing(routing)
        self._owners = _owners(self.experts)
        self._groups = _groups(self.experts, self.stackings if replicas == "stacked" and alignment == "snr" else ())
        needs_router = not isinstance(self._weigh, TimeSwitch) and not routing.startswith("oracle")
        if router is None and len(self.experts) > 1 and needs_router:
            raise AtollError(f"{len(self.experts)} experts without a router; expected a router, or one expert alone")
        if isinstance(self._weigh, TimeSwitch):
            self._number(self._weigh.above), self._number(self._weigh.below)
        self._trace: Trace | None = None
        stacked = {index for members, stacking in self._groups if stacking is not None for index in members}
        for index, expert in enumerate(self.experts if alignment == "snr" else ()):
            if expert.calibration is None and expert.objective.prediction == "eps" and index not in stacked:
                warnings.warn(
                    f"{expert.name}: an eps-expert without calibration; its x0 is clamped to +-20 as in HDDM "
                    "(`atoll calibrate` measures one)",
                    stacklevel=2,
                )

    def weights(self, x: Tensor, t: Tensor, pooled: Tensor | None = None, cluster: Tensor | None = None) -> Tensor:
        """Each expert's weight [B, E]; rows sum to 1. cluster [B]: each sample's own, for routing "oracle"."""
        if isinstance(self._weigh, TimeSwitch):
            return self._switched(self._weigh, t, x)
        if self.router is None and len(self.experts) == 1:
            return x.new_ones(len(x), 1)
        if self.router is None:  # the caller names the clusters
            log_p = x.new_zeros(len(x), self._owners.shape[1])
        else:
            log_p = self.router(x, t, pooled).to(x.dtype)
        owners = self._living().to(log_p)  # [E, K]
        if owners.shape[1] > log_p.shape[1]:
            raise AtollError(
                f"the router knows {log_p.shape[1]} clusters, the experts cover cluster {owners.shape[1] - 1}; "
                "expected a router of the experts' own assignment"
            )
        owners = torch.nn.functional.pad(owners, (0, log_p.shape[1] - owners.shape[1]))
        log_p = log_p.masked_fill(owners.sum(0) == 0, -torch.inf)  # a cluster that nobody covers
        if self._store is not None:
            self._selection_probs = selection_probs(log_p, owners)
        per_cluster = self._weigh(log_p, RoutingContext(x, cluster))  # [B, K]
        weights = per_cluster @ (owners / owners.sum(0).clamp(min=1)).T  # replicas alike
        for members, stacking in self._groups:
            weights[:, members] = weights[:, members].sum(1, keepdim=True) * self._shares(members, stacking, t)
        return weights

    def prompts(
        self, condition: Condition | Conditions, limit: int = CACHE_BYTES, block_cache: float = 0.0
    ) -> PromptCache:
        """The prompts of one sampling, for `velocity`: each expert reads a prompt once, not at every step.

        Good for as long as the experts' weights stay; numbers differ by rounding, or by what `block_cache` spares.
        Arguments and errors as in `PromptCache`.
        """
        return PromptCache(each(condition), None if self.null is None else each(self.null), limit, block_cache)

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition | Conditions | PromptCache | None = None,
        guidance_scale: float = 1.0,
        cluster: Tensor | None = None,
        guidance_range: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """u = sum_k p(k | x) u_k on the linear path, [B, ...], for x [B, ...] at times t [B].

        Each expert in use is called once, for all samples that chose it and both guidance branches together:
        u = u_null + g (u_cond - u_null). The router sees x alone, or the conditional branch's pooled vector.
        An expert that answers with NaN or infinity is dropped from then on, with a warning, and the others go on.

        Args:
            condition: of B rows; of each encoder, where the experts have several. Or `prompts` of it.
            cluster: [B] int64, each sample's own, for routing "oracle".
            guidance_range: the times between which there is guidance, both included; elsewhere the condition alone is
                asked, which is half the work (Kynkaanniemi et al. 2024, arXiv 2404.07724).

        Raises:
            AtollError: guidance without a condition or without a null condition; no expert left.
        """
        if guidance_scale != 1.0 and (condition is None or self.null is None):
            missing = "condition" if condition is None else "null condition (Ensemble(..., null=...))"
            raise AtollError(f"guidance_scale is {guidance_scale} but there is no {missing}")
        given = self.prompts(condition, limit=0) if isinstance(condition, Condition | Conditions) else condition
        inside = (t >= guidance_range[0]) & (t <= guidance_range[1])
        scale = torch.where(inside, guidance_scale, 1.0).to(x.dtype)  # [B]
        while True:
            weights = self.weights(x, t, self._pooled(len(x), given), cluster)
            velocity, failed = self._fused(weights, x, t, given, scale)
            if failed is None:
                break
            self._drop(failed)
        if self._trace is not None:
            self._trace.times.append(t.detach().cpu())
            self._trace.weights.append(weights.detach().float().cpu())
        return velocity

    def _fused(
        self, weights: Tensor, x: Tensor, t: Tensor, given: PromptCache | None, scale: Tensor
    ) -> tuple[Tensor, int | None]:
        """The weighted velocity [B, ...], and the number of an expert whose answer was not finite."""
        velocity = torch.zeros_like(x)
        factors, raw = weights.clone(), set[int]()
        for members, stacking in self._groups:
            if stacking is None:
                continue
            # sum_r w_r u_r + (1 - sum_r w_r)/sigma (x - m): x0 = m + sum_r w_r (x0_r - m), with x explained.
            share = weights[:, members].sum(1)  # [B]
            solved, rest = stacking.at(t)
            factors[:, members] = share[:, None] * solved.to(x)
            velocity += per_sample((share * rest).to(x), x) * (x - stacking.mean.to(x))
            raw |= set(members)
        rows = [column.nonzero().squeeze(1) for column in factors.T]
        order = asked = [index for index, mine in enumerate(rows) if len(mine)]
        if self._store is not None:
            order = self._store.plan([expert.network for expert in self.experts], asked, self._selection_probs)
        answers = {}
        for index in order:
            mine = rows[index]
            u = self._expert_velocity(self.experts[index], x[mine], t[mine], given, mine, scale[mine], index in raw)
            if self.drops and not u.isfinite().all() and x[mine].isfinite().all():
                return velocity, index
            answers[index] = per_sample(factors[mine, index], u) * u
        for index in asked:  # the same sum, whoever was asked first
            velocity.index_add_(0, rows[index], answers[index])
        return velocity, None

    def _expert_velocity(
        self,
        expert: Expert,
        x: Tensor,
        t: Tensor,
        given: PromptCache | None,
        rows: Tensor,
        scale: Tensor,
        raw: bool,
    ) -> Tensor:
        """One expert's velocity [b, ...] for some rows of a batch, guided by their scale [b]."""
        if given is None:
            return expert.velocity(x, t, None, self.alignment, raw)
        guided = bool((scale != 1.0).any())
        condition = given.for_expert(expert.network, expert.encoder, rows, guided)
        if not guided:
            return expert.velocity(x, t, condition, self.alignment, raw)
        u_both = expert.velocity(x.repeat(2, *[1] * (x.ndim - 1)), t.repeat(2), condition, self.alignment, raw)
        u_condition, u_null = u_both.chunk(2)
        return u_null + per_sample(scale, x) * (u_condition - u_null)

    def _drop(self, index: int) -> None:
        """Leaves an expert out from now on."""
        name = self.experts[index].name
        self.dropped[name] = "answered with NaN or infinity"
        if len(self.dropped) == len(self.experts) or isinstance(self._weigh, TimeSwitch):
            raise AtollError(f"{name} answered with NaN or infinity, and there is no other; get a fresh copy of it")
        warnings.warn(f"{name} answered with NaN or infinity; sampling goes on without it", stacklevel=4)
        self._groups = [
            (members, None if index in members else stacking)
            for group, stacking in self._groups
            if len(members := [m for m in group if m != index]) > 1 or index not in group
        ]

    def _living(self) -> Tensor:
        """[E, K]: who owns which cluster, of those that were not dropped."""
        if not self.dropped:
            return self._owners
        return _owners(self.experts, tuple(e.name in self.dropped for e in self.experts))

    def _shares(self, members: list[int], stacking: Stacking | None, t: Tensor) -> Tensor:
        """How replicas share their clusters' weight [B, R]; rows sum to 1."""
        if self.replicas != "stacked":
            return replica_shares(self.replicas, [self.experts[m] for m in members], t)
        if stacking is None:
            return replica_shares("equal", [self.experts[m] for m in members], t)
        solved, _ = stacking.at(t)
        total = solved.sum(1, keepdim=True)
        return torch.where(total > 0, solved / total.clamp(min=1e-12), 1 / len(members)).to(t)

    def _switched(self, switch: TimeSwitch, t: Tensor, x: Tensor) -> Tensor:
        weights = x.new_zeros(len(x), len(self.experts))
        above = t >= switch.time
        weights[above, self._number(switch.above)] = 1
        weights[~above, self._number(switch.below)] = 1
        return weights

    def _number(self, name: str) -> int:
        names = [expert.name for expert in self.experts]
        if names.count(name) != 1:
            raise AtollError(f"routing {self.routing}: no expert {name!r}; expected one of {', '.join(names)}")
        return names.index(name)

    def _pooled(self, count: int, given: PromptCache | None) -> Tensor | None:
        """What the router sees of the prompt; the null condition's where there is no prompt."""
        if given is not None:
            return given.conditions[self.router_encoder].pooled
        pooled = None if self.null is None else each(self.null)[self.router_encoder].pooled
        return None if pooled is None else pooled.expand(count, -1)

    @contextmanager
    def tracing(self) -> Iterator[Trace]:
        """Records who was asked when: `with ensemble.tracing() as trace: ...`."""
        self._trace = Trace()
        try:
            yield self._trace
        finally:
            self._trace = None

    def with_options(
        self,
        routing: str | None = None,
        alignment: Alignment | None = None,
        replicas: str | None = None,
        drops: bool | None = None,
    ) -> "Ensemble":
        """The same experts and router under other options."""
        return self.with_experts(self.experts, routing, alignment, replicas, drops)

    def with_experts(
        self,
        experts: Sequence[Expert],
        routing: str | None = None,
        alignment: Alignment | None = None,
        replicas: str | None = None,
        drops: bool | None = None,
    ) -> "Ensemble":
        """The same router and options over other experts."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when this ensemble was made
            return Ensemble(
                experts,
                self.router,
                routing or self.routing,
                alignment or self.alignment,
                self.null,
                self.stackings,
                replicas or self.replicas,
                self.router_encoder,
                self.drops if drops is None else drops,
            )


def _owners(experts: Sequence[Expert], dropped: Sequence[bool] | None = None) -> Tensor:
    """[E, K]: 1 where the expert is among the narrowest that cover the cluster."""
    clusters = max(max(expert.clusters) for expert in experts) + 1
    owners = torch.zeros(len(experts), clusters)
    for k in range(clusters):
        breadths = [
            len(expert.clusters) if k in expert.clusters and not (dropped and dropped[index]) else None
            for index, expert in enumerate(experts)
        ]
        known = [breadth for breadth in breadths if breadth is not None]
        for index, breadth in enumerate(breadths):
            if known and breadth == min(known):
                owners[index, k] = 1
    return owners


def _groups(experts: Sequence[Expert], stackings: Sequence[Stacking]) -> list[tuple[list[int], Stacking | None]]:
    """The replicas: experts of the very same clusters, with the stacking of just these, in its order."""
    found = []
    for clusters in dict.fromkeys(expert.clusters for expert in experts):
        members = [index for index, expert in enumerate(experts) if expert.clusters == clusters]
        if len(members) < 2:
            continue
        names = {experts[index].name: index for index in members}
        fitting = next((s for s in stackings if set(s.names) == names.keys() and len(names) == len(members)), None)
        found.append(([names[name] for name in fitting.names] if fitting else members, fitting))
    return found
