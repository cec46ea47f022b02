"""The cost of a network by formula: parameters, FLOPs and bytes, without building it (and without torch).

The formulas here follow `atoll.nn.dit` layer by layer; those of an MMDiT are in `atoll.plan.mmdit_cost`. Tests compare
them with the network: parameters exactly, FLOPs by torch's counter, saved activations by autograd's hooks.

Letters: N image tokens, T text tokens, D width, F hidden width of the MLP,
h heads, C H W latent, p patch, S width of the text's states, P width of the pooled vector.

DiT-XL/2 with 77 x 768 text: 605.7 M parameters, 289 GFLOP forward, 867 in training; 439 MiB of activations per sample
under bf16 autocast, 375 compiled, 34 checkpointed. Measured: 440, 375 and 34.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from atoll.choices import Checkpointing, hidden_width
from atoll.plan.mmdit_cost import (
    MMDiTSizes,
    RoutedBlocks,
    mmdit_activation_bytes,
    mmdit_block_parameters,
    mmdit_forward_flops,
    mmdit_largest_tensor,
    mmdit_parameters,
    mmdit_uncast,
)
from atoll.plan.rules import SHORT_ROWS, TIME_FEATURES, Rules

OptimizerState = Literal["fp32", "bf16", "8bit"]

GATHERED_BLOCKS = 3  # of FSDP2 at a time, in float32: the block at work, the next one, and the gradients of one
BLOCK_8BIT = 256  # values that share one float32 scale in 8-bit optimiser state (bitsandbytes, torchao)


@dataclass(frozen=True)
class DiTSizes:
    """The sizes that determine a DiT's cost.

    Attributes:
        size: (H, W) of the latent.
        tokens: T, text tokens of a caption.
    """

    name: ClassVar[str] = "dit"
    size: tuple[int, int]
    channels: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    states_dim: int
    tokens: int
    pooled_dim: int | None = None
    modulation: str = "single"
    final: str | None = None
    text_layers: int = 1

    @staticmethod
    def from_config(config: Mapping[str, Any], tokens: int) -> "DiTSizes":
        """From a DiT's configuration, as cards hold it, and the text tokens of a caption."""
        # The caption's tokens are not part of a network's configuration.
        names = [field.name for field in fields(DiTSizes) if field.name != "tokens"]
        known = {name: config[name] for name in names if name in config}
        return DiTSizes(**{"mlp_ratio": 4.0, **known, "size": tuple(config["size"]), "tokens": tokens})

    @property
    def image_tokens(self) -> int:
        """N."""
        return self.size[0] // self.patch * (self.size[1] // self.patch)

    @property
    def hidden(self) -> int:
        """F."""
        return int(self.width * self.mlp_ratio)

    @property
    def patch_values(self) -> int:
        """Numbers of the latent in one token: p*p*C."""
        return self.patch**2 * self.channels

    @property
    def final_modulation(self) -> str:
        return self.final or self.modulation


NetworkSizes = DiTSizes | MMDiTSizes


def sizes_of(config: Mapping[str, Any], tokens: int) -> NetworkSizes:
    """The sizes of a network, from its configuration as cards hold it and the text tokens of a caption."""
    kind: type[NetworkSizes] = MMDiTSizes if config.get("name") == "mmdit" else DiTSizes
    return kind.from_config(config, tokens)


def _linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return (inputs + 1) * outputs


def uncast(n: NetworkSizes) -> int:
    """Parameters that autocast does not copy to bf16: the modulation's tables, which are no matrices."""
    return mmdit_uncast(n) if isinstance(n, MMDiTSizes) else tables(n)


def tables(n: DiTSizes) -> int:
    """Parameters of the modulation's tables."""
    # A table per block if the modulation is shared, otherwise each block has a matrix.
    blocks = 6 * n.depth if n.modulation == "single" else 0
    return (blocks + (2 if n.final_modulation == "single" else 0)) * n.width


