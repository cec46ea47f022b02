"""Averages of the weights whose width is chosen after training (Karras et al. 2024, EDM2, arXiv 2312.02696).

A power-function average at step t weights the weights of step tau <= t by tau^gamma (Eq. 2). Its width sigma_rel is the
standard deviation of this profile over its length (Eq. 5). Training tracks a few widths and saves snapshots; the
profile of any other width is then fitted as a weighted sum of the snapshots' profiles (section 3.2, appendix C.3).

    .train-3-moss/ema/000005000-1.safetensors     the second width's average at step 5000
"""

import numpy as np

from atoll.errors import AtollError

WIDEST = 12**-0.5  # sigma_rel of gamma = 0, the plain mean


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent gamma of a width (Eqs. 5, 126): the largest root of (g+2)^2 (g+3) = (g+1) / sigma_rel^2.

    Raises:
        AtollError: sigma_rel is not between 0 and the plain mean's 0.289.
    """
    if not 0 < sigma_rel < WIDEST:
        raise AtollError(f"sigma_rel {sigma_rel}: expected a width above 0 and below {WIDEST:.4f}, the plain mean's")
    # The cubic (g+2)^2 (g+3) - (g+1) / sigma_rel^2 in powers of g.
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(gamma: float, step: int, every: int = 1) -> float:
    """Return beta of the update at this step, `every` steps after the last update (Eq. 3); 0 at the first."""
    return float((1 - every / step) ** (gamma + 1))


def products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Return the scalar products of profiles (appendix C.3).

    Args:
        t_a: last steps of n profiles, [n].
        gamma_a: their exponents [n].
        t_b: last steps of m profiles, [m].
        gamma_b: their exponents [m].

    Returns:
        [n, m] float64.
    """
    t_a, gamma_a, t_b, gamma_b = t_a[:, None], gamma_a[:, None], t_b[None], gamma_b[None]
    # Closed form of the integral of both profiles over the time that they share.
    longer, shorter = np.maximum(t_a, t_b), np.minimum(t_a, t_b)
    exponent = np.where(t_a < t_b, gamma_b, gamma_a)  # of the profile that ends later
    shape = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return np.asarray(shape * (shorter / longer) ** exponent / longer)


def solve(steps: list[int], gammas: list[float], step: int, gamma: float) -> np.ndarray:
    """Return the factors [n] with which the snapshots' profiles sum up closest to one profile (least squares).

    Args:
        steps: of n snapshots.
        gammas: their exponents.
        step: last step of the profile to fit.
        gamma: its exponent.
    """
    # One profile per snapshot, in float64 since the system is nearly singular.
    t, g = np.array(steps, dtype=np.float64), np.array(gammas, dtype=np.float64)
    norm = np.sqrt(np.diag(products(t, g, t, g)))  # unit length makes the system well conditioned
    matrix = products(t, g, t, g) / norm / norm[:, None]
    # The profile to fit, in the same scale; the factors come back for the unscaled profiles.
    target = products(t, g, np.array([step], float), np.array([gamma]))[:, 0] / norm
    return np.asarray(np.linalg.lstsq(matrix, target, rcond=1e-13)[0] / norm)
