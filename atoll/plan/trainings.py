"""The trainings of a run, of which a plan is made: each expert, the models of all clusters and the router."""

from collections.abc import Sequence

from atoll.manifest import ExpertSettings, Manifest, MonolithSettings
from atoll.plan.cost import activation_bytes, fixed_bytes, parameters, router_flops, router_parameters, swap_bytes
from atoll.plan.muon_cost import muon_cost
from atoll.plan.recipe import SizedLatent, Text, router_of, switches_of
from atoll.plan.rules import CPU_BF16, CUDA_BF16, FP32, Rules
from atoll.plan.sizes import largest, mean, planned_sizes
from atoll.plan.targets_cost import targets_cost
from atoll.plan.types import PlannedCommon, PlannedExpert, PlannedGeneralist, PlannedRouter
from atoll.storage.layout import COMMON, GENERALIST


def rules_of(precision: str, cpu: bool = False) -> Rules:
    """Return how tensors are saved in a precision."""
    # A device saves other tensors in each precision.
    if precision == "fp32":
        return FP32
    return CPU_BF16 if cpu else CUDA_BF16


def planned_expert(
    manifest: Manifest,
    part: ExpertSettings | MonolithSettings,
    name: str,
    latents: Sequence[SizedLatent],
    text: Text,
) -> PlannedExpert:
    """Return the training of one expert, or of a model of all clusters.

    Args:
        manifest: of the run.
        part: its section.
        name: its name in the plan.
        latents: the sizes of the images.
        text: the sizes of a caption.
    """
    train = manifest.train_of(part)
    # The largest size decides what fits, the mean how long it takes.
    sizes, rules = planned_sizes(manifest, part, latents, text), rules_of(train.precision)
    network = largest(sizes).network
    # The recipe's own switches, to compare with the planner's choice.
    switches, accumulate = switches_of(train)
    return PlannedExpert(
        name=name,
        network=network,
        sizes=sizes,
        parameters=parameters(network),
        forward_flops=mean(sizes, lambda size: size.forward_flops),
        training_flops=mean(sizes, lambda size: size.training_flops),
        fixed_bytes=fixed_bytes(network, rules),
        activation_bytes=activation_bytes(network, rules),
        activation_bytes_compiled=activation_bytes(network, rules, compiled=True),
        activation_bytes_checkpointed=activation_bytes(network, rules, "full"),
        steps=train.steps,
        batch=train.batch,
        images=train.steps * train.batch,
        checkpoint_every=train.checkpoint_every,
        recipe_switches=switches,
        accumulate=accumulate,
        sharding=train.sharding,
        swap_bytes=accumulate * swap_bytes(network, switches.block_swap),
        muon=muon_cost(network) if train.optimizer == "muon" else None,
        targets=targets_cost(network, manifest.targets.dims, train),
    )


def planned_common(
    manifest: Manifest, experts: Sequence[PlannedExpert], latents: Sequence[SizedLatent], text: Text
) -> PlannedCommon | None:
    """Return the training of the common model and its part of all FLOPs; None if the run has none.

    Args:
        experts: all trainings besides: those of the experts, and of the generalist if there is one.
        manifest, latents, text: as in `planned_expert`.
    """
    if manifest.common is None:
        return None
    training = planned_expert(manifest, manifest.common, COMMON, latents, text)
    # All experts train once, and so does the common model, however many start from it.
    starting = tuple(
        getattr(part, "full_name", GENERALIST) for part in manifest.ensemble_parts if manifest.starts_from_common(part)
    )
    return PlannedCommon(training, starting, _fraction(training, experts))


def planned_generalist(
    manifest: Manifest, training: PlannedExpert | None, others: Sequence[PlannedExpert]
) -> PlannedGeneralist | None:
    """Return the generalist's training with its part of all FLOPs; None if the run has none."""
    if manifest.generalist is None or training is None:
        return None
    return PlannedGeneralist(training, manifest.generalist.objective.levels, _fraction(training, others))


def _fraction(training: PlannedExpert, others: Sequence[PlannedExpert]) -> float:
    """Return the training's part of the FLOPs of itself and the others."""
    flops = [one.images * one.training_flops for one in (training, *others)]
    return flops[0] / sum(flops)


def planned_router(manifest: Manifest, latents: Sequence[SizedLatent], text: Text) -> PlannedRouter:
    """Return the training of the router."""
    train = manifest.train_of(manifest.router)
    networks = [router_of(manifest, size.shape, text) for size in latents]
    # A training step costs three forward passes.
    flops = 3 * sum(size.share * router_flops(network) for size, network in zip(latents, networks, strict=True))
    return PlannedRouter(router_parameters(networks[0]), flops, train.steps * train.batch)
