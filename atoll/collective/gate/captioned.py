"""What captions are worth: the best linear denoiser that also reads them, in closed form.

A caption is one vector. Ridge regression predicts the latent from it; the best linear denoiser of what remains does the
rest. A network whose captions mean what the collective's captions mean gains at least part of what this one gains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.collective.gate.check import excess
from atoll.collective.gate.errors import NoisyVelocity
from atoll.collective.gate.linear import LinearDenoiser
from atoll.collective.gate.probe import Noisy
from atoll.encoders.text import TextEncoder
from atoll.schedule import PATH
from atoll.shapes import per_sample

MAX_CAPTIONS = 1024  # of the regression: a large text encoder reads no more within minutes
_BATCH = 64  # captions per call of the text encoder
_PENALTIES = torch.logspace(-6, 2, 17, dtype=torch.float64)  # of the ridge, in units of the largest singular value^2


@dataclass(frozen=True, eq=False)
class CaptionedDenoiser:
    """A linear denoiser that reads captions as vectors of P numbers; D numbers per latent.

    Attributes:
        centre: mean caption vector [P]; mean: mean latent [D]; slope: of the regression [P, D]. All float64.
        rest: the linear denoiser of what the regression leaves.
        encoder: of captions.
        rows: the number of rows that it is fitted to.
        worse: Student's t of its squared error less that of the mean latent, on rows that are left out; far below 0 if
            captions say anything.
    """

    centre: Tensor
    mean: Tensor
    slope: Tensor
    rest: LinearDenoiser
    encoder: TextEncoder
    rows: int
    worse: float

    @classmethod
    def of(cls, latents: Tensor, captions: Sequence[str], encoder: TextEncoder) -> "CaptionedDenoiser":
        """Fit to latents [n, ...] with their captions, n at least 2.

        The penalty is the one of the least leave-one-out error (Allen 1974), and the remainders are leave-one-out
        too: those of the fit would promise too much for captions that it has not seen.
        """
        latents, captions = latents[:MAX_CAPTIONS], captions[:MAX_CAPTIONS]
        vectors, rows = caption_vectors(captions, encoder), latents.flatten(1).double()
        centre, mean = vectors.mean(0), rows.mean(0)
        left, singular, right = torch.linalg.svd(vectors - centre, full_matrices=False)
        projected = left.T @ (rows - mean)
        largest = singular[0].square().clamp(min=1e-30)

        def remainders(penalty: Tensor) -> Tensor:
            shrunk = singular.square() / (singular.square() + penalty * largest)
            fitted, leverage = left @ (shrunk[:, None] * projected), left.square() @ shrunk + 1 / len(rows)
            result: Tensor = (rows - mean - fitted) / (1 - leverage).clamp(min=1e-9)[:, None]
            return result

        penalty = _PENALTIES[int(torch.stack([remainders(one).square().sum() for one in _PENALTIES]).argmin())]
        slope = right.T @ ((singular / (singular.square() + penalty * largest))[:, None] * projected)
        remainder, spread = remainders(penalty), (rows - mean) * len(rows) / (len(rows) - 1)
        worse = float(excess(remainder.square().mean(1), spread.square().mean(1)))
        return cls(centre, mean, slope, LinearDenoiser.of(remainder.view_as(latents)), encoder, len(rows), worse)

    def velocity(self, captions: Sequence[str]) -> NoisyVelocity:
        """Return its velocity for rows with these captions."""
        guess = self.mean + (caption_vectors(captions, self.encoder) - self.centre) @ self.slope

        def velocity(noisy: Noisy) -> Tensor:
            # For m + x0' with x' = x - (1 - t) m the linear path has u = u' - m.
            shift = guess.view_as(noisy.x).to(noisy.x)
            return self.rest.velocity(noisy.x - per_sample(PATH.alpha(noisy.t), shift) * shift, noisy.t) - shift

        return velocity


def caption_vectors(captions: Sequence[str], encoder: TextEncoder) -> Tensor:
    """Return one vector per caption, [n, P] float64: the pooled one, or the mean of the token states without one."""
    distinct = list(dict.fromkeys(captions))
    parts = []
    for start in range(0, len(distinct), _BATCH):
        condition = encoder(distinct[start : start + _BATCH])
        vectors = condition.pooled
        if vectors is None:
            weights = condition.mask.to(condition.states)[..., None]
            vectors = (condition.states * weights).sum(1) / weights.sum(1)
        parts.append(vectors.double())
    number = {caption: place for place, caption in enumerate(distinct)}
    return torch.cat(parts)[torch.tensor([number[caption] for caption in captions])]


def exchanged(captions: Sequence[str]) -> list[str]:
    """Return the captions in another order: half-way round their sorted list, so that as many as possible differ."""
    order = sorted(range(len(captions)), key=lambda row: captions[row])
    result = [""] * len(captions)
    for place, row in enumerate(order):
        result[row] = captions[order[(place + len(order) // 2) % len(order)]]
    return result
