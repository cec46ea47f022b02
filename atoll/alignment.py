"""Asks an expert of any objective for its (x0, eps) or velocity on the linear sampling path x = (1 - t) x0 + t eps.

`snr` is exact: the expert is asked where its own schedule has the same log-SNR. `native` is HDDM's Eqs. 5-8 read
literally (same x, same t, the derivative of the expert's own schedule), kept for comparison with the paper.
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
    """The expert's (x0, eps), each [B, ...], for x [B, ...] at times t [B] of the linear path.

    Inside the objective's support the expert is asked at c x with the time tau of equal log-SNR, where
    c = alpha_expert(tau) / alpha_path(t) = sigma_expert(tau) / sigma_path(t); its (x0, eps) then holds for x itself.
    Outside, tau stays at the edge; what the expert says best there is kept while x stays explained: at the noisy edge
    c is the sigma ratio, x0 is kept and eps = (x - alpha x0)/sigma; at the clean edge c is the alpha ratio, eps is
    kept and x0 = (x - sigma eps)/alpha. Both are continuous at the edge and finite at t = 1 and t = 0.

    Without calibration an eps-expert's x0 is clamped to +-20 at high noise, HDDM's safeguard.
    """
    schedule = objective.schedule
    t_min, t_max = objective.support
    edges = schedule.log_snr(torch.tensor([t_min, t_max], dtype=torch.float64)).to(t)
    log_snr = PATH.log_snr(t)
    tau = schedule.time_at(log_snr).clamp(t_min, t_max)
    clean, noisy = log_snr > edges[0], log_snr < edges[1]

    # Both ratios agree inside; each is used on the side where it does not divide by a small number.
    by_sigma = noisy | ((log_snr < 0) & ~clean)
    numerator = torch.where(by_sigma, schedule.sigma(tau), schedule.alpha(tau))
    denominator = torch.where(by_sigma, PATH.sigma(t), PATH.alpha(t))
    asked = per_sample(numerator / denominator, x) * x
    x0, eps = objective.to_x0_eps(predict(asked, tau * objective.time_scale), asked, tau)

    alpha, sigma = per_sample(PATH.alpha(t), x), per_sample(PATH.sigma(t), x)
    if calibration is None and objective.prediction == "eps":
        limited = x0.clamp(-X0_CLAMP, X0_CLAMP)
        changed = limited != x0
        x0, eps = limited, torch.where(changed, (x - alpha * limited) / sigma.clamp(min=0.5), eps)
    if noisy.any():
        eps = torch.where(per_sample(noisy, x), (x - alpha * x0) / torch.where(per_sample(noisy, x), sigma, 1), eps)
    if clean.any():
        x0 = torch.where(per_sample(clean, x), (x - sigma * eps) / torch.where(per_sample(clean, x), alpha, 1), x0)
    return (x0, eps) if calibration is None else calibration.correct(x0, eps, t)


def snr_velocity(
    predict: Predict, objective: Objective, x: Tensor, t: Tensor, calibration: Calibration | None = None
) -> Tensor:
    """u = dx/dt = eps - x0 on the linear path, [B, ...], by exact log-SNR alignment."""
    x0, eps = snr_x0_eps(predict, objective, x, t, calibration)
    return eps - x0


def native_velocity(predict: Predict, objective: Objective, x: Tensor, t: Tensor) -> Tensor:
    """HDDM Eqs. 5-8 with the paper's safeguards, [B, ...]: the expert is asked at the same x and the same t.

    A flow expert's output is its velocity. For the others x0 is solved with alpha >= 0.01 and clamped to +-20, and
    u = alpha' x0 + sigma' eps with the derivatives of the expert's own schedule; above t = 0.85 it is damped (the paper
    names the threshold; the factor, falling linearly to one half at t = 1, is ours). Wrong wherever the expert's
    schedule is not the linear one.
    """
    t_min, t_max = objective.schedule.support
    tau = t.clamp(t_min, t_max)
    output = predict(x, tau * objective.time_scale).to(x.dtype)
    if objective.prediction == "flow":
        return output
    schedule = objective.schedule
    alpha, sigma = per_sample(schedule.alpha(tau), x), per_sample(schedule.sigma(tau), x)
    if objective.prediction == "eps":
        eps = output
        x0 = (x - sigma * eps) / alpha.clamp(min=ALPHA_FLOOR)
    elif objective.prediction == "v":
        x0, eps = alpha * x - sigma * output, sigma * x + alpha * output
    else:
        x0 = output
        eps = (x - alpha * x0) / sigma.clamp(min=ALPHA_FLOOR)
    x0 = x0.clamp(-X0_CLAMP, X0_CLAMP)
    velocity = per_sample(schedule.d_alpha(tau), x) * x0 + per_sample(schedule.d_sigma(tau), x) * eps
    damping = 1 - 0.5 * ((t - DAMPING_START) / (1 - DAMPING_START)).clamp(0, 1)
    return velocity * per_sample(damping, x)
