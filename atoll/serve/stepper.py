"""One step of many images at different times: prepare, evaluate each expert once, advance."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atoll.ensemble import Alignment, Ensemble
from atoll.ensemble.offload import Offloaded, expert_cache_of
from atoll.errors import AtollError
from atoll.pipeline import Pipeline
from atoll.serve.prompts import PromptPool
from atoll.serve.unit import EngineJob, Unit
from atoll.shapes import per_sample
from atoll.solver import Integration, shifted_times
from atoll.storage.memory import is_out_of_memory

_MAX_ENSEMBLES = 64  # options in use at a time; further ones replace the oldest


@dataclass(frozen=True, eq=False)
class Stepped:
    """What a step did to a unit.

    Attributes:
        x0: the estimate of x0 [n, C, H, W].
        end: whether a step ended; some methods evaluate the velocity twice per step.
    """

    x0: Tensor
    end: bool


@dataclass(frozen=True, eq=False)
class _Answer:
    """A unit's velocity [n, ...], its experts' weights [n, E] on the CPU, and the time."""

    velocity: Tensor
    weights: Tensor
    time: float


class Stepper:
    """Advances units of images. For one thread, except for `ensemble`.

    Args:
        pipeline: the ensemble with its text encoder and codec.

    Attributes:
        prompts: the prompts of all units.
        images_by_expert: the images that each expert has evaluated, by its index.
        calls_by_expert: its evaluations.
    """

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self._base = pipeline.loaded.ensemble
        self.prompts = PromptPool(self._base.null, pipeline.device)
        self.images_by_expert, self.calls_by_expert = Counter[int](), Counter[int]()
        self._ensembles: OrderedDict[tuple[str, Alignment, frozenset[int]], Ensemble] = OrderedDict()
        self._ensembles_lock = threading.Lock()
        self._networks = [expert.network for expert in self._base.experts]
        self._expert_cache = expert_cache_of(self._networks)

    @property
    def resident(self) -> frozenset[int] | None:
        """The experts on the device, by index; None if all always are."""
        if self._expert_cache is None:
            return None
        keys = self._expert_cache.resident
        networks = enumerate(self._networks)
        return frozenset(i for i, one in networks if not isinstance(one, Offloaded) or one.key in keys)

    def ensemble(self, routing: str, alignment: Alignment, excluded: frozenset[int] = frozenset()) -> Ensemble:
        """Return the ensemble under these options; it shares its networks with all others.

        Raises:
            AtollError: an unknown routing, or one that this ensemble cannot use.
        """
        key = (routing, alignment, excluded)
        with self._ensembles_lock:
            if key in self._ensembles:
                self._ensembles.move_to_end(key)
                return self._ensembles[key]
            ensemble = replace(self._base, routing=routing, alignment=alignment, excluded=excluded)
            if len(excluded) == len(ensemble.experts) or (excluded and ensemble.rule.over_experts):
                names = ", ".join(ensemble.experts[index].name for index in sorted(excluded))
                raise AtollError(f"{names} answered with NaN or infinity, and no other expert can take over")
            self._ensembles[key] = ensemble
            while len(self._ensembles) > _MAX_ENSEMBLES:
                self._ensembles.popitem(last=False)
            return ensemble

    def start(self, unit: Unit) -> None:
        """Draw a unit's noise; its memory is taken from here on."""
        settings, seeds = unit.job.settings, unit.job.handle.request.seeds
        noise = self._pipeline.noise([seeds[row] for row in unit.rows], settings.size)
        times = shifted_times(settings.steps, settings.shift)
        unit.integration = Integration(noise, settings.steps, settings.method, times=times)

    def step(self, units: Sequence[Unit]) -> dict[Unit, Stepped | Exception]:
        """Evaluate the velocity once for each image of the units, and advance them.

        Returns:
            What happened to each unit. A fault of one job does not concern the others.

        Raises:
            Exception: the batch is too large for the memory (`is_out_of_memory`); nothing was advanced.
        """
        # Prepare: units that were not stepped before, then groups under the same options.
        groups: dict[Hashable, list[Unit]] = {}
        for unit in units:
            if unit.integration is None:
                self.start(unit)
            groups.setdefault(unit.job.options, []).append(unit)

        # Evaluate all groups before any unit advances, so that a batch that does not fit can be tried again.
        answers: dict[Unit, _Answer | Exception] = {}
        for group in groups.values():
            answers |= self._answers(group)
        return {
            unit: answer if isinstance(answer, Exception) else self._advance(unit, answer)
            for unit, answer in answers.items()
        }

    def _advance(self, unit: Unit, answer: _Answer) -> Stepped:
        """Move a unit to its next point, and record its trace."""
        # The trace.
        unit.times.append(answer.time)
        unit.weights.append(answer.weights)
        unit.experts = frozenset(answer.weights.any(0).nonzero().flatten().tolist())
        # The step.
        (x, t), step = unit.point, unit.running.step
        unit.running.advance(answer.velocity)
        return Stepped(x - per_sample(t, x) * answer.velocity, unit.running.step > step)

    def _answers(self, units: Sequence[Unit]) -> dict[Unit, _Answer | Exception]:
        """Evaluate the ensemble for units under the same options; return why, where that failed."""
        try:
            answers, failed = self._evaluate(units)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # One job's fault: find out whose.
            if len({unit.job for unit in units}) == 1:
                return dict.fromkeys(units, error)
            return self._separately(units)
        # An expert that answers a job with NaN or infinity is left out of that job, and of no other.
        if failed:
            for job, index in failed:
                job.excluded |= {index}
            return self._separately(units)
        return dict(answers)

    def _separately(self, units: Sequence[Unit]) -> dict[Unit, _Answer | Exception]:
        """Evaluate the ensemble for one job after the other."""
        by_job: dict[EngineJob, list[Unit]] = {}
        for unit in units:
            by_job.setdefault(unit.job, []).append(unit)
        answers: dict[Unit, _Answer | Exception] = {}
        for own in by_job.values():
            answers |= self._answers(own)
        return answers

    def _evaluate(self, units: Sequence[Unit]) -> tuple[dict[Unit, _Answer], set[tuple[EngineJob, int]]]:
        """Evaluate the ensemble once.

        Args:
            units: under the same options.

        Returns:
            Each unit's answer; and the jobs with an expert, by its index, that answered with NaN or infinity.
        """
        # One row per image, with its own time and guidance.
        owners = [unit.job for unit in units for _ in unit.rows]
        settings = [job.settings for job in owners]
        ensemble = self.ensemble(settings[0].routing, settings[0].alignment, owners[0].excluded)
        x, t = (torch.cat(parts) for parts in zip(*(unit.point for unit in units), strict=True))
        clusters = [one.cluster for one in settings if one.cluster is not None]
        query = ensemble.query(
            x,
            t,
            guidance_scale=x.new_tensor([one.guidance_scale for one in settings]),
            guidance_range=(
                x.new_tensor([one.guidance_range[0] for one in settings]),
                x.new_tensor([one.guidance_range[1] for one in settings]),
            ),
            cluster=torch.tensor(clusters, device=x.device) if clusters else None,
            prompt_cache=self.prompts.rows([job.prompt for job in owners], [job.null for job in owners]),
        )

        # Each expert is evaluated once, for all images that selected it; resident ones first.
        routed = ensemble.route(query)
        order: Sequence[int] = routed.active
        if self._expert_cache is not None:
            order = self._expert_cache.plan(self._networks, routed.active, routed.selection_probs())
        velocities, failed = dict[int, Tensor](), set[tuple[EngineJob, int]]()
        for index, u in ensemble.expert_velocities(routed, order):
            rows, velocities[index] = routed.rows[index], u
            self.images_by_expert[index] += len(rows)
            self.calls_by_expert[index] += 1
            # An answer to x that is not finite itself is not the expert's fault.
            bad = ~u.flatten(1).isfinite().all(1) & x[rows].flatten(1).isfinite().all(1)
            failed |= {(owners[row], index) for row in rows[bad].tolist()}

        # Each unit's own rows.
        velocity, sizes = ensemble.fuse(routed, velocities), [len(unit) for unit in units]
        weights, times = routed.weights.float().cpu().split(sizes), t.cpu().split(sizes)
        parts = zip(units, velocity.split(sizes), weights, times, strict=True)
        return {unit: _Answer(own, weight, float(time[0])) for unit, own, weight, time in parts}, failed
