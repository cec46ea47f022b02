"""Whoever samples: the state of sampling that an immutable `Ensemble` does not have.

A `Sampler` records which expert had which weight when, plans the expert cache, and holds the one policy for an expert
that answers with NaN or infinity although its input was finite:

- "drop" (default): the expert is excluded from then on, with a warning, and the step is evaluated again without it;
  its weight goes to the others. If there is no other, an `AtollError` is raised.
- "raise": an `AtollError` is raised.
- "keep": the answer is used as it is, as in `Ensemble.velocity`.

No value is ever patched. An expert of a weak ensemble is never dropped: without it, the weak ensemble could not share
the weights of the others.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from atoll.condition import Condition
from atoll.ensemble.ensemble import Ensemble
from atoll.ensemble.offload import expert_cache_of
from atoll.ensemble.prompt_cache import PromptCache
from atoll.ensemble.query import Routed
from atoll.ensemble.weak import guide
from atoll.errors import AtollError

NonFinitePolicy = Literal["drop", "raise", "keep"]

_NON_FINITE = "answered with NaN or infinity"


@dataclass
class Trace:
    """Routing trace: one entry per velocity call.

    Attributes:
        times: [B] each.
        weights: the experts' weights [B, E] each.
    """

    times: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


class Sampler:
    """Evaluates an ensemble for one user of it. Several samplers may share an ensemble; each is for one thread.

    Args:
        ensemble: what is sampled.
        non_finite: what happens when an expert answers with NaN or infinity, see the head of this file.

    Attributes:
        ensemble: the ensemble without the experts that were dropped.
        dropped: the dropped experts' names, and why.
    """

    def __init__(self, ensemble: Ensemble, non_finite: NonFinitePolicy = "drop"):
        self.ensemble, self.non_finite = ensemble, non_finite
        self.dropped: dict[str, str] = {}
        self._trace: Trace | None = None
        # The networks share one cache if they load on demand.
        experts = (*ensemble.experts, *(ensemble.weak.experts if ensemble.weak is not None else ()))
        self._expert_cache = expert_cache_of([expert.network for expert in experts])

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition | tuple[Condition, ...] | None = None,
        guidance_scale: float = 1.0,
        *,
        cluster: Tensor | None = None,
        guidance_range: tuple[float, float] = (0.0, 1.0),
        prompt_cache: PromptCache | None = None,
    ) -> Tensor:
        """Return the ensemble's velocity [B, ...]; arguments and errors as in `Ensemble.velocity`.

        Raises:
            AtollError: an expert's answer is not finite, and the policy is "raise", no expert is left, or it is of the
                weak ensemble.
        """
        # The query is validated once; a failed expert changes the routing only.
        query = self.ensemble.query(
            x,
            t,
            condition,
            guidance_scale,
            cluster=cluster,
            guidance_range=guidance_range,
            prompt_cache=prompt_cache,
        )
        while True:
            # Evaluate the selected experts, until one of them fails.
            routed = self.ensemble.route(query)
            velocities: dict[int, Tensor] = {}
            failed = None
            for index, u in self.ensemble.expert_velocities(routed, self._order(self.ensemble, routed)):
                velocities[index] = u
                if self._fails(routed, index, u):
                    failed = index
                    break
            if failed is None:
                break
            # Without the failed expert, the weights of all others change: route again.
            self._drop(failed)

        # One entry per call, on the CPU, so that a trace holds no memory of the device.
        if self._trace is not None:
            self._trace.times.append(t.detach().cpu())
            self._trace.weights.append(routed.weights.detach().float().cpu())
        u = self.ensemble.fuse(routed, velocities)
        weak = self.ensemble.route_weak(routed)
        return u if weak is None else guide(u, self._weak_velocity(weak), query.weak_scale)

    @contextmanager
    def tracing(self) -> Iterator[Trace]:
        """Record the routing of every velocity call: `with sampler.tracing() as trace: ...`."""
        # A new trace for each block: two recordings never mix.
        self._trace = Trace()
        try:
            yield self._trace
        finally:
            self._trace = None

    def _weak_velocity(self, routed: Routed) -> Tensor:
        """Return the weak ensemble's velocity [B, ...]. Raises AtollError if an expert's answer is not finite."""
        weak = self.ensemble.weak
        assert weak is not None  # it was routed
        velocities: dict[int, Tensor] = {}
        for index, u in weak.expert_velocities(routed, self._order(weak, routed)):
            velocities[index] = u
            if self._fails(routed, index, u):
                raise AtollError(
                    f"{weak.experts[index].name} of the weak ensemble {_NON_FINITE}; sample in fp32, or without the "
                    "weak ensemble"
                )
        return weak.fuse(routed, velocities)

    def _fails(self, routed: Routed, index: int, u: Tensor) -> bool:
        """Return whether an expert's answer [b, ...] to its rows of the batch is not finite, and matters."""
        if self.non_finite == "keep" or u.isfinite().all():
            return False
        # An answer to x that is not finite itself is not the expert's fault.
        return bool(routed.query.x[routed.rows[index]].isfinite().all())

    def _order(self, ensemble: Ensemble, routed: Routed) -> Sequence[int]:
        """Return the order in which to evaluate the active experts: with an expert cache, resident ones first."""
        if self._expert_cache is None:
            return routed.active
        # The order changes no number: `Ensemble.fuse` has its own.
        networks = [expert.network for expert in ensemble.experts]
        return self._expert_cache.plan(networks, routed.active, routed.selection_probs())

    def _drop(self, index: int) -> None:
        """Exclude an expert from now on, or raise."""
        # The policy "raise".
        ensemble, name = self.ensemble, self.ensemble.experts[index].name
        if self.non_finite == "raise":
            raise AtollError(f"{name} {_NON_FINITE}; train or convert it again, or leave it out")

        # The policy "drop", if another expert can take over. A routing that names its experts has no other.
        self.dropped[name] = _NON_FINITE
        excluded = ensemble.excluded | {index}
        if len(excluded) == len(ensemble.experts) or ensemble.rule.over_experts:
            reason = "the routing names it" if ensemble.rule.over_experts else "there is no other"
            raise AtollError(f"{name} {_NON_FINITE}, and {reason}; sample in fp32, or train or convert it again")
        # A new ensemble: the old one may be in use elsewhere. Its other experts may be of other levels.
        try:
            self.ensemble = replace(ensemble, excluded=excluded)
        except AtollError as error:
            raise AtollError(f"{name} {_NON_FINITE}; {error}") from None
        warnings.warn(f"{name} {_NON_FINITE}; sampling goes on without it", stacklevel=4)
