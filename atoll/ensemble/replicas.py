"""Several experts of the same clusters as one: stacking, and what it is compared with (DESIGN: Replicas).

The errors of replicas are correlated, so weights by inverse error are worse than the better replica alone. Stacking
(Wolpert 1992, Breiman 1996) asks the data: at each noise level the non-negative least-squares weights of the replicas'
x0_hat - m onto x0 - m over held-out latents. They need not sum to 1: what is missing is the shrinkage towards the
cluster's mean m that `Calibration` measures for one expert.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from atoll.alignment import snr_x0_eps
from atoll.calibration import NODES, Calibration
from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.interpolation import bracket
from atoll.objective import Objective
from atoll.randomness import cpu_generator
from atoll.schedule import PATH

_BATCH = 64  # noisy latents per call of a network

EXPECTED = "stacked, inverse-error, equal, or time-switch-0.5 (eps-experts below that time, the others above)"


class Replica(Protocol):
    """What is looked at of an `Expert`."""

    @property
    def name(self) -> str: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def calibration(self) -> Calibration | None: ...
    @property
    def network(self) -> Callable[[Tensor, Tensor, Condition | None], Tensor]: ...


@dataclass(frozen=True)
class Stacking:
    """The weights of the replicas of one set of clusters.

    Attributes:
        names: the replicas' names [R], two at least.
        mean: their clusters' mean latent m, [...] as one latent.
        log_snr: nodes [M], increasing.
        weights: [M, R], not negative.
        x0_mse: mean squared error per number of the stacked x0 at each node [M].
    """

    names: tuple[str, ...]
    mean: Tensor
    log_snr: Tensor
    weights: Tensor
    x0_mse: Tensor

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """For times t [B] of the linear path: the weights w [B, R], and what the mean weighs in the velocity,
        (1 - sum w)/sigma [B]; linear between nodes, constant beyond them, so that nothing is divided by 0 at t = 0."""
        nodes, table = self.log_snr.to(t), self.weights.to(t)
        log_snr = PATH.log_snr(t)
        left, offset = bracket(nodes, log_snr)
        weights = torch.lerp(table[left], table[left + 1], offset[:, None])
        return weights, (1 - weights.sum(1)) / PATH.sigma(PATH.time_at(log_snr.clamp(nodes[0], nodes[-1])))

    def config(self) -> dict[str, Any]:
        """What goes into ensemble.json."""
        return {
            "names": list(self.names),
            "log_snr": [round(float(value), 6) for value in self.log_snr],
            "weights": [[round(float(value), 6) for value in row] for row in self.weights],
            "x0_mse": [round(float(value), 8) for value in self.x0_mse],
        }

    @classmethod
    def load(cls, config: dict[str, Any], mean: Tensor) -> "Stacking":
        """The inverse of `config`. Raises AtollError where its lists do not fit each other."""
        try:
            names = tuple(str(name) for name in config["names"])
            values = {key: torch.tensor(config[key], dtype=torch.float32) for key in ("log_snr", "weights", "x0_mse")}
        except (KeyError, TypeError, ValueError) as error:
            raise AtollError(f"stacking: {type(error).__name__} ({error}); run `atoll assemble` again") from None
        nodes, weights = values["log_snr"], values["weights"]
        fits = nodes.ndim == 1 and len(nodes) > 1 and weights.shape == (len(nodes), len(names))
        if not fits or len(names) < 2 or not (nodes.diff() > 0).all() or not (weights >= 0).all():
            raise AtollError(
                f"stacking of {', '.join(names)}: expected at least 2 increasing log-SNR nodes and a weight, not "
                "negative, of each expert at each; run `atoll assemble` again"
            )
        return cls(names, mean, **values)


@torch.inference_mode()
def measure_stacking(
    experts: Sequence[Replica],
    latents: Tensor,
    conditions: Sequence[Condition | None],
    mean: Tensor,
    seed: int = 0,
    samples: int = 256,
    device: torch.device | str = "cpu",
) -> Stacking:
    """The non-negative least-squares weights of the replicas at each of `NODES`.

    Args:
        experts: two or more, of the same clusters.
        latents: held-out latents [n, ...] of them, which none of the experts was trained on.
        conditions: their captions' encoding, n rows, for each expert; None for an unconditional network.
        mean: the clusters' mean latent.
        samples: noisy latents per node; latents are used again with fresh noise until there are so many.
        device: where the experts' networks are.

    Raises:
        AtollError: scipy is not there.
    """
    try:
        from scipy.optimize import nnls
    except ImportError:
        raise AtollError("weights of replicas need scipy: pip install 'atoll[data]'") from None
    order = torch.tensor(sorted(NODES, reverse=True), dtype=torch.float64)  # increasing log-SNR
    rows = torch.arange(samples) % len(latents)
    x0, given = latents[rows], [None if c is None else c.index(rows) for c in conditions]
    weights, errors = [], []
    for node, time in enumerate(order.tolist()):
        eps = torch.randn(x0.shape, generator=cpu_generator(seed * 1000 + node), dtype=x0.dtype)
        t = torch.full((samples,), time, dtype=x0.dtype)
        x = PATH.diffuse(x0, eps, t)
        estimates = [
            (_estimate(expert, x, t, condition, mean, device) - mean).flatten().double()
            for expert, condition in zip(experts, given, strict=True)
        ]
        columns, truth = torch.stack(estimates, dim=1), (x0 - mean).flatten().double()
        # Estimates at high noise reach 1e4: columns of unit length keep the least squares well posed.
        length = columns.norm(dim=0).clamp(min=1e-12)
        solved = torch.from_numpy(nnls((columns / length).numpy(), truth.numpy())[0]) / length
        weights.append(solved)
        errors.append(((columns @ solved - truth) ** 2).mean())
    return Stacking(
        tuple(expert.name for expert in experts),
        mean,
        PATH.log_snr(order).float(),
        torch.stack(weights).float(),
        torch.stack(errors).float(),
    )


def _estimate(
    expert: Replica, x: Tensor, t: Tensor, condition: Condition | None, mean: Tensor, device: torch.device | str
) -> Tensor:
    """The expert's x0 as it comes, without correction, for x [B, ...] at t [B]; in batches."""
    raw, found = Calibration.identity(mean), []
    for rows in torch.arange(len(x)).split(_BATCH):
        given = None if condition is None else condition.index(rows).to(device)

        def predict(asked: Tensor, time: Tensor, given: Condition | None = given) -> Tensor:
            return expert.network(asked.to(device), time.to(device), given).cpu()

        found.append(snr_x0_eps(predict, expert.objective, x[rows], t[rows], raw)[0])
    return torch.cat(found)


