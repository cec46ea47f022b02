"""The plan of a training, `train.steps`: the mark that names the training, and its continuation under another plan.

With a rate that does not depend on the plan, a step is the same under every plan: a training that is extended from A to
B steps equals one that was planned for B steps, bit for bit. A plan's decay to 0 (`train.decay_from`) is the only part
of a step that depends on it. Training therefore also keeps the state from before the decay, and extends that.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from atoll.errors import AtollError
from atoll.manifest import TrainSettings
from atoll.storage.artifact import CARD, read_card
from atoll.storage.cards import EarlierPlan, ExpertCard, LoraCard, RouterCard
from atoll.storage.layout import TrainingLayout
from atoll.train.state import Counters, steps_before_decay
from atoll.train.targets import batches_with_targets
from atoll.train.token_routing import routed_batches

# Settings that may change when a training is resumed: they change its result by rounding at most.
_MAY_CHANGE = {
    *("threads", "device", "accumulate", "compile", "checkpointing", "sharding", "fused_backward"),
    "block_swap",
    *("checkpoint_every", "keep_checkpoints", "log_every", "validate_every", "sample_every", "ema_snapshot_every"),
    *("track", "validation", "init", "skip"),  # of the last two, the mark holds the hash of what they name
}
# Settings that came after the first marks: left out at their defaults, so that those marks hold.
_ADDED = {"tag_dropout", "keep_tags", "shuffle_tags", "optimizer", "lr_width"}
# Settings that change nothing without a weight of the targets.
_TARGETS = {"targets_weight", "targets_block", "targets_until"}
_ROUTE = {"token_route"}  # part of the mark only if it is set


def fingerprint(settings: dict[str, Any]) -> str:
    """Return a hash of plain values; the order of their keys does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def training_mark(identity: dict[str, Any], settings: TrainSettings) -> str:
    """Return a hash of everything that the result depends on: data, network, objective, seed and settings."""
    added = settings.model_dump(include=_ADDED, exclude_defaults=True)
    added |= settings.model_dump(include=_TARGETS) if settings.targets_weight else {}
    added |= settings.model_dump(include=_ROUTE) if settings.token_route is not None else {}
    plain = settings.model_dump(exclude=_MAY_CHANGE | _ADDED | _TARGETS | _ROUTE)
    return fingerprint({**identity, "train": plain | added})


@dataclass(frozen=True)
class TrainingMarks:
    """The marks of one training under all of its plans.

    Attributes:
        identity: what the result depends on beside the settings, as plain values.
        settings: of the training, with the plan of today.
    """

    identity: dict[str, Any]
    settings: TrainSettings

    def under(self, steps: int, plans: Sequence[EarlierPlan] = ()) -> str:
        """Return the mark under a plan of `steps` steps, after earlier plans."""
        # An earlier plan that left no trace in the result is not part of its mark.
        traces = [[plan.steps, plan.until] for plan in plans if not plan.exact]
        identity = {**self.identity, **({"plans": traces} if traces else {})}
        return training_mark(identity, self.settings.model_copy(update={"steps": steps}))

    def of(self, numbers: Counters) -> str:
        """Return the mark of a state with these counters."""
        return self.under(numbers.planned, plans_of(numbers))

    def plan_of(self, mark: str | None, numbers: Counters) -> int | None:
        """Return the planned steps of a checkpoint with this mark and these counters; None: of another training."""
        # A checkpoint of before plans were recorded does not say how many steps were planned: perhaps those of today's
        # plan, or those that it has done, if it is the last one.
        plans = (numbers.planned,) if numbers.planned else (self.settings.steps, numbers.step)
        return next((steps for steps in plans if mark == self.under(steps, plans_of(numbers))), None)


def plans_of(numbers: Counters) -> tuple[EarlierPlan, ...]:
    """Return the earlier plans in the counters. Raises ValueError if they are not what training writes."""
    try:
        return tuple(EarlierPlan.model_validate(plan) for plan in numbers.plans)
    except (ValidationError, TypeError) as error:
        raise ValueError(f"its earlier plans are damaged: {str(error).splitlines()[0]}") from None


def finished(
    path: Path, kind: type[ExpertCard | LoraCard | RouterCard], marks: TrainingMarks, resume: bool, restart: bool
) -> bool:
    """Return whether the artifact at `path` is the finished result of the training with these marks.

    Raises:
        AtollError: with restart False, an artifact of another training exists, or one of this training for more steps,
            or one that cannot be extended; with resume False as well, any artifact of this training.
    """
    if restart or not (path / CARD).exists():
        return False
    training, steps = read_card(path, kind).training, marks.settings.steps
    if training is None or training.mark != marks.under(training.steps, training.plans or ()):
        raise AtollError(f"{path} was trained under other settings or on other data; add --restart to replace it")
    if training.steps > steps:
        raise AtollError(
            f"{path} is trained for {training.steps} steps already, train.steps is {steps}; set more to extend it, or "
            "add --restart to train it again"
        )
    if training.steps < steps:
        _refuse_to_extend(path, training.steps, steps, resume)
        return False
    if not resume:
        raise AtollError(f"{path} is already trained; add --restart to train it again")
    return True


def _refuse_to_extend(path: Path, done: int, steps: int, resume: bool) -> None:
    """Raise AtollError if the finished artifact cannot be trained on."""
    if not resume:
        raise AtollError(
            f"{path} is trained for {done} steps; --resume extends it to train.steps, {steps}; --restart starts again"
        )
    if not (files := TrainingLayout.of(path)).has_checkpoint():
        raise AtollError(
            f"{path} is trained for {done} steps, and {files.root} holds no checkpoint to extend it from; copy the "
            f"artifact and name the copy in train.init to start from its weights with a new optimizer, or --restart"
        )


def extended(numbers: Counters, marks: TrainingMarks) -> tuple[Counters, str]:
    """Return the counters under the plan of today, and a line that says what the change of plan means.

    Raises:
        AtollError: more steps are done than the plan of today has.
    """
    old, settings = numbers.planned, marks.settings
    if numbers.step >= settings.steps:
        raise AtollError(
            f"{numbers.step} of {old} steps are trained already, train.steps is {settings.steps}; expected more than "
            "are done, or --restart"
        )
    exact = is_exact(numbers, settings)
    plan = EarlierPlan(mark=marks.of(numbers), steps=old, until=numbers.step, exact=exact)
    new = replace(numbers, planned=settings.steps, plans=[*numbers.plans, plan.plain()])
    change = f"{old} steps were planned, now {settings.steps}: from step {numbers.step} on"
    if exact:
        return new, f"{change}, exactly as if these had been planned at the start"
    # What the old plan did at a fraction of its steps.
    ends = {"the targets' end": settings.targets_weight, "the routed tokens' end": settings.token_route}
    left = " or ".join(["the decay", *(name for name, used in ends.items() if used)])
    return new, (
        f"{change}, the learning rate is that of the new plan; {left} of the old one stays in the weights, so that "
        "this is not what the new plan alone would give"
    )


def is_exact(numbers: Counters, settings: TrainSettings) -> bool:
    """Return whether all steps done so far are the same under their plan and under that of `settings`."""
    old = settings.model_copy(update={"steps": numbers.planned})
    # Both plans drop the targets, and the route of tokens, at the same batch, or none has reached it.
    ends = ({last(old), last(settings)} for last in (batches_with_targets, routed_batches))
    same_batches = all(len(end) == 1 or numbers.step + numbers.skipped <= min(end) for end in ends)
    return same_batches and numbers.step <= min(steps_before_decay(old), steps_before_decay(settings))
