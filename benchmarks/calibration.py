"""The effect of alignment and calibration on imperfect eps-experts, on a mixture with a known truth.

    python benchmarks/calibration.py

Four exact eps-experts (cosine) of an analytic mixture get an error of some size: a constant ("bias"), a smooth function
of x and t ("smooth"), or fresh noise at each call ("random"). The table shows the sliced-Wasserstein distance of 1,500
samples (40 Euler steps, full routing) to the mixture, by alignment.
"""

from dataclasses import replace

import torch
from torch import Tensor

import atoll.solver
from atoll.calibration import Calibration
from atoll.ensemble import Ensemble, Expert, Network
from atoll.objective import Objective
from atoll.testing import GaussianMixture, sliced_wasserstein
from atoll.train.calibrate import measure_calibration

SHAPE, CLUSTERS, SAMPLES = (2, 3, 1), 4, 1500
OBJECTIVE = Objective("eps", "cosine")


def imperfect(mixture: GaussianMixture, cluster: int, level: float, kind: str) -> Network:
    """The cluster's exact eps network plus an error of root mean square `level`."""
    exact = mixture.network(OBJECTIVE, cluster)
    g = torch.Generator().manual_seed(cluster)
    bias = torch.randn(SHAPE, generator=g, dtype=torch.float64)
    weight = 2 * torch.randn(bias.numel(), bias.numel(), generator=g, dtype=torch.float64)

    def network(x: Tensor, time: Tensor, condition: object = None) -> Tensor:
        if kind == "bias":
            error = bias
        elif kind == "random":
            error = torch.randn(x.shape, generator=g, dtype=x.dtype)
        else:
            error = 1.4 * torch.sin(x.flatten(1) @ weight + time[:, None] / 33).reshape(x.shape)
        return exact(x, time) + level * error

    return network


def experts_of(mixture: GaussianMixture, level: float, kind: str) -> dict[str, list[Expert]]:
    """The same four experts clamped (HDDM's safeguard), uncorrected, and calibrated."""
    experts: dict[str, list[Expert]] = {"snr alone": [], "snr + clamp": [], "snr + calibration": []}
    for k in range(CLUSTERS):
        network = imperfect(mixture, k, level, kind)
        latents = mixture.cluster(k).sample(400, torch.Generator().manual_seed(k))[0]
        calibration = measure_calibration(network, OBJECTIVE, latents, None, seed=k, samples=2000)
        clamped = Expert(network, OBJECTIVE, (k,))
        experts["snr + clamp"].append(clamped)
        experts["snr alone"].append(replace(clamped, calibration=Calibration.identity(calibration.mean)))
        experts["snr + calibration"].append(replace(clamped, calibration=calibration))
    return experts


def main() -> None:
    mixture = GaussianMixture.random(9, CLUSTERS, SHAPE, seed=1)
    g = torch.Generator().manual_seed(9)
    real = mixture.sample(SAMPLES, g)[0]
    noise = torch.randn(SAMPLES, *SHAPE, generator=g, dtype=torch.float64)
    print(f"floor {sliced_wasserstein(mixture.sample(SAMPLES, g)[0], real):.3f}")
    names = ("native", "snr alone", "snr + clamp", "snr + calibration")
    print(f"{'error':8} {'size':>5} " + " ".join(f"{name:>18}" for name in names))
    for kind in ("bias", "smooth", "random"):
        for level in (0.05, 0.1, 0.2, 0.4):
            ensembles = {n: Ensemble(e, mixture.router, "full") for n, e in experts_of(mixture, level, kind).items()}
            ensembles["native"] = replace(ensembles["snr + clamp"], alignment="native")
            distances = (
                sliced_wasserstein(atoll.solver.sample(ensembles[name].velocity, noise, steps=40), real)
                for name in names
            )
            print(f"{kind:8} {level:5.2f} " + " ".join(f"{distance:18.3f}" for distance in distances), flush=True)


if __name__ == "__main__":
    main()