def parameters(n: NetworkSizes) -> int:
    """Parameters of the whole network, exactly."""
    if isinstance(n, MMDiTSizes):
        return mmdit_parameters(n)
    # Time, pooled vector and shared modulation.
    D = n.width
    conditioner = _linear(TIME_FEATURES, D) + _linear(D, D)
    conditioner += _linear(n.pooled_dim, D) if n.pooled_dim else 0
    conditioner += _linear(D, 6 * D) if n.modulation == "single" else 0
    # Text projection, patch embedding and final layer.
    text = _linear(n.states_dim, D) + (n.text_layers - 1) * _linear(D, D)
    ends = _linear(n.patch_values, D) + _linear(D, n.patch_values)
    ends += _linear(D, 2 * D) if n.final_modulation == "per-block" else 0
    ends += 2 * D if n.final_modulation == "single" else 0
    return n.depth * block_parameters(n, 0) + conditioner + text + ends


def block_parameters(n: NetworkSizes, number: int) -> int:
    """Parameters of one block, exactly; number: from 0."""
    if isinstance(n, MMDiTSizes):
        return mmdit_block_parameters(n, number)
    D, F = n.width, n.hidden
    attention = _linear(D, 3 * D) + _linear(D, D)
    cross = _linear(D, D) + _linear(D, 2 * D) + _linear(D, D)
    modulation = _linear(D, 6 * D) if n.modulation == "per-block" else 6 * D
    return attention + cross + _linear(D, F) + _linear(F, D) + modulation


def largest_tensor(n: NetworkSizes) -> int:
    """Parameters in the largest tensor of the network, exactly."""
    if isinstance(n, MMDiTSizes):
        return mmdit_largest_tensor(n)
    # The modulation's matrix, or the MLP's, unless what is embedded is very wide.
    D = n.width
    return D * max(6 * D, n.hidden, n.states_dim, n.pooled_dim or 0, n.patch_values, TIME_FEATURES)


def forward_flops(n: NetworkSizes) -> int:
    """FLOPs of one image's forward pass: two per multiplication of the matrix products; nothing else counts."""
    if isinstance(n, MMDiTSizes):
        return mmdit_forward_flops(n)
    # The blocks.
    N, T, D, F = n.image_tokens, n.tokens, n.width, n.hidden
    # Self-attention, cross-attention, its keys and values, MLP; then the scores of both attentions.
    products = N * 4 * D * D + N * 2 * D * D + T * 2 * D * D + N * 2 * D * F
    scores = 2 * N * N * D + 2 * N * T * D
    block = products + scores + (6 * D * D if n.modulation == "per-block" else 0)
    # Conditioning, text projection, patch embedding and final layer.
    conditioner = TIME_FEATURES * D + D * D + (n.pooled_dim or 0) * D
    conditioner += 6 * D * D if n.modulation == "single" else 0
    text = T * D * (n.states_dim + (n.text_layers - 1) * D)
    ends = 2 * N * D * n.patch_values + (2 * D * D if n.final_modulation == "per-block" else 0)
    return 2 * (n.depth * block + conditioner + text + ends)


def training_flops(
    n: NetworkSizes, checkpointing: Checkpointing = "none", route: RoutedBlocks | None = None
) -> int | float:
    """FLOPs of one image's training step: the backward pass costs two forwards, full checkpointing one more.

    Selective checkpointing recomputes no matrix product. With a route, the mean over all steps of the training.
    """
    forward: int | float = forward_flops(n)
    if route is not None and isinstance(n, MMDiTSizes):
        forward += route.share * (mmdit_forward_flops(n, route) - forward)
    # A backward pass computes two products for each one of the forward pass.
    return forward * (4 if checkpointing == "full" else 3)


def _scores(n: DiTSizes, keys: int, r: Rules) -> int:
    """Bytes of attention weights that one attention over `keys` tokens saves."""
    # A fused kernel saves one logarithm per row; otherwise the weights, and their float32 copy if rows are short.
    rows = n.heads * n.image_tokens
    if r.fused:
        return rows * 4
    return rows * keys * (r.compute + (4 if keys < SHORT_ROWS else 0))


