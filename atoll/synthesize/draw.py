"""One cluster's experts, without a router, draw latents of that cluster."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from atoll.choices import Method
from atoll.condition import move_to
from atoll.encoders.text import PromptEncoder, build_encoder
from atoll.encoders.weights import same
from atoll.ensemble import Ensemble, Sampler
from atoll.ensemble.loading import LoadedExpert, warn_uncalibrated
from atoll.errors import AtollError
from atoll.solver import sample
from atoll.synthesize.rows import noise

BATCH = 64  # rows sampled at a time


@dataclass(frozen=True)
class Sampling:
    """How latents are drawn. A guidance scale of 1 draws what the expert takes its data to be."""

    steps: int
    method: Method
    guidance_scale: float
    seed: int

    def __post_init__(self) -> None:
        """Raises AtollError for what no solver takes: better now than when the first expert is loaded."""
        if self.method not in get_args(Method):
            raise AtollError(f"unknown method {self.method!r}; expected one of {', '.join(get_args(Method))}")
        if self.steps < 1:
            raise AtollError(f"steps is {self.steps}; expected at least 1")

    def config(self) -> dict[str, Any]:
        return asdict(self)


class ClusterModel:
    """The experts of one cluster as one model of it.

    Replicas are combined as an ensemble combines them that has no stackings, with equal shares: a stacking is measured
    on latents of the data, which nobody gives.

    Args:
        cluster: its number.
        experts: of that cluster, at least one.
        device: where they are.
    """

    def __init__(self, cluster: int, experts: Sequence[LoadedExpert], device: str | torch.device = "cpu"):
        self.cluster, self._device = cluster, device
        self.shape = experts[0].card.latent_shape
        self._names = ", ".join(one.expert.name for one in experts)
        kinds: list[dict[str, Any]] = []  # of encoders, without repetition
        for one in experts:
            if not any(same(one.card.condition, kind) for kind in kinds):
                kinds.append(one.card.condition)
        self._encoder = PromptEncoder([build_encoder(kind) for kind in kinds])
        which = [next(i for i, kind in enumerate(kinds) if same(one.card.condition, kind)) for one in experts]
        ensemble = Ensemble(
            [replace(one.expert, encoder=number) for one, number in zip(experts, which, strict=True)],
            None,
            f"oracle-{cluster}",
            null=move_to(self._encoder.null(1), device),
            replicas="equal",
        )
        warn_uncalibrated(ensemble)
        # No replica may fail: a latent is drawn by all of them, or not at all.
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
        """Latents [n, C, H, W] float16, as shards hold them, of the rows with these captions (n of each).

        A row depends on its caption, its number and the seed; on its batch by no more than rounding. tell: hears how
        many rows are done.

        Raises:
            AtollError: an expert answered with NaN or infinity, or a latent is not finite in float16.
        """
        drawn = []
        for start in range(0, len(rows), batch):
            mine = slice(start, start + batch)
            x = noise(sampling.seed, self.cluster, rows[mine], self.shape).to(self._device)
            velocity = partial(
                self._sampler.velocity,
                condition=move_to(self._encoder(captions[mine]), self._device),
                guidance_scale=sampling.guidance_scale,
            )
            latents = sample(velocity, x, sampling.steps, sampling.method).half().cpu()
            if not latents.isfinite().all():
                raise AtollError(
                    f"cluster {self.cluster}: a latent that {self._names} drew is not finite in float16; take more "
                    "steps, less guidance, or another expert"
                )
            drawn.append(latents)
            tell(min(start + batch, len(rows)))
        return torch.cat(drawn)
