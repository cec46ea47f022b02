"""Several experts of the same clusters as one: stacking, and the methods that it is compared with.

The errors of replicas are correlated, so weights by inverse error are worse than the better replica alone. Stacking
(Wolpert 1992, Breiman 1996) measures the weights: at each noise level, the non-negative least-squares weights of the
replicas' x0_hat - m onto x0 - m over held-out latents. They need not sum to 1: the rest is the shrinkage to the
cluster's mean m that `Calibration` measures for one expert.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.alignment import snr_x0_eps
from atoll.calibration import Calibration, mean_like, nodes_within
from atoll.condition import Condition
from atoll.ensemble.expert import Expert
from atoll.errors import AtollError
from atoll.interpolation import bracket
from atoll.randomness import cpu_generator
from atoll.schedule import PATH

_BATCH = 64  # noisy latents per call of a network

EXPECTED = "stacked, inverse-error, equal, or time-switch-0.5 (eps-experts below that time, the others above)"


@dataclass(frozen=True)
class Stacking:
    """The weights of the replicas of one set of clusters.

    Attributes:
        names: the replicas' names [R], at least two.
        mean: their clusters' mean latent m, [...] as one latent; resized for latents of another size.
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
        """Return the weights w [B, R] and the mean's weight in the velocity, (1 - sum w)/sigma [B].

        Linear between nodes, and constant beyond them, so that nothing is divided by 0 at t = 0.

        Args:
            t: times on the linear path [B].
        """
        # Interpolate the table of weights at the path's log-SNR.
        nodes, table = self.log_snr.to(t), self.weights.to(t)
        log_snr = PATH.log_snr(t)
        left, offset = bracket(nodes, log_snr)
        weights = torch.lerp(table[left], table[left + 1], offset[:, None])
        # The mean's weight uses the clamped time, where sigma is not 0.
        return weights, (1 - weights.sum(1)) / PATH.sigma(PATH.time_at(log_snr.clamp(nodes[0], nodes[-1])))

    def config(self) -> dict[str, Any]:
        """Return the entry for ensemble.json; `load` reads it."""
        # Rounded, since people read cards too.
        return {
            "names": list(self.names),
            "log_snr": [round(float(value), 6) for value in self.log_snr],
            "weights": [[round(float(value), 6) for value in row] for row in self.weights],
            "x0_mse": [round(float(value), 8) for value in self.x0_mse],
        }

    @classmethod
    def load(cls, config: dict[str, Any], mean: Tensor) -> "Stacking":
        """Return the stacking that `config` described.

        Raises:
            AtollError: the lists do not fit each other.
        """
        # Cards come from strangers: any shape or type may be wrong.
        try:
            names = tuple(str(name) for name in config["names"])
            values = {key: torch.tensor(config[key], dtype=torch.float32) for key in ("log_snr", "weights", "x0_mse")}
        except (KeyError, TypeError, ValueError) as error:
            raise AtollError(f"stacking: {type(error).__name__} ({error}); run `atoll assemble` again") from None
        # The table must have one weight per expert at each node, at increasing noise levels.
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
    experts: Sequence[Expert],
    latents: Tensor,
    conditions: Sequence[Condition | None],
    mean: Tensor,
    seed: int = 0,
    *,
    samples: int = 256,
    device: torch.device | str = "cpu",
) -> Stacking:
    """Measure the non-negative least-squares weights of the replicas at each of `NODES`.

    Replicas of some levels are measured at the nodes of their training window.

    Args:
        experts: two or more, of the same clusters and levels.
        latents: held-out latents [n, ...] of these clusters, which no expert was trained on.
        conditions: for each expert its condition of n rows; None for an unconditional network.
        mean: the clusters' mean latent.
        seed: of the noise.
        samples: noisy latents per node; latents repeat with fresh noise up to this number.
        device: of the experts' networks.

    Raises:
        AtollError: scipy is not installed.
    """
    # Scipy is optional: only measuring needs it.
    try:
        from scipy.optimize import nnls
    except ImportError:
        raise AtollError("weights of replicas need scipy: pip install 'atoll[data]'") from None
    # Repeat latents and conditions up to the number of samples.
    nodes = nodes_within(*experts[0].objective.level_window)
    order = torch.tensor(sorted(nodes, reverse=True), dtype=torch.float64)  # increasing log-SNR
    own_mean = mean_like(mean, latents)
    rows = torch.arange(samples) % len(latents)
    x0, repeated = latents[rows], [None if c is None else c.index(rows) for c in conditions]
    weights, errors = [], []
    for node, time in enumerate(order.tolist()):
        # Every replica's x0 at the same noisy latents.
        eps = torch.randn(x0.shape, generator=cpu_generator(seed * 1000 + node), dtype=x0.dtype)
        t = torch.full((samples,), time, dtype=x0.dtype)
        x = PATH.diffuse(x0, eps, t)
        estimates = [
            (_estimate(expert, x, t, condition, own_mean, device) - own_mean).flatten().double()
            for expert, condition in zip(experts, repeated, strict=True)
        ]
        columns, truth = torch.stack(estimates, dim=1), (x0 - own_mean).flatten().double()
        # Least squares. Estimates at high noise reach 1e4: columns of unit length keep the problem well posed.
        length = columns.norm(dim=0).clamp(min=1e-12)
        solved = torch.from_numpy(nnls((columns / length).numpy(), truth.numpy())[0]) / length
        weights.append(solved)
        errors.append(((columns @ solved - truth) ** 2).mean())
    # In float32, as `Stacking.load` reads them.
    return Stacking(
        tuple(expert.name for expert in experts),
        mean,
        PATH.log_snr(order).float(),
        torch.stack(weights).float(),
        torch.stack(errors).float(),
    )


