"""What `diagnose_trajectory` measures: distances, disagreement, sensitivity and refinement."""

from dataclasses import dataclass

from atoll.evaluate.diagnostics.experts import Series


@dataclass(frozen=True)
class ClusterDistance:
    """Distance of the x0 estimate to the data of the experts' clusters, root mean square per value, at T times.

    For an expert with several clusters, the nearest of them counts.

    Attributes:
        kind: "centroid" or "nearest neighbour".
        chosen: distance for chosen experts, weighted by their weights, mean over images.
        unchosen: mean over the other experts, then over the images that have any; NaN without any.
        nearest: distance to the nearest of all clusters.
        aligned: total weight of the experts that cover the nearest cluster, mean over images.
    """

    kind: str
    chosen: Series
    unchosen: Series
    nearest: Series
    aligned: Series


@dataclass(frozen=True)
class Disagreement:
    """Angle in degrees between two experts' velocities at the same x, mean over pairs and images, at T times.

    Near t = 1 and t = 0 the common part of all velocities is large, so angles are smaller.

    Attributes:
        chosen: over pairs of chosen experts, for images that have two; NaN without any.
        every: over all pairs; NaN with one expert.
    """

    chosen: Series
    every: Series


@dataclass(frozen=True)
class Sensitivity:
    """Growth |dx0| / |dx_t| of a random perturbation from start times t, mean over images and its standard error.

    The mean of its square over directions is the Jacobian's squared Frobenius norm per value of x.

    Attributes:
        times: start times.
        growth: at each start.
        standard_error: of the growth.
        size: root mean square of the perturbation per value.
    """

    times: Series
    growth: Series
    standard_error: Series
    size: float


@dataclass(frozen=True)
class Refinement:
    """Difference between final images from the same noise with n, 2n and 4n steps.

    Attributes:
        steps: (n, 2n, 4n).
        distances: (steps, steps, root mean square per value, mean over images). If halving the step divides it by 2^p,
            the solver's order is p.
    """

    steps: tuple[int, ...]
    distances: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class Trajectory:
    """Measurements along the trajectories of `images` images.

    Attributes:
        space: name of the space of the distances.
        times: of the observed states [T], before each step.
    """

    images: int
    routing: str
    steps: int
    method: str
    guidance_scale: float
    space: str
    times: Series
    distances: tuple[ClusterDistance, ...]
    disagreement: Disagreement
    sensitivity: Sensitivity
    refinement: Refinement
