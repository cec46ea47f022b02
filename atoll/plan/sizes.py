"""One training over several sizes of images: its cost at each size, and the mean by their shares."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from atoll.manifest import ExpertSettings, Manifest, MonolithSettings, TrainSettings
from atoll.plan.cost import NetworkSizes, forward_flops, training_flops
from atoll.plan.fit import Fit, step_seconds
from atoll.plan.mmdit_cost import RoutedBlocks
from atoll.plan.recipe import SizedLatent, Text, network_of


@dataclass(frozen=True)
class PlannedSize:
    """One size of the images that an expert is trained on. FLOPs are per image.

    Attributes:
        image: "WIDTHxHEIGHT", pixels.
        network: the expert's network at this size.
        tokens: N, of the image.
        share: fraction of the images, and so of the steps: a batch has one size.
        route: blocks that tokens skip in a part of the steps; training_flops are the mean over all steps.
    """

    image: str
    network: NetworkSizes
    tokens: int
    forward_flops: int
    training_flops: float
    share: float
    route: RoutedBlocks | None = None


def planned_sizes(
    manifest: Manifest, part: ExpertSettings | MonolithSettings, sizes: Iterable[SizedLatent], text: Text
) -> tuple[PlannedSize, ...]:
    """The cost of one expert, or of the common model, at each size."""
    planned = []
    for size in sizes:
        network = network_of(manifest, part, size.shape, text)
        route = routed_blocks(manifest.train_of(part), network)
        costs = forward_flops(network), training_flops(network, route=route)
        planned.append(PlannedSize(str(size.image), network, network.image_tokens, *costs, size.share, route))
    return tuple(planned)


def routed_blocks(train: TrainSettings, network: NetworkSizes) -> RoutedBlocks | None:
    """Return the blocks that tokens skip in a training. Raises AtollError as training does."""
    if (route := train.token_route) is None:
        return None
    tokens = network.image_tokens
    first, last = route.blocks(network.name, network.depth, tokens)
    return RoutedBlocks(first, last, route.kept(tokens), route.end(train.steps) / train.steps)


def largest(sizes: Sequence[PlannedSize]) -> PlannedSize:
    """The size with the most tokens: what fits it fits all. A size that no image has does not count."""
    return max((size for size in sizes if size.share), key=lambda size: size.tokens)


def mean(sizes: Sequence[PlannedSize], cost: Callable[[PlannedSize], float]) -> float:
    """The mean of a cost over the images, by the sizes' shares."""
    # One size keeps its integers.
    return cost(sizes[0]) if len(sizes) == 1 else sum(size.share * cost(size) for size in sizes)


def seconds_by_size(
    sizes: Sequence[PlannedSize], batch: int, fit: Fit, flops: float, eager: float
) -> tuple[float, ...]:
    """Seconds of a step at each size, with the switches and parts that the largest one needs.

    Args:
        sizes: of one expert.
        batch: rows of a step on one GPU.
        fit: of the largest size.
        flops, eager: as in `step_seconds`.
    """
    return tuple(
        step_seconds(size.network, batch, fit.accumulate, fit.switches, flops, eager, size.route) for size in sizes
    )