def _estimate(
    expert: Expert, x: Tensor, t: Tensor, condition: Condition | None, mean: Tensor, device: torch.device | str
) -> Tensor:
    """Return the expert's uncorrected x0 for x [B, ...] at t [B], computed in batches."""
    # Raw estimates: the stacking replaces both calibration and clamp.
    raw, estimates = Calibration.identity(mean), []
    # In batches: the noisy latents of a node do not have to fit on the device.
    for rows in torch.arange(len(x)).split(_BATCH):
        own = None if condition is None else condition.index(rows).to(device)

        def predict(x_scaled: Tensor, time: Tensor, own: Condition | None = own) -> Tensor:
            return expert.network(x_scaled.to(device), time.to(device), own).cpu()

        estimates.append(snr_x0_eps(predict, expert.objective, x[rows], t[rows], raw)[0])
    return torch.cat(estimates)


def replica_weights(mode: str, experts: Sequence[Expert], t: Tensor) -> Tensor:
    """Return the replicas' weights [B, R] by a mode that is compared with stacking; rows sum to 1.

    Args:
        mode: "equal", "inverse-error", or "time-switch-0.5": eps-experts below that time, the others above.
        experts: the replicas, R of them.
        t: times [B].

    Raises:
        AtollError: an unknown mode; inverse-error for an expert without calibration; a time switch between experts
            that are all eps-experts, or none of them.
    """
    # No measurement: every replica counts the same.
    if mode == "equal":
        return t.new_full((len(t), len(experts)), 1 / len(experts))
    # Weights by calibrated error, as if errors were independent.
    if mode == "inverse-error":
        errors = [_error(expert, t) for expert in experts]
        inverse = 1 / torch.stack(errors, dim=1).clamp(min=1e-12)
        return inverse / inverse.sum(1, keepdim=True)
    # HDDM section 4.3: eps-experts near the data, the others near the noise.
    if match := re.fullmatch(r"time-switch-(\d*\.?\d+)", mode):
        below = torch.tensor([expert.objective.prediction == "eps" for expert in experts], device=t.device)
        if below.all() or not below.any():
            kinds = ", ".join(f"{expert.name} ({expert.objective.prediction})" for expert in experts)
            raise AtollError(f"{mode} needs an eps-expert and another one; got {kinds}: use stacked or equal")
        chosen = torch.where((t >= float(match[1]))[:, None], ~below, below).to(t.dtype)
        return chosen / chosen.sum(1, keepdim=True)
    raise AtollError(f"unknown way to combine replicas {mode!r}; expected {EXPECTED}")


