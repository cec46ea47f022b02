"""The result of a check, and the quantiles that thresholds are derived from."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

# How often the whole gate may refuse an honest expert by chance. It is shared by all tests of all checks.
FALSE_REFUSALS = 1e-3
SHARES = 7  # checks that take part of it


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: of the check.
        statistic: what was measured; above `threshold` the expert is refused.
        threshold: what an honest expert does not exceed.
        passed: whether the expert passed.
        reason: one sentence for people.
        where: the place of the worst value (a noise level, a row), for people; "" if there is none.
        worst: the worst value in units of its reference, such as an error ratio.
    """

    name: str
    statistic: float
    threshold: float
    passed: bool
    reason: str
    where: str = ""
    worst: float = math.nan


def quantile(tests: int, rows: int) -> float:
    """Return the one-sided bound of Student's t for one check of `tests` tests with `rows` rows each.

    A check may refuse an honest expert with probability FALSE_REFUSALS / SHARES. Bonferroni: each of its tests gets
    an equal part, whatever their dependence. The t quantile is the normal one with three terms of the Cornish-Fisher
    series (Abramowitz and Stegun 26.7.5), exact to 1 % from 20 rows on.

    Args:
        tests: number of tests of the check.
        rows: rows that each test averages over, at least 2.
    """
    z = NormalDist().inv_cdf(1 - FALSE_REFUSALS / SHARES / tests)
    nu = max(rows - 1, 1)
    return (
        z
        + (z**3 + z) / (4 * nu)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3)
    )


def excess(errors: Tensor, bounds: Tensor) -> Tensor:
    """Return Student's t of the mean of errors - bounds over rows, [...] from two [..., n].

    The rows are paired: same row, same noise. Zero where both are equal on every row.
    """
    difference = (errors - bounds).double()
    # A reference that is met exactly has no spread; rounding must not make it infinite.
    scale = difference.std(-1) / math.sqrt(difference.shape[-1]) + 1e-9 * bounds.double().abs().mean(-1) + 1e-30
    return torch.nan_to_num(difference.mean(-1) / scale, nan=math.inf, posinf=math.inf)
