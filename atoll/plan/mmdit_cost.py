"""The cost of an MMDiT by formula, layer by layer as in `atoll.nn.mmdit`; tests compare it with the network.

Letters: N image tokens, T text tokens, M = T + N, D width, F hidden width of the MLP, h heads, C H W latent, p patch,
S width of the text's states, P width of the pooled vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from atoll.choices import MLP_RATIOS, Checkpointing, hidden_width
from atoll.plan.rules import SHORT_ROWS, TIME_FEATURES, Rules


@dataclass(frozen=True)
class MMDiTSizes:
    """The sizes that determine an MMDiT's cost.

    Attributes:
        size: (H, W) of the latent.
        tokens: T, text tokens of a caption.
    """

    name: ClassVar[str] = "mmdit"
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
    dual_blocks: int = 0
    size_embedding: bool = False
    bottleneck: int | None = None

    @staticmethod
    def from_config(config: Mapping[str, Any], tokens: int) -> "MMDiTSizes":
        """From an MMDiT's configuration, as cards hold it, and the text tokens of a caption."""
        names = [field.name for field in fields(MMDiTSizes) if field.name != "tokens"]
        known = {name: config[name] for name in names if name in config}
        return MMDiTSizes(
            **{"mlp_ratio": MLP_RATIOS["mmdit"], **known, "size": tuple(config["size"]), "tokens": tokens}
        )

    @property
    def image_tokens(self) -> int:
        """N."""
        return self.size[0] // self.patch * (self.size[1] // self.patch)

    @property
    def hidden(self) -> int:
        """F."""
        return hidden_width(self.width, self.mlp_ratio)

    @property
    def patch_values(self) -> int:
        """Numbers of the latent in one token: p*p*C."""
        return self.patch**2 * self.channels

    @property
    def stream(self) -> int:
        """Numbers in the matrices of one stream of a block: attention's projections and the gated MLP."""
        return 4 * self.width**2 + 3 * self.width * self.hidden

    @property
    def embedding(self) -> int:
        """Numbers in the matrices that embed a patch."""
        if self.bottleneck is None:
            return self.patch_values * self.width
        return (self.patch_values + self.width) * self.bottleneck


def _conditioner(n: MMDiTSizes) -> tuple[int, int]:
    """Numbers in the matrices that embed time, pooled vector and size and make the modulation; and their biases."""
    D, texts = n.width, 1 if n.dual_blocks else 0
    matrices = TIME_FEATURES * D + D * D + (n.pooled_dim or 0) * D + (1 + texts) * 6 * D * D
    matrices += 2 * TIME_FEATURES * D if n.size_embedding else 0
    return matrices, (2 + (1 if n.pooled_dim else 0) + 6 * (1 + texts)) * D


def _tables(n: MMDiTSizes) -> int:
    """Parameters of the modulation's tables."""
    return (6 * (n.depth + n.dual_blocks) + 2) * n.width


def mmdit_uncast(n: MMDiTSizes) -> int:
    """Parameters that autocast does not copy to bf16: the tables, and what is computed in float32."""
    return sum(_conditioner(n)) + _tables(n)


def mmdit_parameters(n: MMDiTSizes) -> int:
    """Parameters of the whole network, exactly."""
    D = n.width
    blocks = n.depth * n.stream + n.dual_blocks * n.stream + (n.depth - n.dual_blocks) * 2 * D * D
    return blocks + mmdit_uncast(n) + n.embedding + D * n.patch_values + n.states_dim * D


def mmdit_block_parameters(n: MMDiTSizes, number: int) -> int:
    """Parameters of one block, exactly; number: from 0."""
    D = n.width
    if number < n.dual_blocks:
        return 2 * (n.stream + 6 * D)
    return n.stream + 2 * D * D + 6 * D


def mmdit_largest_tensor(n: MMDiTSizes) -> int:
    """Parameters in the largest tensor of the network, exactly."""
    D = n.width
    embedded = [n.patch_values, TIME_FEATURES, n.pooled_dim or 0, n.states_dim]
    embedded += [2 * TIME_FEATURES] if n.size_embedding else []
    # The shared modulation, or one product for both halves of the gated MLP.
    return max(D * max(6 * D, 2 * n.hidden, *embedded), n.patch_values * (n.bottleneck or 0), D * (n.bottleneck or 0))


@dataclass(frozen=True)
class RoutedBlocks:
    """The blocks that some image tokens skip in the first part of a training (`train.token_route`).

    Attributes:
        first, last: blocks first..last-1.
        kept: image tokens that pass them.
        share: the fraction of steps with routed tokens.
    """

    first: int
    last: int
    kept: int
    share: float


def _block_products(n: MMDiTSizes, number: int, N: int) -> int:
    """Multiplications of a block on N image tokens; number: from 0."""
    T, D, M = n.tokens, n.width, N + n.tokens
    # Image queries over all keys; in dual blocks, all queries.
    if number < n.dual_blocks:
        return M * n.stream + 2 * M * M * D
    return N * n.stream + T * 2 * D * D + 2 * N * M * D


