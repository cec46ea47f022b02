"""Experts of any objective and a router, as one velocity function on the linear path (HDDM Eq. 1, DDM Eq. 6).

An `Ensemble` is immutable and its methods are pure: they return, and change nothing. Whoever samples keeps the trace,
plans the expert cache and decides what happens to an answer that is not finite: see `atoll.ensemble.sampler`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor

from atoll.calibration import mean_like
from atoll.condition import Condition, as_conditions
from atoll.ensemble.expert import Alignment, Expert, RouterNetwork
from atoll.ensemble.owners import Owners, check_levels
from atoll.ensemble.prompt_cache import CACHE_BYTES, PromptCache, PromptSource
from atoll.ensemble.query import Query, Routed
from atoll.ensemble.replicas import (
    ReplicaGroup,
    Stacking,
    check_replicas,
    divide_among_replicas,
    replica_groups,
)
from atoll.ensemble.routing import Routing, RoutingContext, parse_routing
from atoll.ensemble.side_by_side import can_share, share, workers_for
from atoll.ensemble.weak import check_weak, guide
from atoll.errors import AtollError
from atoll.shapes import per_sample


@dataclass(frozen=True, eq=False, repr=False)
class Ensemble:
    """Router + experts as one velocity function; immutable. `dataclasses.replace` returns one under other options.

    Attributes:
        experts: at least one. Experts that cover the same cluster with the same breadth are replicas and are combined
            as `replicas` says; a broader one stands in only where no narrower one covers a cluster, at the levels at
            which none does (`Objective.levels`). A cluster without an expert loses its weight to the others.
        router: (x, t, pooled) -> log p [B, K]; None only with a single expert, or with a routing that needs no router.
        routing: a name of `atoll.ensemble.routing`: "top-2", "full", "nucleus-0.9", ...
        alignment: "snr" (exact) or "native" (HDDM's formulas).
        null: the null condition of each text encoder, one row each; needed for guidance. A bare `Condition` is wrapped.
        stackings: the weights of replicas, as measured by `atoll assemble`.
        replicas: "stacked" where there is a stacking for them, otherwise equal; "inverse-error", "equal",
            "time-switch-0.5" (HDDM section 4.3).
        router_encoder: the index of the text encoder whose pooled vector the router sees.
        excluded: the indices of experts that are never evaluated; the others take over their weight.
        weak: a worse ensemble of the same clusters, from which guidance leads away in place of the null condition
            (`atoll.ensemble.weak`); it takes over this one's routing and alignment.
        rule: the routing, parsed.

    Raises:
        AtollError: no experts, an unknown routing, alignment or way to combine replicas, several experts without a
            router, a time switch between experts that do not exist, a cluster that has experts at some levels only, or
            a weak ensemble of other clusters.
    """

    experts: Sequence[Expert]
    router: RouterNetwork | None
    routing: str = "top-2"
    alignment: Alignment = "snr"
    _: KW_ONLY
    null: tuple[Condition, ...] | None = None
    stackings: Sequence[Stacking] = ()
    replicas: str = "stacked"
    router_encoder: int = 0
    excluded: frozenset[int] = frozenset()
    weak: "Ensemble | None" = None
    rule: Routing = field(init=False)
    _owners: Owners = field(init=False)
    _groups: tuple[ReplicaGroup, ...] = field(init=False)

    def __post_init__(self) -> None:
        # Validate the options.
        if not self.experts:
            raise AtollError("an ensemble of no experts; expected at least one")
        if self.alignment not in get_args(Alignment):
            raise AtollError(f"unknown alignment {self.alignment!r}; expected snr or native")
        # Names are checked here, so that a wrong one fails before sampling.
        check_replicas(self.replicas)
        rule = parse_routing(self.routing)
        if self.router is None and len(self.experts) > 1 and rule.needs_router:
            raise AtollError(f"{len(self.experts)} experts without a router; expected a router, or one expert alone")
        rule.check([expert.name for expert in self.experts])

        # Derive what every evaluation needs; __init__ is over afterwards, and nothing changes any more.
        stackings = self.stackings if self.replicas == "stacked" and self.alignment == "snr" else ()
        derived = {
            "experts": tuple(self.experts),
            "stackings": tuple(self.stackings),
            "null": None if self.null is None else as_conditions(self.null),
            "rule": rule,
            "_owners": Owners.of(self.experts, self.excluded),
            "_groups": replica_groups(self.experts, stackings, self.excluded),
            # Its difference to this one is then that of the experts alone.
            "weak": self.weak and replace(self.weak, routing=self.routing, alignment=self.alignment),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        check_levels(self.experts, self._owners, rule)
        if self.weak is not None:
            check_weak(self._owners, self.weak._owners, clusters=self._has_clusters, nested=self.weak.weak is not None)

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition | tuple[Condition, ...] | None = None,
        guidance_scale: float | Tensor = 1.0,
        *,
        cluster: Tensor | None = None,
        guidance_range: tuple[float | Tensor, float | Tensor] = (0.0, 1.0),
        prompt_cache: PromptSource | None = None,
    ) -> Tensor:
        """Return u = sum_k p(k | x) u_k on the linear path, [B, ...].

        Each selected expert is evaluated once, for all samples that selected it and both guidance branches together:
        u = u_null + g (u_cond - u_null), or with a weak ensemble u = u_weak + g (u_cond - u_weak). The router sees x
        alone, or the conditional branch's pooled vector.

        Pure: an expert's NaN or infinity is returned as it is. A `Sampler` drops such an expert.

        Args:
            x: samples [B, ...].
            t: their times [B].
            condition: of B rows, one per text encoder; a bare `Condition` is wrapped.
            guidance_scale: g, of all samples or of each [B].
            cluster: each sample's own cluster [B] int64, for routing "oracle".
            guidance_range: the times between which there is guidance, both included, of all samples or of each [B];
                elsewhere only the condition is evaluated, which is half the work (Kynkaanniemi et al. 2024, arXiv
                2404.07724).
            prompt_cache: in place of the condition, its cache over all steps of one sampling.

        Raises:
            AtollError: guidance without a condition or without a null condition; both a condition and a cache.
        """
        query = self.query(
            x,
            t,
            condition,
            guidance_scale,
            cluster=cluster,
            guidance_range=guidance_range,
            prompt_cache=prompt_cache,
        )
        routed = self.route(query)
        u = self.fuse(routed, dict(self.expert_velocities(routed)))
        if self.weak is None or (weak := self.route_weak(routed)) is None:
            return u
        return guide(u, self.weak.fuse(weak, dict(self.weak.expert_velocities(weak))), query.weak_scale)

    @property
    def clamped(self) -> tuple[Expert, ...]:
        """The eps-experts whose x0 is clamped to +-20 as in HDDM: neither calibration nor stacking corrects it."""
        # A stacking corrects its members' x0 together, so none of them is clamped.
        stacked = {index for group in self._groups if group.stacking is not None for index in group.members}
        return tuple(
            expert
            for index, expert in enumerate(self.experts if self.alignment == "snr" else ())
            if expert.calibration is None and expert.objective.prediction == "eps" and index not in stacked
        )

    def weights(self, x: Tensor, t: Tensor, pooled: Tensor | None = None, cluster: Tensor | None = None) -> Tensor:
        """Return each expert's weight [B, E]; rows sum to 1.

        Args:
            x: samples [B, ...].
            t: their times [B].
            pooled: the router's pooled condition [B, P].
            cluster: each sample's own cluster [B] int64, for routing "oracle".
        """
        log_p, owners = self._cluster_log_p(x, t, pooled)
        context = self._context(x, t, cluster)
        return self._weights(context, self._cluster_weights(context, log_p), owners)

    def prompt_cache(
        self,
        conditions: tuple[Condition, ...],
        null: tuple[Condition, ...] | None = None,
        limit: int = CACHE_BYTES,
        block_cache: float = 0.0,
        *,
        prompt_of: Sequence[int] | None = None,
        null_of: Sequence[int] | None = None,
    ) -> PromptCache:
        """Return a cache for one sampling: each network reads a prompt once, not at every step.

        Valid for the current weights of the experts only; velocities differ by rounding, or by what `block_cache`
        skips.

        Args:
            conditions: of P rows, one per text encoder.
            null: of one row or of P rows, one per text encoder, in place of the ensemble's own null condition.
            limit, block_cache, prompt_of, null_of: as in `PromptCache`.
        """
        # The caller's null condition replaces the ensemble's own, for negative prompts.
        null = self.null if null is None else null
        return PromptCache(conditions, null, limit, block_cache, prompt_of=prompt_of, null_of=null_of)

    # The steps of `velocity`, each pure, for whoever samples.

    def query(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition | tuple[Condition, ...] | None = None,
        guidance_scale: float | Tensor = 1.0,
        *,
        cluster: Tensor | None = None,
        guidance_range: tuple[float | Tensor, float | Tensor] = (0.0, 1.0),
        prompt_cache: PromptSource | None = None,
    ) -> Query:
        """Return the validated query; arguments and errors as in `velocity`."""
        # A condition alone is a cache that caches nothing.
        if condition is not None:
            if prompt_cache is not None:
                raise AtollError("condition and prompt_cache were both passed; expected one of them")
            prompt_cache = self.prompt_cache(as_conditions(condition), limit=0)
        # Guidance needs both branches; a weak ensemble is one, with any prompt or none.
        guided = bool((guidance_scale != 1.0).any()) if isinstance(guidance_scale, Tensor) else guidance_scale != 1.0
        if guided and self.weak is None and (prompt_cache is None or not prompt_cache.guides):
            missing = "condition" if prompt_cache is None else "null condition (Ensemble(..., null=...))"
            raise AtollError(f"guidance_scale is {guidance_scale} but there is no {missing}")
        # Outside its range, guidance is off: a scale of 1 for these samples.
        inside = (t >= guidance_range[0]) & (t <= guidance_range[1])
        scale = torch.where(inside, guidance_scale, 1.0).to(x.dtype)
        if self.weak is not None:
            return Query(x, t, prompt_cache, torch.ones_like(scale), cluster, scale)
        return Query(x, t, prompt_cache, scale, cluster)

    def route(self, query: Query) -> Routed:
        """Select the experts of a query and compute their weights."""
        log_p, owners = self._cluster_log_p(query.x, query.t, self._pooled(query))
        context = self._context(query.x, query.t, query.cluster)
        per_cluster = self._cluster_weights(context, log_p)
        return self._select(query, self._weights(context, per_cluster, owners), log_p, owners, per_cluster)

    def route_weak(self, routed: Routed) -> Routed | None:
        """Select the weak ensemble's experts for the samples with guidance, by this one's weights; None if none has."""
        weak, scale, per_cluster = self.weak, routed.query.weak_scale, routed.per_cluster
        if weak is None or scale is None or not (guided := scale != 1.0).any():
            return None

        # Every cluster that this ensemble selects has an expert there, see `check_weak`.
        query = replace(routed.query, weak_scale=None)
        owners = None if per_cluster is None else weak._owners.like(per_cluster)
        weights = weak._weights(weak._context(query.x, query.t, query.cluster), per_cluster, owners)
        return weak._select(query, weights * guided[:, None], None, None, per_cluster)

    def _select(
        self, query: Query, weights: Tensor, log_p: Tensor | None, owners: Owners | None, per_cluster: Tensor | None
    ) -> Routed:
        """Return the query with the experts of some weight; arguments as in `Routed`."""
        x, t = query.x, query.t
        # Stacked replicas: their velocities are combined as their x0 are, with the mean in the place of the rest.
        # sum_r w_r u_r + (1 - sum_r w_r)/sigma (x - m): x0 = m + sum_r w_r (x0_r - m), with x explained.
        factors, offset, stacked = weights.clone(), torch.zeros_like(x), set[int]()
        for members, stacking in ((list(group.members), group.stacking) for group in self._groups):
            if stacking is None:
                continue
            group_weight = weights[:, members].sum(1)  # [B]
            solved, mean_weight = stacking.at(t)
            factors[:, members] = group_weight[:, None] * solved.to(x)
            offset += per_sample((group_weight * mean_weight).to(x), x) * (x - mean_like(stacking.mean, x))
            stacked |= set(members)

        # Rows by expert: each expert is evaluated once, for all samples that selected it.
        rows = tuple(column.nonzero().squeeze(1) for column in factors.T)
        active = tuple(index for index, selected in enumerate(rows) if len(selected))
        return Routed(query, weights, factors, offset, rows, active, frozenset(stacked), log_p, owners, per_cluster)

    def expert_velocities(self, routed: Routed, order: Sequence[int] | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield the active experts' indices and guided velocities [b, ...], each for its rows of the batch.

        On a CPU, experts with few rows are evaluated several at a time (`atoll.ensemble.side_by_side`), which changes
        numbers by rounding at most. Otherwise each is evaluated when it is asked for.

        Args:
            routed: the query with its experts.
            order: in which to evaluate them; default: as in `routed.active`.
        """
        order = routed.active if order is None else order
        # Only where experts can share: counting guided rows would wait for a GPU.
        shares = can_share([self.experts[index].network for index in order])
        numbers = routed.numbers(order) if shares else []
        workers = workers_for(numbers)
        if workers < 2:
            for index in order:
                yield index, self.expert_velocity(routed, index)
            return
        # The prompts are read here: a cache belongs to one thread.
        calls = [self._call(routed, index) for index in order]
        yield from zip(order, share(calls, numbers, workers), strict=True)

    def expert_velocity(self, routed: Routed, index: int) -> Tensor:
        """Return one active expert's guided velocity [b, ...] for its rows of the batch."""
        return self._call(routed, index)()

    def _call(self, routed: Routed, index: int) -> Callable[[], Tensor]:
        """Return the evaluation of one active expert, with its inputs read: () -> its guided velocity [b, ...]."""
        # Only the expert's own rows.
        query, rows, expert = routed.query, routed.rows[index], self.experts[index]
        x, t, scale, raw = query.x[rows], query.t[rows], query.scale[rows], index in routed.stacked

        # An unconditional network.
        if query.prompts is None:
            return lambda: expert.velocity(x, t, None, self.alignment, raw)

        # Without guidance, the condition alone.
        guided = (scale != 1.0).nonzero().squeeze(1)
        if not len(guided):
            condition = query.prompts.for_expert(expert.network, expert.encoder, rows)
            return lambda: expert.velocity(x, t, condition, self.alignment, raw)

        # u_null + g (u_cond - u_null), with both branches in one call; rows without guidance have only one.
        both = query.prompts.for_expert(expert.network, expert.encoder, rows, rows[guided])

        def guided_velocity() -> Tensor:
            x_both, t_both = torch.cat([x, x[guided]]), torch.cat([t, t[guided]])
            u, u_null = expert.velocity(x_both, t_both, both, self.alignment, raw).split([len(x), len(guided)])
            u_guided: Tensor = u_null + per_sample(scale[guided], x) * (u[guided] - u_null)
            return u_guided if len(guided) == len(u) else u.index_copy(0, guided, u_guided)

        return guided_velocity

    def fuse(self, routed: Routed, velocities: Mapping[int, Tensor]) -> Tensor:
        """Return the weighted sum [B, ...] of the active experts' velocities [b, ...], by index.

        The order of the sum is that of `routed.active`, in whichever order the experts were evaluated.
        """
        # A copy: `routed` is not changed.
        velocity = routed.offset.clone()
        for index in routed.active:
            rows, u = routed.rows[index], velocities[index]
            velocity.index_add_(0, rows, per_sample(routed.factors[rows, index], u) * u)
        return velocity

    # Weights.

    @property
    def _has_clusters(self) -> bool:
        """Whether clusters play a part in the routing."""
        return not (self.rule.over_experts or (self.router is None and len(self.experts) == 1))

    def _cluster_log_p(self, x: Tensor, t: Tensor, pooled: Tensor | None) -> tuple[Tensor | None, Owners | None]:
        """Return the clusters' log-probabilities [B, K], -inf where no expert covers one, and their owners.

        Both are None if clusters play no part: a routing over experts, or a single expert without a router.
        """
        # Nothing to route: no router is evaluated.
        if not self._has_clusters:
            return None, None
        # Without a router the caller passes the clusters: all are equally probable until then.
        if self.router is None:
            log_p = x.new_zeros(len(x), self._owners.clusters)
        else:
            log_p = self.router(x, t, pooled).to(x.dtype)

        # A cluster without an expert has no probability.
        if self._owners.clusters > log_p.shape[1]:
            raise AtollError(
                f"the router knows {log_p.shape[1]} clusters, the experts cover cluster {self._owners.clusters - 1}; "
                "expected a router of the experts' own assignment"
            )
        # The router may know clusters that no expert covers.
        owners = self._owners.like(log_p)
        return log_p.masked_fill(~owners.covered(t), -torch.inf), owners

    def _context(self, x: Tensor, t: Tensor, cluster: Tensor | None) -> RoutingContext:
        return RoutingContext(x, t, cluster, [expert.name for expert in self.experts])

    def _cluster_weights(self, context: RoutingContext, log_p: Tensor | None) -> Tensor | None:
        """Return each cluster's weight [B, K] from their log-probabilities; None if clusters play no part."""
        return None if log_p is None else self.rule.weights(log_p, context)

    def _weights(self, context: RoutingContext, per_cluster: Tensor | None, owners: Owners | None) -> Tensor:
        """Return each expert's weight [B, E] from the clusters' weights [B, K] and their owners."""
        # A routing over experts, or a single expert: no clusters.
        x, t = context.x, context.t
        if self.rule.over_experts:
            return self.rule.weights(x.new_zeros(len(x), 0), context)
        if per_cluster is None or owners is None:
            return x.new_ones(len(x), 1)
        assert t is not None  # an evaluation has times
        # Clusters to experts; the owners of a cluster share its weight equally.
        weights = owners.shares(per_cluster, t)
        divide_among_replicas(weights, self.replicas, self._groups, self.experts, t)
        return weights

    def _pooled(self, query: Query) -> Tensor | None:
        """Return what the router sees of the prompt [B, P]; the null condition's vector if there is no prompt."""
        # Guidance does not change the routing: the router sees the prompt alone.
        if query.prompts is not None:
            return query.prompts.pooled(self.router_encoder)
        pooled = None if self.null is None else self.null[self.router_encoder].pooled
        return None if pooled is None else pooled.expand(len(query.x), -1)