def _modulated(n: DiTSizes, r: Rules, compiled: bool) -> int:
    """Bytes that norm(x) * (1 + scale) + shift saves: x, the normed x, the result (a product's input), the small ones.

    If compiled, the backward kernel computes the normed x again from x.
    """
    # Compiled, the normed x is computed again and not saved.
    large = n.image_tokens * n.width * ((1 if compiled else 2) * r.norm + r.compute)
    return large + 2 * n.image_tokens * r.norm + n.width * r.norm


def block_bytes(n: DiTSizes, r: Rules, compiled: bool = False) -> int:
    """Bytes that one block saves for its backward pass, per sample."""
    N, T, D = n.image_tokens, n.tokens, n.width
    # q, k, v, output, and the projected output at its gate.
    attention = 5 * N * D * r.compute + _scores(n, N, r)
    # Input, q, output; k, v.
    cross = (3 * N * D + 2 * T * D) * r.compute + _scores(n, T, r)
    # Before and after GELU, and the output at its gate.
    mlp = (2 * N * n.hidden + N * D) * r.compute
    return attention + cross + mlp + 2 * _modulated(n, r, compiled) + 6 * D * r.compute


def _selective_bytes(n: DiTSizes, r: Rules) -> int:
    """Bytes that one block saves with selective checkpointing: its input, and results of products and attention."""
    N, T, D = n.image_tokens, n.tokens, n.width
    # Input; qkv; self-attention: output, projected; q; cross-attention: the same two; MLP's output.
    saved = (1 + 3 + 2 + 1 + 2 + 1) * N * D
    # Text keys and values, the MLP's hidden values, the modulation.
    saved += 2 * T * D + N * n.hidden + (6 * D if n.modulation == "per-block" else 0)
    return saved * r.compute + _scores(n, N, r) + _scores(n, T, r)


def activation_bytes(n: NetworkSizes, r: Rules, checkpointing: Checkpointing = "none", compiled: bool = False) -> int:
    """Bytes of activations per sample at the peak of a training step.

    With checkpointing, one block at a time is computed again and holds all its tensors meanwhile. Short-lived
    gradients of the backward pass are not counted; the last layer's tensors are, which are freed before a block's
    gradients appear.
    """
    if isinstance(n, MMDiTSizes):
        return mmdit_activation_bytes(n, r, checkpointing, compiled)
    N, T, D = n.image_tokens, n.tokens, n.width
    # The blocks: saved tensors, and the one block that is being computed again.
    one_block = block_bytes(n, r, compiled)
    # Each choice of checkpointing saves other tensors of a block.
    blocks = {
        "none": n.depth * one_block,
        "selective": (n.depth - 1) * _selective_bytes(n, r) + max(one_block, _selective_bytes(n, r)),
        "full": n.depth * N * D * r.compute + one_block,
    }[checkpointing]
    # Embeddings of time, pooled vector, latent and text, and the mask.
    small = TIME_FEATURES + 4 * D + (n.pooled_dim or 0) + N * n.patch_values + T * (n.states_dim + D)
    small += (n.text_layers - 1) * 2 * T * D + (T if r.fused else 0)
    return blocks + small * r.compute + _modulated(n, r, compiled)


def swapped_parameters(n: NetworkSizes, block_swap: int) -> int:
    """Parameters that rest in the CPU's memory: those of the first blocks, at most `block_swap`."""
    return sum(block_parameters(n, number) for number in range(min(block_swap, n.depth)))


def swap_bytes(n: NetworkSizes, block_swap: int) -> int:
    """Bytes that cross PCIe for a micro-batch: float32 weights twice, for either pass, and gradients once."""
    return 3 * 4 * swapped_parameters(n, block_swap)


def gradient_bytes(n: NetworkSizes, fused_backward: bool = False, compiled: bool = False, block_swap: int = 0) -> int:
    """Bytes of the float32 gradients that exist on the device at the same time.

    Those of all parameters that rest there; with `fused_backward` that of the largest tensor, or if compiled, of a
    block, whose backward pass returns all of its gradients together.
    """
    if not fused_backward:
        # A swapped block's gradients leave one by one.
        leaving = largest_tensor(n) if block_swap else 0
        return 4 * (parameters(n) - swapped_parameters(n, block_swap) + leaving)
    blocks = (block_parameters(n, number) for number in range(n.depth)) if compiled else ()
    return 4 * max(largest_tensor(n), max(blocks, default=0))