def mmdit_forward_flops(n: MMDiTSizes, route: RoutedBlocks | None = None) -> int:
    """FLOPs of one image's forward pass: two per multiplication of the matrix products.

    With a route, those of a step whose tokens are routed.
    """
    N, T, D = n.image_tokens, n.tokens, n.width
    routed = range(route.first, route.last) if route else ()
    tokens = [route.kept if route and number in routed else N for number in range(n.depth)]
    blocks = sum(_block_products(n, number, passing) for number, passing in enumerate(tokens))
    return 2 * (blocks + _conditioner(n)[0] + T * D * n.states_dim + N * (n.embedding + D * n.patch_values))


def _scores(n: MMDiTSizes, queries: int, r: Rules) -> int:
    """Bytes that an attention of `queries` over all tokens saves besides its inputs and its joined output."""
    keys, rows = n.image_tokens + n.tokens, n.heads * queries
    # A fused kernel saves one logarithm per row, and its output head by head (some kernels join heads without a copy).
    if r.fused:
        return rows * 4 + queries * n.width * r.compute
    # Otherwise the weights, and their float32 copy if rows are short.
    return rows * keys * (r.compute + (4 if keys < SHORT_ROWS else 0))


def _modulated(n: MMDiTSizes, tokens: int, r: Rules, compiled: bool) -> int:
    """Bytes that norm(x) * (1 + scale) + shift saves, as in `atoll.plan.cost`."""
    large = tokens * n.width * ((1 if compiled else 2) * r.norm + r.compute)
    return large + 2 * tokens * r.norm + n.width * r.norm


def _stream_bytes(n: MMDiTSizes, tokens: int, r: Rules, compiled: bool) -> int:
    """Bytes that one stream of a block saves, attention's joint tensors excluded."""
    # Queries and keys with the norm of each head; the projected output at its gate.
    attention = 3 * tokens * n.width * r.compute + 2 * tokens * n.heads * 4
    # Gate, up, silu(gate), their product; the output at its gate. Compiled, the two in the middle are computed again.
    mlp = tokens * ((3 if compiled else 4) * n.hidden + n.width) * r.compute
    return attention + mlp + 2 * _modulated(n, tokens, r, compiled) + 6 * n.width * r.compute


def _reading_bytes(n: MMDiTSizes, r: Rules, compiled: bool) -> int:
    """Bytes that a block which only reads the text saves."""
    N, T, D = n.image_tokens, n.tokens, n.width
    # The text's keys with the norm of each head; joint keys and values; attention's output.
    joint = (T * D + 2 * (N + T) * D + N * D) * r.compute + T * n.heads * 4
    return _stream_bytes(n, N, r, compiled) + joint + _scores(n, N, r)


def _dual_bytes(n: MMDiTSizes, r: Rules, compiled: bool) -> int:
    """Bytes that a dual block saves."""
    N, T, D = n.image_tokens, n.tokens, n.width
    # Joint queries, keys and values; attention's output.
    joint = 4 * (N + T) * D * r.compute
    streams = _stream_bytes(n, N, r, compiled) + _stream_bytes(n, T, r, compiled)
    return streams + joint + _scores(n, N + T, r)


def _selective_bytes(n: MMDiTSizes, r: Rules, dual: bool) -> int:
    """Bytes that one block saves with selective checkpointing: its input, and results of products and attention."""
    N, T, D = n.image_tokens, n.tokens, n.width
    tokens = N + T if dual else N
    # Input; qkv; attention's output, projected; gate and up; the MLP's output. Then the text's keys and values.
    saved = tokens * ((1 + 3 + 2 + 1) * D + 2 * n.hidden) + (0 if dual else 2 * T * D)
    return saved * r.compute + _scores(n, tokens, r)


def mmdit_activation_bytes(
    n: MMDiTSizes, r: Rules, checkpointing: Checkpointing = "none", compiled: bool = False
) -> int:
    """Bytes of activations per sample at the peak of a training step, as `atoll.plan.cost.activation_bytes`."""
    N, T, D = n.image_tokens, n.tokens, n.width
    blocks, largest = 0, 0
    for dual, count in ((True, n.dual_blocks), (False, n.depth - n.dual_blocks)):
        if not count:
            continue
        whole = _dual_bytes(n, r, compiled) if dual else _reading_bytes(n, r, compiled)
        each = {
            "none": whole,
            "selective": _selective_bytes(n, r, dual),
            "full": (N + (T if dual else 0)) * D * r.compute,
        }[checkpointing]
        blocks, largest = blocks + count * each, max(largest, whole - (each if checkpointing == "selective" else 0))
    # With checkpointing, one block at a time is computed again and holds all its tensors meanwhile.
    blocks += 0 if checkpointing == "none" else largest
    # Embeddings of latent and text, the text's norm, the bias of a fused attention.
    small = N * (n.patch_values + (n.bottleneck or 0)) + T * (n.states_dim + D) + (N + T if r.fused else 0)
    norm = T * D * r.norm + 2 * T * r.norm
    # Time, pooled vector, size and the modulation of the text are computed in float32.
    wide = TIME_FEATURES + 4 * D + (n.pooled_dim or 0) + (D if n.dual_blocks else 0)
    wide += 2 * TIME_FEATURES if n.size_embedding else 0
    return blocks + small * r.compute + norm + wide * 4 + _modulated(n, N, r, compiled)
