"""UniPC of order 3 (Zhao et al. 2023, arXiv 2302.04867) for alpha = 1 - t, sigma = t, with l = log(alpha/sigma).

The evaluation at a point, which predicts the next one, also corrects the point itself, so a step still evaluates the
velocity once. Both are sums of estimates of x0, at this point and at others, with weights that integrate polynomials in
l to the order of the points, with the paper's B(h) = e^-h - 1:

    x_next = (sigma_next/sigma) x + alpha_next (1 - e^-h) (x0 + sum_k w_k (x0_k - x0) / r_k),    r_k = (l_k - l)/h

l is infinite at t = 1 and t = 0. An estimate at t = 1 therefore counts only for the steps that touch it, and the step
to t = 0 returns x0, which is its exact limit.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atoll.schedule import PATH
from atoll.shapes import per_sample

_POINTS = 3  # estimates that a prediction uses


@dataclass(frozen=True)
class Estimate:
    """An estimate of x0 [B, ...], and l [B] where it was made."""

    x0: Tensor
    l: Tensor


@dataclass
class UniPC:
    """The points of one sampling.

    Attributes:
        steps: that are left.
        to_zero: samples whose last time is 0 [B] bool. Their last steps have a lower order, as in diffusers, since l
            grows without bound.
        points: the last estimates, the newest first.
        x: the corrected sample [B, ...] at the newest.
        t: its time [B].
        order: of the last prediction [B] int64, if there were as many points.
    """

    steps: int
    to_zero: Tensor
    points: list[Estimate] = field(default_factory=list)
    x: Tensor | None = None
    t: Tensor | None = None
    order: Tensor | None = None

    def step(self, x: Tensor, t: Tensor, t_next: Tensor, velocity: Tensor) -> Tensor:
        """Return x at t_next [B, ...], from the prediction x [B, ...] at t [B] and the velocity there."""
        here = Estimate(x - per_sample(t, x) * velocity, PATH.log_snr(t) / 2)
        # Correct the point: the last step once more, with the estimate at its end.
        if self.x is not None and self.t is not None and self.order is not None:
            x = _step(self.x, self.t, t, self.points, self.order, here)
        # Predict the next one.
        self.points = [here, *self.points][:_POINTS]
        self.x, self.t, self.order = x, t, torch.where(self.to_zero, self.steps, _POINTS)
        self.steps -= 1
        return _step(x, t, t_next, self.points, self.order, None)


def _step(x: Tensor, t: Tensor, t_next: Tensor, points: list[Estimate], order: Tensor, end: Estimate | None) -> Tensor:
    """Return x at t_next [B, ...] by estimates at t and before, to each sample's order; `end`, at t_next, corrects."""
    here, h = points[0], PATH.log_snr(t_next) / 2 - points[0].l
    slope = torch.zeros_like(x)
    # Samples may have times of their own, and so another number of points at finite l. These are the newest ones.
    for earlier in range(len(points)):
        others = points[1 : earlier + 1] + ([] if end is None else [end])
        if others:
            usable = torch.isfinite(h) & torch.isfinite(points[earlier].l) & (earlier < order)
            usable |= torch.tensor(earlier == 0 and end is not None, device=t.device)
            weights = _weights(here, [other.l for other in points[1 : earlier + 1]], h, usable, end is not None)
            sums = sum(per_sample(weights[:, k], x) * (other.x0 - here.x0) for k, other in enumerate(others))
            slope = torch.where(per_sample(usable, x), sums, slope)
    # alpha_next e^-h = alpha sigma_next/sigma, which is finite at both ends.
    shrink = t_next / t
    return per_sample(shrink, x) * x + per_sample((1 - t_next) - (1 - t) * shrink, x) * (here.x0 + slope)


def _weights(here: Estimate, earlier: list[Tensor], h: Tensor, usable: Tensor, corrects: bool) -> Tensor:
    """Return w_k / r_k of each further estimate [B, n], the one at the end last; for unusable samples any number."""
    # Where l is infinite, any points do.
    places = [torch.where(usable, (l - here.l) / h, -1.0 - k).double() for k, l in enumerate(earlier)]
    places += [torch.ones_like(h, dtype=torch.float64)] if corrects else []
    r = torch.stack(places, dim=1)  # [B,n]
    n = r.shape[1]
    # A single point has half the difference, as in the paper's code.
    if n == 1:
        return (0.5 / r).to(h)

    # sum_k w_k r_k^i = i! phi_(i+2)(h) / B(h) for i = 0 .. n - 1.
    z = -torch.where(usable, h, 1.0).double()
    phi, bounds = torch.expm1(z) / z - 1, []
    for i in range(1, n + 1):
        bounds.append(phi * math.factorial(i) / torch.expm1(z))
        phi = phi / z - 1 / math.factorial(i + 1)
    powers = torch.stack([r**i for i in range(n)], dim=1)  # [B,n,n]
    w: Tensor = torch.linalg.solve(powers, torch.stack(bounds, dim=1))  # [B,n]
    return (w / r).to(h)
