"""Draws latents of one cluster with its experts, without a router."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from atoll.choices import Method
from atoll.condition import move_to
from atoll.encoders.text import PromptEncoder, build_encoder
from atoll.encoders.trust import STRANGER, Trust
from atoll.encoders.weights import same
from atoll.ensemble import Ensemble, Sampler
from atoll.ensemble.loading import LoadedExpert, warn_uncalibrated
from atoll.errors import AtollError
from atoll.solver import sample
from atoll.synthesize.rows import noise

BATCH = 64  # rows sampled at a time


@dataclass(frozen=True)
class Sampling:
    """How latents are drawn.

    Attributes:
        steps: of the solver.
        method: of the solver.
        guidance_scale: 1 draws from the expert's own distribution.
        seed: of the noise.

    Raises:
        AtollError: an unknown method, or steps < 1.
    """

    steps: int
    method: Method
    guidance_scale: float
    seed: int

    def __post_init__(self) -> None:
        """Check what the solver would refuse, before an expert is loaded."""
        if self.method not in get_args(Method):
            raise AtollError(f"unknown method {self.method!r}; expected one of {', '.join(get_args(Method))}")
        if self.steps < 1:
            raise AtollError(f"steps is {self.steps}; expected at least 1")

    def config(self) -> dict[str, Any]:
        """Return the card's entry."""
        return asdict(self)


class ClusterModel:
    """The experts of one cluster as one model.

    Replicas are averaged with equal weights: stacking weights are measured on latents of the data, which are private.

    Args:
        cluster: its number.
        experts: of that cluster, at least one.
        device: of the experts.
        trust: what their cards may reach.
    """

    def __init__(
        self,
        cluster: int,
        experts: Sequence[LoadedExpert],
        device: str | torch.device = "cpu",
        trust: Trust = STRANGER,
    ):
        self.cluster, self._device = cluster, device
        self.shape = experts[0].card.latent_shape
        self._names = ", ".join(one.expert.name for one in experts)
        # Experts with the same encoder share one, which encodes each prompt once.
        kinds: list[dict[str, Any]] = []  # the different text encoders
        for one in experts:
            if not any(same(one.card.condition, kind) for kind in kinds):
                kinds.append(one.card.condition)
        self._encoder = PromptEncoder([build_encoder(kind, trust) for kind in kinds])
        # The number of each expert's encoder.
        which = [next(i for i, kind in enumerate(kinds) if same(one.card.condition, kind)) for one in experts]
        # No router: the routing "oracle-N" always selects this cluster.
        ensemble = Ensemble(
            [replace(one.expert, encoder=number) for one, number in zip(experts, which, strict=True)],
            None,
            f"oracle-{cluster}",
            null=move_to(self._encoder.null(1), device),
            replicas="equal",
        )
        warn_uncalibrated(ensemble)
        # A row must be drawn by all replicas, so a failing one raises.
        self._sampler = Sampler(ensemble, non_finite="raise")

    @torch.inference_mode()
    def draw(
        self,
        captions: Sequence[str],
        rows: range,
        sampling: Sampling,
        batch: int = BATCH,
        tell: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """Draw latents.

        A row depends on its caption, its number and the seed, and on its batch only by rounding.

        Args:
            captions: of the rows.
            rows: their numbers, as many.
            sampling: how they are drawn.
            batch: rows sampled at a time.
            tell: called with the number of rows done.

        Returns:
            [n, C, H, W] float16, as shards store them.

        Raises:
            AtollError: an expert returned NaN or infinity, or a latent is not finite in float16.
        """
        batches = []
        for start in range(0, len(rows), batch):
            # The noise depends on the number of the row, not on its batch.
            part = slice(start, start + batch)
            x = noise(sampling.seed, self.cluster, rows[part], self.shape).to(self._device)
            # The condition changes with the rows, the ensemble does not.
            velocity = partial(
                self._sampler.velocity,
                condition=move_to(self._encoder(captions[part]), self._device),
                guidance_scale=sampling.guidance_scale,
            )
            latents = sample(velocity, x, sampling.steps, sampling.method).half().cpu()
            # Shards hold float16: a value beyond 65504 would be infinite.
            if not latents.isfinite().all():
                raise AtollError(
                    f"cluster {self.cluster}: a latent that {self._names} drew is not finite in float16; take more "
                    "steps, less guidance, or another expert"
                )
            batches.append(latents)
            tell(min(start + batch, len(rows)))
        return torch.cat(batches)