def fixed_bytes(
    n: NetworkSizes,
    r: Rules,
    optimizer_state: OptimizerState = "fp32",
    ema_device: str = "same",
    shards: int = 1,
    *,
    gradients: float | None = None,
    block_swap: int = 0,
) -> float:
    """Bytes that do not depend on the batch: weights, gradients, AdamW's two moments, EMA, autocast's copies.

    Args:
        n: the network.
        r: what the device saves.
        optimizer_state, ema_device: as in `train`.
        shards: GPUs that divide all but the copies among themselves (FSDP2).
        gradients: from `gradient_bytes`; None: those of all parameters.
        block_swap: blocks of which no byte rests on the device; one at a time visits it.
    """
    # Weights are float32; the rest depends on the switches.
    every, count = parameters(n), parameters(n) - swapped_parameters(n, block_swap)
    moments = {"fp32": 8.0, "bf16": 4.0, "8bit": 2 * (1 + 4 / BLOCK_8BIT)}[optimizer_state]
    ema = 4 if ema_device == "same" else 0
    state = count * (4 + moments + ema) + (gradient_bytes(n) if gradients is None else gradients)
    cast = r.compute if r.compute < 4 else 0
    copies = cast * (count - uncast(n))
    # A sharded block is gathered for its turn; the backward pass needs autocast's copies of all blocks.
    gathered = GATHERED_BLOCKS * 4 * every / n.depth if shards > 1 else 0
    # A visiting block has its weights and their copies there. (Its tables count as if they were cast.)
    visiting = max((block_parameters(n, number) for number in range(min(block_swap, n.depth))), default=0)
    return state / shards + copies + gathered + (4 + cast) * visiting


@dataclass(frozen=True)
class RouterSizes:
    """The sizes that determine a router's cost: a CLS token, no cross-attention."""

    size: tuple[int, int]
    channels: int
    patch: int
    width: int
    depth: int
    mlp_ratio: float
    clusters: int
    pooled_dim: int | None = None
    modulation: str = "per-block"
    block: str = "dit"


def _router_block(n: RouterSizes) -> tuple[int, int]:
    """Parameters of one block of the router, and multiplications of its products with weights, per token."""
    D, modulation = n.width, 6 * n.width if n.modulation == "single" else _linear(n.width, 6 * n.width)
    if n.block == "mmdit":  # no biases, a gated MLP
        matrices = 4 * D * D + 3 * D * hidden_width(D, n.mlp_ratio)
        return matrices + modulation, matrices
    F = int(D * n.mlp_ratio)
    return _linear(D, 3 * D) + _linear(D, D) + _linear(D, F) + _linear(F, D) + modulation, 4 * D * D + 2 * D * F


def router_parameters(n: RouterSizes) -> int:
    """Parameters of `atoll.nn.router.Router`, exactly."""
    # As `parameters`, without cross-attention and with a CLS token and a head.
    D, single = n.width, n.modulation == "single"
    block, _ = _router_block(n)
    conditioner = _linear(TIME_FEATURES, D) + _linear(D, D) + (_linear(n.pooled_dim, D) if n.pooled_dim else 0)
    conditioner += _linear(D, 6 * D) if single else 0
    ends = _linear(n.patch**2 * n.channels, D) + D + _linear(D, n.clusters) + (2 * D if single else _linear(D, 2 * D))
    return n.depth * block + conditioner + ends


def router_flops(n: RouterSizes) -> int:
    """FLOPs of one latent's forward pass through the router."""
    D, single = n.width, n.modulation == "single"
    # One token more than patches: CLS.
    patches = n.size[0] // n.patch * (n.size[1] // n.patch)
    N = patches + 1
    block = N * _router_block(n)[1] + 2 * N * N * D + (0 if single else 6 * D * D)
    conditioner = TIME_FEATURES * D + D * D + (n.pooled_dim or 0) * D + (6 * D * D if single else 0)
    ends = patches * D * n.patch**2 * n.channels + D * n.clusters + (0 if single else 2 * D * D)
    return 2 * (n.depth * block + conditioner + ends)