def replica_shares(mode: str, experts: Sequence[Replica], t: Tensor) -> Tensor:
    """The shares [B, R] (rows sum to 1) of replicas at times t [B], by the modes that are compared with stacking.

    Raises:
        AtollError: an unknown mode; inverse-error of an expert without calibration; a time switch between experts that
            are all of one kind.
    """
    if mode == "equal":
        return t.new_full((len(t), len(experts)), 1 / len(experts))
    if mode == "inverse-error":
        errors = [_error(expert, t) for expert in experts]
        inverse = 1 / torch.stack(errors, dim=1).clamp(min=1e-12)
        return inverse / inverse.sum(1, keepdim=True)
    if match := re.fullmatch(r"time-switch-(\d*\.?\d+)", mode):
        below = torch.tensor([expert.objective.prediction == "eps" for expert in experts], device=t.device)
        if below.all() or not below.any():
            kinds = ", ".join(f"{expert.name} ({expert.objective.prediction})" for expert in experts)
            raise AtollError(f"{mode} needs an eps-expert and another one; got {kinds}: take stacked or equal")
        chosen = torch.where((t >= float(match[1]))[:, None], ~below, below).to(t.dtype)
        return chosen / chosen.sum(1, keepdim=True)
    raise AtollError(f"unknown way to combine replicas {mode!r}; expected {EXPECTED}")


def check_replicas(mode: str) -> str:
    """`mode`, if it is known. Raises AtollError otherwise."""
    if mode in ("stacked", "inverse-error", "equal") or re.fullmatch(r"time-switch-(\d*\.?\d+)", mode):
        return mode
    raise AtollError(f"unknown way to combine replicas {mode!r}; expected {EXPECTED}")


def _error(expert: Replica, t: Tensor) -> Tensor:
    """The expert's calibrated x0 error [B] at times t [B]: geometric between nodes, constant beyond them."""
    if expert.calibration is None:
        raise AtollError(f"{expert.name}: inverse-error needs its calibration; run `atoll calibrate` on it")
    nodes, log_error = expert.calibration.log_snr.to(t), expert.calibration.x0_mse.to(t).clamp(min=1e-12).log()
    left, offset = bracket(nodes, PATH.log_snr(t))
    return torch.lerp(log_error[left], log_error[left + 1], offset).exp()
