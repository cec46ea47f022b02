"""The checks that evaluate the network: on its own cluster, without a caption, on other clusters, against its card."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from atoll.calibration import NODES, Calibration
from atoll.collective.gate.check import FALSE_REFUSALS, SHARES, Check, excess, quantile
from atoll.collective.gate.errors import Draws, NoisyVelocity, linear_velocity
from atoll.collective.gate.linear import LinearDenoiser
from atoll.collective.gate.probe import EDGES, Noisy
from atoll.interpolation import bracket
from atoll.randomness import cpu_generator, hashed_seed
from atoll.schedule import PATH

# Bands of path time for checks of which less is expected: near the data, in the middle, near the noise.
BANDS = (EDGES[0], 0.25, 0.7, EDGES[-1])
NEAR_DATA = BANDS[1]  # below it, an x0-expert is compared in x0
PROMPT_LEVELS = (7, 9)  # of EDGES: there captions matter, and experts of all predictions use them
CARD_TIMES = NODES[3::6]  # nodes at which the card's claim is compared
# How much worse than the best linear denoiser an honest expert may be at its worst level: tolerance bounds of honest
# experts (99.9 % of all, at 95 % confidence), by `benchmarks/gate.py`. The first limits the border where clusters are
# far apart. The second is the imprecision of a network: a level at which the clusters' linear denoisers are nearer to
# each other says nothing about what an expert knows, such as the levels next to the data.
HONEST_SPREAD = 2.0
IMPRECISION = 1.25
_ROUNDING = 1e-3  # a spread of logarithms below this is rounding


def tolerance(draws: Draws, own: LinearDenoiser, other: LinearDenoiser | None, prediction: str = "") -> Tensor:
    """Return the error that each row may have, in units of `Draws.scale` [levels, n].

    Two hypotheses: the expert knows its cluster as well as the best linear denoiser of that cluster, or it knows
    other data only, as the best linear denoiser of the other clusters. The border lies half-way between their errors
    on a logarithmic scale, and never above HONEST_SPREAD times the first. Where the second is not IMPRECISION times the
    first, no network can be told from them, and the border is there.

    A network that predicts x0 has an error of x0 that does not vanish with the noise, and a velocity error that grows
    like 1/t^2. Below NEAR_DATA it may have the x0 error that the linear denoiser is expected to have there.

    Args:
        draws: the rows.
        own: of the expert's cluster.
        other: of the other clusters; None if there is no other.
        prediction: the expert's.
    """
    errors = draws.errors(linear_velocity(own))
    ratio = draws.errors(linear_velocity(other)).mean(1) / errors.mean(1) if other else torch.ones(len(errors))
    errors = errors * torch.where(ratio < IMPRECISION, IMPRECISION, ratio.sqrt().clamp(max=HONEST_SPREAD))[:, None]
    if prediction == "x0":
        times = torch.stack([noisy.t for noisy in draws.noisy])
        floor = HONEST_SPREAD * own.error(torch.tensor([NEAR_DATA])) * (NEAR_DATA / times) ** 2 / draws.scale
        errors = torch.where(times < NEAR_DATA, errors.maximum(floor), errors)
    return errors


def check_error(errors: Tensor, allowed: Tensor, edges: Sequence[float], name: str = "error") -> Check:
    """Refuse an expert whose error exceeds the tolerance at any noise level.

    The worst level counts, not the mean. Statistic: the largest Student's t over levels of the paired differences.
    Threshold: its quantile for this number of levels and rows.

    Args:
        errors: the expert's [levels, n].
        allowed: from `tolerance` [levels, n].
        edges: the ends of the levels.
        name: of the check.
    """
    levels, rows = errors.shape
    values, bound = excess(errors, allowed), quantile(levels, rows)
    level, ratios = int(values.argmax()), errors.mean(1) / allowed.mean(1)
    where = f"t = {edges[level]:.3g} to {edges[level + 1]:.3g}"
    passed = bool(values[level] <= bound)
    subject = {"error": "its own cluster", "null": "its own cluster with the empty prompt"}[name]
    reason = (
        f"on {subject} its error is at most {float(ratios.max()):.2f} of the border"
        if passed
        else f"on {subject}, at {where}, its error is {float(ratios[level]):.2f} of the border between a denoiser of "
        "this cluster and one of the others"
    )
    return Check(name, float(values[level]), bound, passed, reason, where, float(ratios.max()))


def check_prompt(true: Tensor, exchanged: Tensor, linear_true: Tensor, linear_exchanged: Tensor) -> Check:
    """Refuse an expert whose captions mean much less than they mean to the best linear denoiser with captions.

    What a caption means is the mean over levels of log(error with it / error with another row's caption). Two
    hypotheses: the expert's captions predict images as well as that denoiser's, or not at all. The border lies half-way
    on the scale of correlations: half of a correlation explains a quarter of the squared error. Statistic: Student's t
    of the mean over the expert's rows less the border. Threshold: its quantile. It finds captions that were exchanged
    or ignored.

    The spread is that of the expert alone: one that ignores captions has next to none, and the denoiser's would hide
    it.

    Args:
        true, exchanged: the expert's errors with the rows' own captions, and with each other's [levels, n].
        linear_true, linear_exchanged: those of the linear denoiser, on the same noise.
    """
    logs, linear = _logs(true, exchanged).mean(0), _logs(linear_true, linear_exchanged).mean(0)
    statistic, bound = float(excess(logs, linear.mean().expand_as(logs) / 4)), quantile(1, len(logs))
    passed, ratio, expected = statistic <= bound, float(logs.mean().exp()), float(linear.mean().exp())
    reason = (
        f"with the true captions its error is {ratio:.2f} of that with exchanged ones; the best linear denoiser's is "
        f"{expected:.2f}"
    )
    return Check("prompt", statistic, bound, passed, reason, "", ratio)


def check_others(errors: Tensor, random: Tensor, edges: Sequence[float]) -> Check:
    """Refuse an expert that is worse on other clusters than images of its own cluster drawn blindly.

    An honest expert knows nothing of these rows, and an ensemble gives it little weight there, so the bound is wide: it
    stops experts that explode or sabotage where a top-2 routing still reads them.

    Args:
        errors: the expert's on rows of other clusters [levels, n].
        random: those of random training latents as its x0 [levels, n].
        edges: the ends of the levels.
    """
    levels, rows = errors.shape
    values, bound = excess(errors, random), quantile(levels, rows)
    level, ratios = int(values.argmax()), errors.mean(1) / random.mean(1)
    where, passed = f"t = {edges[level]:.3g} to {edges[level + 1]:.3g}", bool(values[level] <= bound)
    reason = (
        f"on other clusters its error is at most {float(ratios.max()):.2f} of that of random images of its own"
        if passed
        else f"on other clusters, at {where}, its error is {float(ratios[level]):.2f} of that of random images of its "
        "own cluster"
    )
    return Check("others", float(values[level]), bound, passed, reason, where, float(ratios.max()))


def random_velocity(latents: Tensor, seed: int) -> NoisyVelocity:
    """Return the velocity towards random rows of latents [m, ...], whatever x is."""

    def velocity(noisy: Noisy) -> Tensor:
        generator = cpu_generator(hashed_seed("gate", seed, 10_000))
        rows = torch.randint(len(latents), (len(noisy.t),), generator=generator)
        return (noisy.x - latents[rows]) / noisy.t.view(-1, *[1] * (noisy.x.ndim - 1))

    return velocity


def check_captions(errors: Tensor, allowed: Tensor) -> Check:
    """Refuse an expert that is wrong for single captions.

    Of every row the mean over noise levels of log(error / tolerance). Only the noisy half counts: there the caption
    decides, nearer to the data the row itself. Rows that the network remembers make the lower half wide, so the upper
    half alone shows the spread: 1.4826 times its median distance from the median. Statistic: how far the worst row is
    above the median, or above the border if that is higher, in units of this spread. Threshold: the normal quantile
    for this number of rows.

    Args:
        errors, allowed: as for `check_error`.
    """
    rows = errors.shape[1]
    logs = _logs(errors, allowed)[errors.shape[0] // 2 :].mean(0)
    above = logs - logs.median()
    scores = _outlying(logs, 1.4826 * float(above[above >= 0].median()))
    worst, bound = int(scores.argmax()), _normal_quantile(rows)
    passed, ratio = float(scores[worst]) <= bound, float(logs[worst].exp())
    reason = (
        "no caption of the probe stands out"
        if passed
        else f"for one caption of the probe its error is {ratio:.1f} of the border, out of line with all others"
    )
    return Check("captions", float(scores[worst]), bound, passed, reason, f"row {worst}", ratio)


def check_single(errors: Tensor, allowed: Tensor, edges: Sequence[float]) -> Check:
    """Refuse an expert that is wrong in few places: single rows at single times, or a narrow band of times.

    A mean over rows hides them, because they widen its own spread. Of every row at every level, log(error / tolerance).
    The spread is the 0.9 quantile of all distances above a level's median, which one bad place in ten does not move.
    Statistic: how far the worst place is above its level's median, or above the border if that is higher, in units of
    this spread. Threshold: the normal quantile for the number of places.

    Args:
        errors, allowed, edges: as for `check_error`.
    """
    logs = _logs(errors, allowed)
    above = logs - logs.median(1, keepdim=True).values
    scores = _outlying(logs, float(above[above >= 0].quantile(0.9)) / NormalDist().inv_cdf(0.95))
    worst, bound = int(scores.argmax()), _normal_quantile(scores.numel())
    level, row = divmod(worst, scores.shape[1])
    passed, ratio = float(scores.max()) <= bound, float(logs[level, row].exp())
    where = f"t = {edges[level]:.3g} to {edges[level + 1]:.3g}"
    reason = (
        "no single row stands out at any time"
        if passed
        else f"for one row at {where} its error is {ratio:.1f} of the border, out of line with all others"
    )
    return Check("single", float(scores.max()), bound, passed, reason, where, ratio)


def _logs(errors: Tensor, allowed: Tensor) -> Tensor:
    return (errors / allowed).clamp(1e-12, 1e12).log()


def _outlying(logs: Tensor, spread: float) -> Tensor:
    """The distances above the median along the last axis, or above 0 if that is higher, in units of a spread."""
    # An expert that is far better than the border nearly everywhere may be near it somewhere.
    return (logs - logs.median(-1, keepdim=True).values.clamp(min=0)) / max(spread, _ROUNDING)


def _normal_quantile(tests: int) -> float:
    return NormalDist().inv_cdf(1 - FALSE_REFUSALS / SHARES / tests)


def check_card(errors: Tensor, linear: Tensor, all_linear: Tensor, claimed: Tensor, claimed_draws: int) -> Check:
    """Refuse an expert whose error on the card's own rows exceeds what the card says.

    The rows are those that training held out, which everybody can select again. The expert is evaluated on some of
    them, the best linear denoiser of the cluster on all: what is hard for one is hard for the other, so the expert's
    error on all rows is estimated by their ratio (the ratio estimator of survey sampling, Cochran 1977). What remains
    uncertain is the noise, which two draws per row show, and the spread of rows around the ratio.

    Args:
        errors: the expert's squared errors of x0, two draws of each row at each node [nodes, 2, n].
        linear: those of the linear denoiser, on the same noise [nodes, 2, n].
        all_linear: the same on all rows, with any noise [nodes, 2, N].
        claimed: the card's curve at these nodes [nodes].
        claimed_draws: noisy latents per node that the card's curve was measured with.
    """
    nodes, _, rows = errors.shape
    ratio = errors.mean((1, 2)) / linear.mean((1, 2))
    estimate, rest = ratio * all_linear.mean((1, 2)), errors - ratio[:, None, None] * linear
    # Variances: of the rows' spread, of the noise of both evaluations, and of the claim.
    noise = _noise(rest)
    between = (rest.mean(1).var(1) - noise / 2).clamp(min=0) * (1 / rows - 1 / all_linear.shape[2])
    both = noise / (2 * rows) + ratio**2 * _noise(all_linear) / (2 * all_linear.shape[2])
    error = (both + _noise(errors) / claimed_draws + between).sqrt()
    # What is below rounding of weights to bf16 is no difference: 2^-8 of the network's output, squared with its error.
    scale = error + 2**-8 * claimed.clamp(min=1e-12)
    values = torch.nan_to_num((estimate - claimed) / scale, nan=math.inf, posinf=math.inf)
    bound = quantile(nodes, rows)
    node, ratios = int(values.argmax()), estimate / claimed.clamp(min=1e-12)
    passed = bool(values[node] <= bound)
    reason = (
        f"its error is {float(ratios.max()):.2f} of what its card says at most"
        if passed
        else f"at t = {CARD_TIMES[node]:.3g} its error is {float(ratios[node]):.2f} of what its card says; "
        "the card is of other weights"
    )
    return Check("card", float(values[node]), bound, passed, reason, f"t = {CARD_TIMES[node]:.3g}", float(ratios.max()))


def _noise(errors: Tensor) -> Tensor:
    """The variance of one draw, from two draws of each row [nodes, 2, n] -> [nodes]."""
    variance: Tensor = (errors[:, 0] - errors[:, 1]).square().mean(1) / 2
    return variance


@torch.inference_mode()
def card_errors(velocity: NoisyVelocity, latents: Tensor, seed: int) -> Tensor:
    """Return squared errors of x0 at CARD_TIMES, two draws of each row of latents [n, ...]: [nodes, 2, n]."""
    errors = []
    for node, time in enumerate(CARD_TIMES):
        generator = cpu_generator(hashed_seed("gate", seed, 20_000 + node))
        t, both = torch.full((2 * len(latents),), time), torch.cat([latents, latents])
        eps = torch.randn(both.shape, generator=generator)
        noisy = Noisy(PATH.diffuse(both, eps, t), eps, t)
        # On the linear path u = (x - x0)/t, so x0's error is t times the velocity's.
        error = (velocity(noisy).double() - (eps - both)).square().flatten(1).mean(1) * time**2
        errors.append(error.view(2, -1))
    return torch.nan_to_num(torch.stack(errors), nan=torch.inf, posinf=torch.inf)


def claimed_errors(calibration: Calibration) -> Tensor:
    """Return the card's squared errors of x0 at CARD_TIMES [nodes], linear in the logarithm between its own nodes."""
    at = PATH.log_snr(torch.tensor(CARD_TIMES, dtype=torch.float64))
    logs = calibration.x0_mse.double().clamp(min=1e-12).log()
    left, offset = bracket(calibration.log_snr.double(), at)
    return torch.lerp(logs[left], logs[left + 1], offset).exp()
