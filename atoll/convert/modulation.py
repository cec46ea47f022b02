"""DiT's modulation, a linear map per block, as AdaLN-Single: one map for all blocks and a table per block.

At the null class a block's six vectors are curves over time, m_b(t) = W_b silu(c(t)) + b_b; AdaLN-Single can only
express S(t) + E_b. In squared error the nearest to m are S = the mean of m_b over the blocks and E_b = the mean of
m_b - S over time. But a block's channel may be multiplied by any factor r_b and its neighbour's weights divided by it
without changing the network: (1 + scale) and shift precede the columns of a linear layer, a gate follows the rows of
one. So S need only be proportional to a channel's curves, m_b(t) ~ r_b (S(t) + E_b) for a shift or a gate. That is a
first principal component: the r_b are its loadings over the blocks, S = sum_b r_b m_b / sum_b r_b^2, up to constants.
On a trained DiT (width 96, 4 blocks) the error of the whole network's eps at step 0 is 0.10 this way, and 0.27 with the
mean.

The last norm keeps its own map (`final: per-block`, 2 D^2 weights): AdaLN-Single would add c itself to a table there,
which has no counterpart in DiT.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.convert.native import Native
from atoll.errors import AtollError
from atoll.nn.dit import TIME_PERIOD, time_features

TIMES = 1000  # the number of times at which the curves are fitted: DiT's 0..999
# The vectors that act on the same linear layer and so share a factor, and whether they come before it.
GROUPS = (
    ((0, 1), "attention.qkv", True),
    ((2,), "attention.out", False),
    ((3, 4), "mlp.0", True),
    ((5,), "mlp.2", False),
)
SCALES = (1, 4)  # these modulate by 1 + scale
FACTORS = 0.1, 4.0  # bounds of |r|: dividing by a factor near 0 would only amplify noise


def share(native: Native, fit: bool) -> Native:
    """Convert a native network's per-block modulation to AdaLN-Single.

    Args:
        native: the network, with per-block modulation.
        fit: True for the nearest AdaLN-Single, False for the initial one of a new network (HDDM).

    Returns:
        The network with AdaLN-Single. With `fit`, its notes hold the relative error of each block.
    """
    # Drop the per-block maps. Without a fit, the new ones start as in a new network.
    weights = {name: value for name, value in native.weights.items() if ".modulation." not in name}
    if not fit:
        weights = {name: value for name, value in weights.items() if not name.startswith("final_modulation.")}
        return replace(native, config=native.config | {"modulation": "single"}, weights=weights)
    # The shared map, the tables, and the error of each block, in float64 where sums are long.
    depth, width = native.config["depth"], native.config["width"]
    inputs = activations(native)  # [T,D]
    shared_weight, shared_bias = torch.zeros(6, width, width), torch.zeros(6, width)
    tables = torch.zeros(depth, 6, width)
    error, total = torch.zeros(depth, dtype=torch.float64), torch.zeros(depth, dtype=torch.float64)
    # Each group of vectors: factors by channel, then the shared map and the tables that remain.
    for slots, layer, before in GROUPS:
        maps = [_maps(native, slot) for slot in slots]  # ([b,D,D], [b,D]) each
        curves = [torch.einsum("ti,bdi->btd", inputs, weight) + bias[:, None] for weight, bias in maps]  # [b,T,D] each
        factor = factors(torch.cat([curve - curve.mean(1, keepdim=True) for curve in curves], dim=1))  # [b,D]
        share_of = factor / factor.square().sum(0)  # [b,D]: S = sum_b share_of_b m_b
        for slot, (weight, bias), curve in zip(slots, maps, curves, strict=True):
            # The shared map is the weighted sum of the blocks' maps.
            one = 1.0 if slot in SCALES else 0.0
            shared_weight[slot] = torch.einsum("bd,bdi->di", share_of, weight)
            shared_bias[slot] = (share_of * bias).sum(0)
            moving = F.linear(inputs, shared_weight[slot].double(), shared_bias[slot].double())  # [T,D]
            # Each table makes the mean over time exact; the error is what remains.
            table = (one + curve.mean(1)) / factor - one - moving.mean(0)  # [b,D]
            got = factor[:, None] * (one + moving + table[:, None]) - one  # [b,T,D]
            tables[:, slot] = table
            error += (got - curve).square().sum((1, 2))
            total += curve.square().sum((1, 2))
        # The neighbouring layer undoes the factor.
        for i in range(depth):
            _absorb(weights, f"blocks.{i}.{layer}", factor[i].float(), before)
    # The new network's weights, and how far each block is from the old one's.
    weights["conditioner.shared.weight"] = shared_weight.flatten(0, 1)
    weights["conditioner.shared.bias"] = shared_bias.flatten()
    weights |= {f"blocks.{i}.modulation.table": table.clone() for i, table in enumerate(tables)}
    residual = (error / torch.where(total > 0, total, torch.inf)).sqrt()  # 0 if a new DiT modulates nothing
    notes = native.notes | {"residual": residual.tolist()}
    config = native.config | {"modulation": "single", "final": "per-block"}
    return replace(native, config=config, weights=weights, notes=notes)


def factors(curves: Tensor) -> Tensor:
    """Compute each block's factor per channel: the loadings of the first principal component over the blocks.

    Args:
        curves: the blocks' curves over time [b, T, D], with zero mean.

    Returns:
        Factors [b, D]: about 1 on average, mostly positive, |r| within FACTORS, and 1 for a constant channel.

    Raises:
        AtollError: the curves are so large that their products are not finite.
    """
    # One small matrix per channel: the products of the blocks' curves.
    gram = torch.einsum("btd,ctd->dbc", curves, curves)  # [D,b,b]
    if not gram.isfinite().all():
        raise AtollError(
            "the checkpoint's modulation is too large to be fitted (its products overflow); expected the weights of a "
            "trained network: compare the file's hash with its source, or keep the maps: --modulation per-block"
        )
    loading = torch.linalg.eigh(gram).eigenvectors[..., -1].T  # [b,D]
    loading = torch.where(gram.diagonal(dim1=1, dim2=2).sum(1) > 0, loading, 1.0)  # [b,D]
    # The sign and the scale of a principal component are free: make it mostly positive, with mean |r| of 1.
    loading = loading * torch.where(loading.sum(0) < 0, -1.0, 1.0) / loading.abs().mean(0)  # [b,D]
    return torch.where(loading < 0, -1.0, 1.0) * loading.abs().clamp(*FACTORS)


def activations(native: Native) -> Tensor:
    """Compute silu(c(t)) [T, D] in float64, at T times over the network's range and at the null class."""
    # Float64, since the fit subtracts nearly equal curves.
    w = {name: value.double() for name, value in native.weights.items() if name.startswith("conditioner.time.")}
    times = torch.arange(TIMES, dtype=torch.float64) * (native.time_scale / (TIMES - 1))
    features = time_features(times, native.config.get("time_period", TIME_PERIOD))  # [T,256]
    hidden = F.silu(F.linear(features, w["conditioner.time.0.weight"], w["conditioner.time.0.bias"]))  # [T,D]
    return F.silu(F.linear(hidden, w["conditioner.time.2.weight"], w["conditioner.time.2.bias"]))  # [T,D]


def _maps(native: Native, slot: int) -> tuple[Tensor, Tensor]:
    """Return the linear maps of one of the six vectors in all blocks: weights [b, D, D] and biases [b, D], float64."""
    # Six vectors are stacked in one linear layer.
    rows = slice(slot * native.config["width"], (slot + 1) * native.config["width"])
    names = [f"blocks.{i}.modulation.linear" for i in range(native.config["depth"])]
    weight = torch.stack([native.weights[f"{name}.weight"][rows].double() for name in names])
    return weight, torch.stack([native.weights[f"{name}.bias"][rows].double() for name in names])


def _absorb(weights: dict[str, Tensor], layer: str, factor: Tensor, before: bool) -> None:
    """Multiply a linear layer's columns by `factor` [D], or its rows and bias."""
    # A factor before a layer scales its inputs, one after it its outputs.
    if before:
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"] * factor
    else:
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"] * factor[:, None]
        weights[f"{layer}.bias"] = weights[f"{layer}.bias"] * factor
