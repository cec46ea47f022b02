"""Fits the logit of one step of a router's growth: logistic regression on frozen features, a convex problem."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.nn.router import GrownLogit

# Candidates for the ridge, per standardised feature: held-out latents choose.
RIDGES = (1e-2, 1e-3, 1e-4, 1e-5)
DEFAULT_RIDGE = 1e-3  # without held-out latents
_ITERATIONS = 60  # of L-BFGS, for each ridge


@dataclass(frozen=True)
class LogitSamples:
    """Noisy latents as a logit reads them.

    Attributes:
        features: [n, F].
        t: [n].
        labels: 1 for the new cluster, 0 for the others, [n] float32.
        weights: [n], such that weighted frequencies are those of the data.
    """

    features: Tensor
    t: Tensor
    labels: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def loss(self, logit: GrownLogit) -> Tensor:
        """Return the weighted mean cross entropy in nats."""
        losses = F.binary_cross_entropy_with_logits(logit(self.features, self.t), self.labels, reduction="none")
        return (losses * self.weights).sum() / self.weights.sum()


@dataclass(frozen=True)
class FittedLogit:
    """The result of a fit. loss, held_out_loss: cross entropies in nats; None without held-out latents."""

    logit: GrownLogit
    ridge: float
    loss: float
    held_out_loss: float | None


def fit_logit(training: LogitSamples, held_out: LogitSamples | None) -> FittedLogit:
    """Fit the logit by L-BFGS, from a strong ridge to a weak one, and return the best on held-out latents.

    Args:
        training: to fit to.
        held_out: to choose the ridge by; None for `DEFAULT_RIDGE`.
    """
    # Standardised features: one ridge fits all of them, and the problem is well conditioned.
    mean, scale = training.features.mean(0), training.features.std(0).clamp(min=1e-6)
    standard = _standardised(training, mean, scale)
    judge = None if held_out is None else _standardised(held_out, mean, scale)
    logit = GrownLogit(training.features.shape[1])
    fits: list[tuple[float, float, Tensor, Tensor]] = []
    for ridge in RIDGES:
        # Each fit starts from the one before: the optimum moves continuously with the ridge.
        _minimise(logit, standard, ridge)
        with torch.no_grad():
            loss = float((standard if judge is None else judge).loss(logit))
        fits.append((loss, ridge, logit.weight.detach().clone(), logit.bias.detach().clone()))
        if ridge <= DEFAULT_RIDGE and judge is None:
            break
    # Held-out latents choose; without any, the default is the last one.
    best_loss, ridge, weight, bias = fits[-1] if judge is None else min(fits, key=lambda fit: fit[0])
    # Fold the standardisation into the weights, so that the network reads plain features.
    with torch.no_grad():
        logit.weight.copy_(weight / scale)
        logit.bias.copy_(bias - (weight / scale) @ mean)
        final = float(training.loss(logit))
    return FittedLogit(logit, ridge, final, best_loss if judge is not None else None)


def _standardised(samples: LogitSamples, mean: Tensor, scale: Tensor) -> LogitSamples:
    return LogitSamples((samples.features - mean) / scale, samples.t, samples.labels, samples.weights)


def _minimise(logit: GrownLogit, samples: LogitSamples, ridge: float) -> None:
    """Minimise cross entropy + ridge / 2 |weights|^2 over the weights of `logit`, in place."""
    optimizer = torch.optim.LBFGS(
        logit.parameters(), max_iter=_ITERATIONS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = samples.loss(logit) + ridge / 2 * logit.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
