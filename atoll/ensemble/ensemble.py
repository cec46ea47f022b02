"""Experts of any objective and a router, as one velocity function on the linear path (HDDM Eq. 1, DDM Eq. 6).

An `Ensemble` is immutable and its methods are pure: they return, and change nothing. Whoever samples keeps the trace,
plans the expert cache and decides what happens to an answer that is not finite: see `atoll.ensemble.sampler`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import get_args

import torch
from torch import Tensor

from atoll.calibration import mean_like
from atoll.condition import Condition, as_conditions
from atoll.ensemble.expert import Alignment, Expert, RouterNetwork
from atoll.ensemble.prompt_cache import CACHE_BYTES, PromptCache, PromptSource
from atoll.ensemble.query import Query, Routed
from atoll.ensemble.replicas import (
    ReplicaGroup,
    Stacking,
    check_replicas,
    cluster_owners,
    replica_groups,
    replica_weights,
)
from atoll.ensemble.routing import Routing, RoutingContext, parse_routing
from atoll.ensemble.side_by_side import can_share, share, workers_for
from atoll.errors import AtollError
from atoll.shapes import per_sample


@dataclass(frozen=True, eq=False, repr=False)
class Ensemble:
    """Router + experts as one velocity function; immutable. `dataclasses.replace` returns one under other options.

    Attributes:
        experts: at least one. Experts that cover the same cluster with the same breadth are replicas and are combined
            as `replicas` says; a broader one stands in only where no narrower one covers a cluster. A cluster without
            an expert loses its weight to the others.
        router: (x, t, pooled) -> log p [B, K]; None only with a single expert, or with a routing that needs no router.
        routing: a name of `atoll.ensemble.routing`: "top-2", "full", "nucleus-0.9", ...
        alignment: "snr" (exact) or "native" (HDDM's formulas).
        null: the null condition of each text encoder, one row each; needed for guidance. A bare `Condition` is wrapped.
        stackings: the weights of replicas, as measured by `atoll assemble`.
        replicas: "stacked" where there is a stacking for them, otherwise equal; "inverse-error", "equal",
            "time-switch-0.5" (HDDM section 4.3).
        router_encoder: the index of the text encoder whose pooled vector the router sees.
        excluded: the indices of experts that are never evaluated; the others take over their weight.
        rule: the routing, parsed.

    Raises:
        AtollError: no experts, an unknown routing, alignment or way to combine replicas, several experts without a
            router, or a time switch between experts that do not exist.
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
    rule: Routing = field(init=False)
    _owners: Tensor = field(init=False)  # [E, K]
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
            "_owners": cluster_owners(self.experts, self.excluded),
            "_groups": replica_groups(self.experts, stackings, self.excluded),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

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
        u = u_null + g (u_cond - u_null). The router sees x alone, or the conditional branch's pooled vector.

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
        return self.fuse(routed, dict(self.expert_velocities(routed)))

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
        return self._weights(x, t, cluster, *self._cluster_log_p(x, t, pooled))

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
        # Guidance needs both branches.
        guided = bool((guidance_scale != 1.0).any()) if isinstance(guidance_scale, Tensor) else guidance_scale != 1.0
        if guided and (prompt_cache is None or not prompt_cache.guides):
            missing = "condition" if prompt_cache is None else "null condition (Ensemble(..., null=...))"
            raise AtollError(f"guidance_scale is {guidance_scale} but there is no {missing}")
        # Outside its range, guidance is off: a scale of 1 for these samples.
        inside = (t >= guidance_range[0]) & (t <= guidance_range[1])
        return Query(x, t, prompt_cache, torch.where(inside, guidance_scale, 1.0).to(x.dtype), cluster)

    def route(self, query: Query) -> Routed:
        """Select the experts of a query and compute their weights."""
        # Each expert's weight; rows sum to 1.
        x, t = query.x, query.t
        log_p, owners = self._cluster_log_p(x, t, self._pooled(query))
        weights = self._weights(x, t, query.cluster, log_p, owners)

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
        return Routed(query, weights, factors, offset, rows, active, frozenset(stacked), log_p, owners)

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

    def _cluster_log_p(self, x: Tensor, t: Tensor, pooled: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the clusters' log-probabilities [B, K], -inf where no expert covers one, and the owners [E, K].

        Both are None if clusters play no part: a routing over experts, or a single expert without a router.
        """
        # Nothing to route: no router is evaluated.
        if self.rule.over_experts or (self.router is None and len(self.experts) == 1):
            return None, None
        # Without a router the caller passes the clusters: all are equally probable until then.
        if self.router is None:
            log_p = x.new_zeros(len(x), self._owners.shape[1])
        else:
            log_p = self.router(x, t, pooled).to(x.dtype)

        # A cluster without an expert has no probability.
        owners = self._owners.to(log_p)
        if owners.shape[1] > log_p.shape[1]:
            raise AtollError(
                f"the router knows {log_p.shape[1]} clusters, the experts cover cluster {owners.shape[1] - 1}; "
                "expected a router of the experts' own assignment"
            )
        # The router may know clusters that no expert covers.
        owners = torch.nn.functional.pad(owners, (0, log_p.shape[1] - owners.shape[1]))
        return log_p.masked_fill(owners.sum(0) == 0, -torch.inf), owners

    def _weights(
        self, x: Tensor, t: Tensor, cluster: Tensor | None, log_p: Tensor | None, owners: Tensor | None
    ) -> Tensor:
        """Return each expert's weight [B, E] from what `_cluster_log_p` returned."""
        # A routing over experts, or a single expert: no clusters.
        context = RoutingContext(x, t, cluster, [expert.name for expert in self.experts])
        if self.rule.over_experts:
            return self.rule.weights(x.new_zeros(len(x), 0), context)
        if log_p is None or owners is None:
            return x.new_ones(len(x), 1)

        # Clusters to experts; the owners of a cluster share its weight equally.
        per_cluster = self.rule.weights(log_p, context)  # [B, K]
        weights = per_cluster @ (owners / owners.sum(0).clamp(min=1)).T
        # Replicas divide the weight of their group by their own mode.
        for group in self._groups:
            members = list(group.members)
            weights[:, members] = weights[:, members].sum(1, keepdim=True) * self._replica_weights(group, t)
        return weights

    def _replica_weights(self, group: ReplicaGroup, t: Tensor) -> Tensor:
        """Return each replica's fraction of its group's weight [B, R]; rows sum to 1."""
        # By another mode than stacking, or without a stacking: equally.
        experts = [self.experts[member] for member in group.members]
        if self.replicas != "stacked":
            return replica_weights(self.replicas, experts, t)
        if group.stacking is None:
            return replica_weights("equal", experts, t)

        # For the trace, stacked weights are normalised; `route` applies them as they are.
        solved, _ = group.stacking.at(t)
        total = solved.sum(1, keepdim=True)
        return torch.where(total > 0, solved / total.clamp(min=1e-12), 1 / len(experts)).to(t)

    def _pooled(self, query: Query) -> Tensor | None:
        """Return what the router sees of the prompt [B, P]; the null condition's vector if there is no prompt."""
        # Guidance does not change the routing: the router sees the prompt alone.
        if query.prompts is not None:
            return query.prompts.pooled(self.router_encoder)
        pooled = None if self.null is None else self.null[self.router_encoder].pooled
        return None if pooled is None else pooled.expand(len(query.x), -1)
