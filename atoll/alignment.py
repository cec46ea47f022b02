"""Alignment: an expert of any objective evaluated on the linear sampling path x = (1 - t) x0 + t eps.

`snr` is exact: the expert is evaluated where its own schedule has the same log-SNR. `native` is HDDM's Eqs. 5-8 read
literally (same x, same t, the derivatives of the expert's own schedule), kept for comparison with the paper.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from atoll.calibration import Calibration
from atoll.objective import Objective
from atoll.schedule import PATH
from atoll.shapes import per_sample

Predict = Callable[[Tensor, Tensor], Tensor]  # network(x [B, ...], time [B], already scaled) -> [B, ...]

# HDDM's hand-set safeguards (section 3.3): |x0| <= 20, alpha >= 0.01, damping above t = 0.85.
X0_CLAMP = 20.0
ALPHA_FLOOR = 0.01
DAMPING_START = 0.85


def snr_x0_eps(
    predict: Predict, objective: Objective, x: Tensor, t: Tensor, calibration: Calibration | None = None
) -> tuple[Tensor, Tensor]:
    """Evaluate an expert at matched log-SNR.

    Inside the objective's support the network sees c x at the time t_expert of equal log-SNR, where
    c = alpha_expert(t_expert) / alpha_path(t) = sigma_expert(t_expert) / sigma_path(t). Its (x0, eps) then holds for x
    itself.

    Outside the support t_expert stays at the edge. At the noisy edge c is the sigma ratio, x0 is kept and
    eps = (x - alpha x0)/sigma. At the clean edge c is the alpha ratio, eps is kept and x0 = (x - sigma eps)/alpha.
    Both are continuous at the edge and finite at t = 1 and t = 0.

    Args:
        predict: the expert's network.
        objective: what it was trained with.
        x: points [B, ...] of the linear path.
        t: times [B] of the linear path.
        calibration: corrects x0. Without one, an eps-expert's x0 is clamped to +-20, HDDM's safeguard.

    Returns:
        (x0, eps), each [B, ...], with x = (1 - t) x0 + t eps.
    """
    # The expert's time of equal log-SNR, at most at the edges of its support.
    schedule = objective.schedule
    t_min, t_max = objective.support
    edges = schedule.log_snr(torch.tensor([t_min, t_max], dtype=torch.float64)).to(t)
    log_snr = PATH.log_snr(t)
    t_expert = schedule.time_at(log_snr).clamp(t_min, t_max)
    clean, noisy = log_snr > edges[0], log_snr < edges[1]

    # Both ratios agree inside; each is used on the side where it does not divide by a small number.
    by_sigma = noisy | ((log_snr < 0) & ~clean)
    numerator = torch.where(by_sigma, schedule.sigma(t_expert), schedule.alpha(t_expert))
    denominator = torch.where(by_sigma, PATH.sigma(t), PATH.alpha(t))
    x_scaled = per_sample(numerator / denominator, x) * x
    output = predict(x_scaled, t_expert * objective.time_scale)
    x0, eps = objective.to_x0_eps(output, x_scaled, t_expert)

    # Clamp x0; where that changes it, eps follows from x.
    alpha, sigma = per_sample(PATH.alpha(t), x), per_sample(PATH.sigma(t), x)
    if calibration is None and objective.prediction == "eps":
        clamped = x0.clamp(-X0_CLAMP, X0_CLAMP)
        changed = clamped != x0
        x0, eps = clamped, torch.where(changed, (x - alpha * clamped) / sigma.clamp(min=0.5), eps)

    # Outside the support, the half that the expert knows least follows from x and the other half.
    if noisy.any():
        eps = torch.where(per_sample(noisy, x), (x - alpha * x0) / torch.where(per_sample(noisy, x), sigma, 1), eps)
    if clean.any():
        x0 = torch.where(per_sample(clean, x), (x - sigma * eps) / torch.where(per_sample(clean, x), alpha, 1), x0)
    return (x0, eps) if calibration is None else calibration.correct(x0, eps, t)


def snr_velocity(
    predict: Predict, objective: Objective, x: Tensor, t: Tensor, calibration: Calibration | None = None
) -> Tensor:
    """Return u = dx/dt = eps - x0 on the linear path, [B, ...], by exact alignment; see `snr_x0_eps`."""
    # On the linear path the velocity is the difference of the two.
    x0, eps = snr_x0_eps(predict, objective, x, t, calibration)
    return eps - x0


def native_velocity(predict: Predict, objective: Objective, x: Tensor, t: Tensor) -> Tensor:
    """Evaluate an expert at the same x and the same t: HDDM Eqs. 5-8 with the paper's safeguards.

    A flow expert's output is its velocity. For the others x0 is solved with alpha >= 0.01 and clamped to +-20, and
    u = alpha' x0 + sigma' eps with the derivatives of the expert's own schedule. Above t = 0.85 the velocity is
    damped; the paper names the threshold, the factor, which falls linearly to one half at t = 1, is ours. The result
    is exact for flow experts of the linear path only.

    Args:
        predict: the expert's network.
        objective: what it was trained with.
        x: points [B, ...].
        t: times [B].

    Returns:
        The velocity [B, ...].
    """
    # Outside the schedule's support the expert was never trained: it stays at the edge.
    t_min, t_max = objective.schedule.support
    t_expert = t.clamp(t_min, t_max)
    output = predict(x, t_expert * objective.time_scale).to(x.dtype)
    if objective.prediction == "flow":
        return output
    # Solve the output for (x0, eps) with clamped divisions.
    schedule = objective.schedule
    # The factors of the expert's own schedule, per sample.
    alpha, sigma = per_sample(schedule.alpha(t_expert), x), per_sample(schedule.sigma(t_expert), x)
    if objective.prediction == "eps":
        eps = output
        x0 = (x - sigma * eps) / alpha.clamp(min=ALPHA_FLOOR)
    elif objective.prediction == "v":
        x0, eps = alpha * x - sigma * output, sigma * x + alpha * output
    else:
        x0 = output
        eps = (x - alpha * x0) / sigma.clamp(min=ALPHA_FLOOR)
    # The paper's clamp; eps stays as it was.
    x0 = x0.clamp(-X0_CLAMP, X0_CLAMP)
    # The velocity on the expert's own path, damped at high noise.
    velocity = per_sample(schedule.d_alpha(t_expert), x) * x0 + per_sample(schedule.d_sigma(t_expert), x) * eps
    damping = 1 - 0.5 * ((t - DAMPING_START) / (1 - DAMPING_START)).clamp(0, 1)
    return velocity * per_sample(damping, x)
