"""Averages of the weights whose width is chosen after training (Karras et al. 2024, EDM2, arXiv 2312.02696).

A power-function average weighs the weights of time tau by tau^gamma, up to now (Eq. 2); its width sigma_rel is that
profile's standard deviation over its length (Eq. 5). Some widths are tracked and written down now and then; the profile
of any other width is then fitted as a sum of those that were written down (section 3.2, appendix C.3).

    .train-3-moss/ema/000005000-1.safetensors     the second width's average at step 5000
"""

from typing import TYPE_CHECKING

import numpy as np

from atoll.errors import AtollError

if TYPE_CHECKING:
    pass

WIDEST = 12**-0.5  # sigma_rel of gamma = 0, the plain mean


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a width (Eqs. 5, 126): the largest root of (g+2)^2 (g+3) = (g+1) / sigma_rel^2.

    Raises:
        AtollError: it is not between 0 and the plain mean's 0.289.
    """
    if not 0 < sigma_rel < WIDEST:
        raise AtollError(f"sigma_rel {sigma_rel}: expected a width above 0 and below {WIDEST:.4f}, the plain mean's")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(gamma: float, step: int, every: int = 1) -> float:
    """beta of the update at this step, `every` steps after the last one (Eq. 3); 0 at the first."""
    return float((1 - every / step) ** (gamma + 1))


def products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """The scalar products [n, m] of n profiles that end at t_a with m that end at t_b (appendix C.3)."""
    t_a, gamma_a, t_b, gamma_b = t_a[:, None], gamma_a[:, None], t_b[None], gamma_b[None]
    longer, shorter = np.maximum(t_a, t_b), np.minimum(t_a, t_b)
    exponent = np.where(t_a < t_b, gamma_b, gamma_a)  # of the one that ends later
    shape = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return np.asarray(shape * (shorter / longer) ** exponent / longer)


def solve(steps: list[int], gammas: list[float], step: int, gamma: float) -> np.ndarray:
    """The factors [n] of the snapshots (steps, gammas) whose sum is nearest to the profile (step, gamma)."""
    t, g = np.array(steps, dtype=np.float64), np.array(gammas, dtype=np.float64)
    norm = np.sqrt(np.diag(products(t, g, t, g)))  # profiles of length 1 are better to solve for
    matrix = products(t, g, t, g) / norm / norm[:, None]
    wanted = products(t, g, np.array([step], float), np.array([gamma]))[:, 0] / norm
    return np.asarray(np.linalg.lstsq(matrix, wanted, rcond=1e-13)[0] / norm)