def check_replicas(mode: str) -> str:
    """Return `mode` if it is a known way to combine replicas. Raises AtollError otherwise."""
    # The same names as `replica_weights`, without any expert.
    if mode in ("stacked", "inverse-error", "equal") or re.fullmatch(r"time-switch-(\d*\.?\d+)", mode):
        return mode
    raise AtollError(f"unknown way to combine replicas {mode!r}; expected {EXPECTED}")


def _error(expert: Expert, t: Tensor) -> Tensor:
    """Return the expert's calibrated x0 error [B] at times t [B]: geometric between nodes, constant beyond them."""
    if expert.calibration is None:
        raise AtollError(f"{expert.name}: inverse-error needs its calibration; run `atoll calibrate` on it")
    # The logarithm is interpolated: errors span orders of magnitude.
    nodes, log_error = expert.calibration.log_snr.to(t), expert.calibration.x0_mse.to(t).clamp(min=1e-12).log()
    left, offset = bracket(nodes, PATH.log_snr(t))
    return torch.lerp(log_error[left], log_error[left + 1], offset).exp()


@dataclass(frozen=True)
class ReplicaGroup:
    """Experts of exactly the same clusters and levels.

    Attributes:
        members: their indices in the ensemble, at least two.
        stacking: their stacking, in this order; None if they are combined by another mode.
    """

    members: tuple[int, ...]
    stacking: Stacking | None


def replica_groups(
    experts: Sequence[Expert], stackings: Sequence[Stacking], excluded: frozenset[int] = frozenset()
) -> tuple[ReplicaGroup, ...]:
    """Return the groups of replicas among the experts, each with the stacking that names just its members.

    Args:
        experts: all of an ensemble's.
        stackings: those that may be used.
        excluded: the indices of experts that take no part.
    """
    groups = []
    for covered in dict.fromkeys((expert.clusters, expert.levels) for expert in experts):
        # Replicas cover exactly the same clusters at the same levels; others only meet at some of them.
        members = [index for index, expert in enumerate(experts) if (expert.clusters, expert.levels) == covered]
        names = {experts[index].name: index for index in members}
        # The group takes the order of its stacking's columns.
        fitting = next((s for s in stackings if set(s.names) == names.keys() and len(names) == len(members)), None)
        members = [names[name] for name in fitting.names] if fitting else members
        # Without one of its members, a stacking's weights are wrong: the others share equally.
        left = tuple(index for index in members if index not in excluded)
        if len(left) > 1:
            groups.append(ReplicaGroup(left, fitting if len(left) == len(members) else None))
    return tuple(groups)


def divide_among_replicas(
    weights: Tensor, mode: str, groups: Sequence[ReplicaGroup], experts: Sequence[Expert], t: Tensor
) -> None:
    """Divide the weight of each group among its replicas, in place.

    Args:
        weights: each expert's weight [B, E].
        mode: as in `replica_weights`, or "stacked": by the group's stacking, equally without one.
        groups: the groups of replicas.
        experts: all experts of the ensemble, E of them.
        t: times [B].
    """
    for group in groups:
        members = list(group.members)
        replicas = [experts[member] for member in members]
        # By another mode than stacking, or without a stacking: equally.
        if mode != "stacked" or group.stacking is None:
            fractions = replica_weights("equal" if mode == "stacked" else mode, replicas, t)
        else:
            # For the trace, stacked weights are normalised; `Ensemble.route` applies them as they are.
            solved, _ = group.stacking.at(t)
            total = solved.sum(1, keepdim=True)
            fractions = torch.where(total > 0, solved / total.clamp(min=1e-12), 1 / len(members)).to(t)
        weights[:, members] = weights[:, members].sum(1, keepdim=True) * fractions
