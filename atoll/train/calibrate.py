"""Measures an expert's calibration on held-out latents of its cluster, see `atoll.calibration`."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from atoll.alignment import snr_x0_eps
from atoll.calibration import Calibration, mean_like, nodes_within
from atoll.condition import Condition
from atoll.objective import Objective
from atoll.randomness import Stream, seeded
from atoll.schedule import PATH
from atoll.train.batches import CaptionedLatents

CALIBRATION_ROWS = 2048  # latents at most; a few hundred are enough


class _Network(Protocol):
    def __call__(self, x: Tensor, time: Tensor, condition: Condition | None, /) -> Tensor: ...


@torch.inference_mode()
def measure_calibration(
    network: _Network,
    objective: Objective,
    latents: Tensor,
    condition: Condition | None,
    *,
    mean: Tensor | None = None,
    seed: int = 0,
    samples: int = 256,
    batch: int = 256,
) -> Calibration:
    """Measure the least-squares slope through the origin from (x0_hat - m) to (x0 - m) at each of `NODES`.

    With levels, only nodes of their training window are measured: at the others the network says nothing.

    Args:
        network: network(x [B, ...], time [B], condition) -> [B, ...].
        objective: what it was trained with.
        latents: held-out latents [n, ...] of the expert's cluster.
        condition: the encoding of their captions, n rows; None for an unconditional network.
        mean: the cluster's mean latent m [...]; default the mean of `latents`.
        seed: of the noise.
        samples: noisy latents per node; held-out latents are reused with fresh noise.
        batch: noisy latents per call of the network.

    Returns:
        The slopes, and the mean squared errors of x0 with and without them.
    """
    mean = latents.mean(0) if mean is None else mean.to(latents)
    return measure_shapes(
        network, objective, [(latents, condition)], mean=mean, seed=seed, samples=samples, batch=batch
    )


@torch.inference_mode()
def measure_shapes(
    network: _Network,
    objective: Objective,
    groups: Sequence[tuple[Tensor, Condition | None]],
    *,
    mean: Tensor,
    seed: int = 0,
    samples: int = 256,
    batch: int = 256,
) -> Calibration:
    """Measure one calibration over latents of several shapes, each weighed by its number of latents.

    Args:
        groups: held-out latents [n, ...] of one shape, and the encoding of their captions, for each shape.
        network, objective, mean, seed, samples, batch: as in `measure_calibration`.
    """
    total = sum(len(latents) for latents, _ in groups)
    nodes = nodes_within(*objective.level_window)
    sums = torch.zeros(len(nodes), 3, dtype=torch.float64)  # <hat, hat>, <hat, true>, <true, true> per latent value
    for latents, condition in groups:
        share = len(latents) / total
        own = max(1, round(samples * share))
        products = _products(
            network, objective, latents, condition, nodes, mean=mean, seed=seed, samples=own, batch=batch
        )
        sums += share * products
    log_snr = PATH.log_snr(torch.tensor(nodes, dtype=torch.float64))
    hat_hat, hat_true, true_true = sums.unbind(1)
    # A correction may shrink an estimate: a slope above 1 would amplify it, one below 0 would reverse it.
    slope = (hat_true / hat_hat.clamp(min=1e-12)).clamp(0, 1)
    order = log_snr.argsort()
    return Calibration(
        mean=mean,
        log_snr=log_snr[order],
        slope=slope[order],
        x0_mse=(true_true - 2 * slope * hat_true + slope**2 * hat_hat)[order],
        x0_mse_raw=(true_true - 2 * hat_true + hat_hat)[order],
    )


def _products(
    network: _Network,
    objective: Objective,
    latents: Tensor,
    condition: Condition | None,
    nodes: Sequence[float],
    *,
    mean: Tensor,
    seed: int,
    samples: int,
    batch: int,
) -> Tensor:
    """Return <hat, hat>, <hat, true> and <true, true> per latent value at each of M path times, [M,3] float64."""
    sums, identity = torch.zeros(len(nodes), 3, dtype=torch.float64), Calibration.identity(mean)
    mean = mean_like(mean, latents)
    # Accumulate the products of estimate and truth at each node.
    for node, time in enumerate(nodes):
        for start in range(0, samples, batch):
            count = min(batch, samples - start)
            rows = torch.arange(start, start + count) % len(latents)
            g = seeded(seed, node * samples + start, Stream.CALIBRATION)
            x0 = latents[rows]
            eps = torch.randn(x0.shape, generator=g, dtype=x0.dtype)
            t = torch.full((count,), time, dtype=x0.dtype)
            x = PATH.diffuse(x0, eps, t)
            rows_condition = None if condition is None else condition.index(rows)

            def predict(x: Tensor, time: Tensor, condition: Condition | None = rows_condition) -> Tensor:
                return network(x, time, condition)

            estimate = (snr_x0_eps(predict, objective, x, t, identity)[0] - mean).double()
            truth = (x0 - mean).double()
            products = torch.stack([estimate * estimate, estimate * truth, truth * truth])
            sums[node] += products.flatten(1).sum(1) / (samples * mean.numel())
    return sums


def calibrate(
    network: Callable[..., Tensor],
    objective: Objective,
    data: CaptionedLatents,
    *,
    mean: Tensor,
    seed: int,
    device: torch.device,
    rows: int = CALIBRATION_ROWS,
) -> Calibration:
    """Measure an expert's calibration on held-out latents with their own captions.

    Args:
        network: of the expert, on `device`.
        objective: what it was trained with.
        data: held-out latents.
        mean: the cluster's mean latent.
        seed: of rows and noise.
        device: of the network.
        rows: latents at most.
    """
    # The same rows for the same seed, so a calibration can be repeated.
    groups = [(x0, condition.to("cpu")) for x0, condition in data.some(rows, seed)]

    # The samples stay on the CPU; each batch moves to the network's device and back.
    def on_device(x: Tensor, time: Tensor, rows: Condition | None) -> Tensor:
        return network(x.to(device), time.to(device), None if rows is None else rows.to(device)).cpu()

    return measure_shapes(on_device, objective, groups, mean=mean, seed=seed)
