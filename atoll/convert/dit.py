"""Convert DiT (arXiv 2212.09748) to a native network with per-block modulation, which holds all its weights.

Two layouts of the same network: that of facebookresearch/DiT ("dit", and SiT's and REPA's networks), and that of
diffusers' `DiTTransformer2DModel` ("diffusers-dit"). Only the null class is used: its embedding is added to every time
embedding, so it goes into the bias of the time embedding's last layer. Variance outputs are dropped.
"""

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from atoll.convert.kind import PROJECTORS
from atoll.convert.native import (
    DiffusersConfig,
    Native,
    fill,
    foreign_config,
    keep_channels,
    patch_kernel,
    positions,
    stacked,
)
from atoll.convert.read import Checkpoint, Taker
from atoll.errors import AtollError
from atoll.nn.dit import SIZES, TIME_FEATURES, TIME_PERIOD

LatentSize = tuple[int, int]
# Common numbers of classes. With as many embeddings, there is either no null class or an uncommon number of classes.
ROUND_CLASSES = (2, 10, 20, 50, 100, 200, 500, 1000, 10000)


def from_dit(
    checkpoint: Checkpoint, size: LatentSize | None = None, heads: int | None = None, classes: int | None = None
) -> Native:
    """Convert a checkpoint in the layout of facebookresearch/DiT.

    Args:
        size: (H, W) of the latent; None: the square that the checkpoint was trained on.
        heads: attention heads; None: those of the published sizes S, B, L and XL.
        classes: the number of classes without the null class; None: from the training arguments, else the number of
            embeddings minus one.

    Raises:
        AtollError: the tensors do not determine a size, or tensors are missing, misshapen or unknown.
    """
    taker = Taker(checkpoint)
    taker.drop_prefix(PROJECTORS)
    # The sizes, from the shapes of the tensors.
    width, channels, patch, _ = taker.shape("x_embedder.proj.weight", 4)
    tokens = taker.shape("pos_embed", 3)[1]
    hidden = taker.shape("blocks.0.mlp.fc1.weight", 2)[0]
    rows = taker.shape("y_embedder.embedding_table.weight", 2)[0]
    outputs = taker.shape("final_layer.linear.weight", 2)[0]
    check_outputs(checkpoint, outputs, patch, channels)
    depth = taker.count("blocks")
    classes = count_classes(checkpoint, rows, classes)
    size, fits = _latent_size(checkpoint, tokens, patch, size)
    # Patch embedding and positions.
    weights: dict[str, Tensor] = {}
    kernel = taker.take("x_embedder.proj.weight", width, channels, patch, patch)
    fill(weights, "embed", patch_kernel(kernel, taker.take("x_embedder.proj.bias", width)))
    own = taker.take("pos_embed", 1, tokens, width)[0]
    weights["positions"] = own if fits else positions(size, patch, width, math.sqrt(tokens))
    # Time, with the null class in the last bias. A network without a null class gets the mean of its classes.
    table = taker.take("y_embedder.embedding_table.weight", rows, width)
    null = table[-1] if rows > classes else table.mean(0)
    last, bias = taker.linear("t_embedder.mlp.2", width, width)
    fill(weights, "conditioner.time.0", taker.linear("t_embedder.mlp.0", width, TIME_FEATURES))
    fill(weights, "conditioner.time.2", (last, bias + null))
    # Blocks.
    for i in range(depth):
        theirs, ours = f"blocks.{i}", f"blocks.{i}"
        fill(weights, f"{ours}.modulation.linear", taker.linear(f"{theirs}.adaLN_modulation.1", 6 * width, width))
        fill(weights, f"{ours}.attention.qkv", taker.linear(f"{theirs}.attn.qkv", 3 * width, width))
        fill(weights, f"{ours}.attention.out", taker.linear(f"{theirs}.attn.proj", width, width))
        fill(weights, f"{ours}.mlp.0", taker.linear(f"{theirs}.mlp.fc1", hidden, width))
        fill(weights, f"{ours}.mlp.2", taker.linear(f"{theirs}.mlp.fc2", width, hidden))
    # Final layer.
    fill(weights, "final_modulation.linear", taker.linear("final_layer.adaLN_modulation.1", 2 * width, width))
    final = taker.linear("final_layer.linear", outputs, width)
    taker.done()
    fill(weights, "final", keep_channels(final, patch, channels))
    # The config, and the notes for the card.
    config = {
        "size": list(size),
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": heads or published_heads(checkpoint, width, depth),
        "mlp_ratio": hidden / width,
        "modulation": "per-block",
    }
    notes = {"classes": classes, "positions": "the checkpoint's" if fits else f"stretched from {tokens}"}
    return Native(config, weights, notes | ({} if rows > classes else {"null": f"the mean of {classes} classes"}))


def _latent_size(checkpoint: Checkpoint, tokens: int, patch: int, size: LatentSize | None) -> tuple[LatentSize, bool]:
    """Return (H, W) of the latent, and whether the checkpoint's positions fit that size."""
    # Only a square number of tokens determines the sides.
    side = math.isqrt(tokens)
    trained_size = (side * patch, side * patch) if side * side == tokens else None
    size = size or trained_size
    if size is None:
        raise AtollError(f"{checkpoint.where}: {tokens} positions are no square; say the latent's size")
    # Positions of a rectangle fit if at least their number does.
    fits = size == trained_size or (trained_size is None and (size[0] // patch) * (size[1] // patch) == tokens)
    return size, fits


def count_classes(checkpoint: Checkpoint, rows: int, classes: int | None) -> int:
    """Count the classes of a DiT with `rows` embeddings: rows - 1 with a null class, rows without one.

    A DiT trained without label dropout has no null class. The tensors do not show which case it is.

    Args:
        checkpoint: the checkpoint, for its training arguments.
        rows: the number of embeddings.
        classes: the caller's number; None: from the training arguments, else rows - 1.

    Raises:
        AtollError: the number is neither, or `rows` is a common number of classes, so the case is unclear.
    """
    # The caller has precedence over the training script.
    saved = checkpoint.args.get("num_classes")
    count = classes if classes is not None else saved if isinstance(saved, int) else None
    if count is None and rows in ROUND_CLASSES:
        raise AtollError(
            f"{checkpoint.where}: {rows} class embeddings: {rows} classes and no null class, or {rows - 1} and one? "
            f"Say --classes {rows} (their mean takes the null class's place) or --classes {rows - 1}"
        )
    # Label dropout is DiT's default, so assume a null class.
    count = rows - 1 if count is None else count
    if count not in (rows - 1, rows):
        raise AtollError(
            f"{checkpoint.where}: {rows} class embeddings, {count} classes; expected {rows - 1} and a null class, or "
            f"{rows} without one: correct --classes"
        )
    return count


def check_outputs(checkpoint: Checkpoint, outputs: int, patch: int, channels: int) -> None:
    """Raise AtollError unless a token has outputs for a prediction, with or without a variance."""
    # The outputs of a token are those of its pixels.
    per_pixel = outputs / patch**2
    if per_pixel not in (channels, 2 * channels):
        raise AtollError(
            f"{checkpoint.where}: {outputs} outputs a token, {per_pixel:g} a pixel; expected {channels} (eps) or "
            f"{2 * channels} (eps and variance): this predicts something else"
        )


def published_heads(checkpoint: Checkpoint, width: int, depth: int) -> int:
    """Return the attention heads of a published DiT size. Raises AtollError for another size."""
    # Any number of heads has tensors of the same shapes, so a wrong guess would go unnoticed.
    for name, size in SIZES.items():
        if "/" in name and (size["width"], size["depth"]) == (width, depth):
            return size["heads"]
    raise AtollError(
        f"{checkpoint.where}: width {width} and depth {depth} are none of DiT's sizes, and no tensor tells the heads; "
        "say how many (--heads)"
    )


class Transformer(DiffusersConfig):
    """The keys that config.json of a DiTTransformer2DModel and of a PixArtTransformer2DModel share."""

    num_attention_heads: PositiveInt = 16
    attention_head_dim: PositiveInt = 72
    in_channels: PositiveInt = 4
    out_channels: PositiveInt | None = None
    num_layers: PositiveInt = 28
    attention_bias: bool = True
    sample_size: int = Field(32, ge=1, le=4096)
    patch_size: PositiveInt = 2

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def outputs(self) -> int:
        """Outputs per token."""
        return self.patch_size**2 * (self.out_channels or self.in_channels)


class DiffusersDiT(Transformer):
    """config.json of a DiTTransformer2DModel, with that class's defaults."""

    num_embeds_ada_norm: PositiveInt = 1000  # classes
    norm_eps: float = Field(1e-5, gt=0)  # of the norm before the MLP only; the others have 1e-6
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    norm_elementwise_affine: Literal[False] = False
    attention_type: Literal["default"] = "default"
    dropout: float = 0.0  # these three change nothing at inference
    norm_num_groups: int = 32
    upcast_attention: bool = False


def from_diffusers_dit(checkpoint: Checkpoint, size: LatentSize | None = None) -> Native:
    """Convert a checkpoint of diffusers' DiTTransformer2DModel with its config.json. The result is exact.

    That class differs from DiT in two points. The frequencies of the time features span 127 steps instead of 128. The
    norm before the MLP has an eps of 1e-5. Every block has its own embedder of time and class; they must be equal, as
    they are in checkpoints converted from DiT.

    Raises:
        AtollError: no config.json, one of another network, or tensors missing, misshapen or unknown.
    """
    # Sizes from the config, then patch embedding and positions.
    config = foreign_config(checkpoint, DiffusersDiT)
    patch, channels, width = config.patch_size, config.in_channels, config.width
    size = size or (config.sample_size, config.sample_size)
    taker, weights = embedding(checkpoint, config, size, config.sample_size // patch)
    # Blocks, each with an embedder of its own.
    embedders = []
    for i in range(config.num_layers):
        block, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        embedders.append(_embedder(taker, f"{block}.norm1.emb", width, config.num_embeds_ada_norm))
        fill(weights, f"{ours}.modulation.linear", taker.linear(f"{block}.norm1.linear", 6 * width, width))
        attention(taker, weights, block, ours, width, config.attention_bias)
    # Final layer, with the prediction's channels only.
    fill(weights, "final_modulation.linear", taker.linear("proj_out_1", 2 * width, width))
    fill(weights, "final", keep_channels(taker.linear("proj_out_2", config.outputs, width), patch, channels))
    taker.done()
    # A native network has one time embedder, so those of all blocks must be the same.
    for i, embedder in enumerate(embedders):
        if any(not torch.equal(embedder[name], embedders[0][name]) for name in embedder):
            raise AtollError(
                f"{checkpoint.where}: the embedders of time and null class of blocks 0 and {i} differ; a converted "
                "network has one for all: keep diffusers' network instead (--keep)"
            )
    return Native(
        {
            "size": list(size),
            "channels": channels,
            "patch": patch,
            "width": width,
            "depth": config.num_layers,
            "heads": config.num_attention_heads,
            "modulation": "per-block",
            "mlp_eps": config.norm_eps,
            "time_period": TIME_PERIOD ** (128 / 127),
        },
        weights | embedders[0],
        {"classes": config.num_embeds_ada_norm},
    )


def embedding(
    checkpoint: Checkpoint, config: Transformer, size: LatentSize, base: float
) -> tuple[Taker, dict[str, Tensor]]:
    """Begin the conversion of a diffusers network: its taker, and the weights of patch embedding and positions.

    Args:
        base: tokens per side of the original positions, as in `positions`.

    Raises:
        AtollError: the blocks or the patch embedding differ from config.json, or the outputs are not a prediction.
    """
    # The taker reports all missing tensors at the end.
    taker, weights = Taker(checkpoint), dict[str, Tensor]()
    # Sizes are checked before anything of their size is computed.
    patch, channels, width = config.patch_size, config.in_channels, config.width
    check_sizes(taker, config.num_layers, (width, channels, patch, patch))
    check_outputs(checkpoint, config.outputs, patch, channels)
    kernel = taker.take("pos_embed.proj.weight", width, channels, patch, patch)
    fill(weights, "embed", patch_kernel(kernel, taker.take("pos_embed.proj.bias", width)))
    # Older versions of diffusers stored the positions, which follow from the config.
    taker.drop("pos_embed.pos_embed")
    weights["positions"] = positions(size, patch, width, base)
    return taker, weights


def check_sizes(taker: Taker, layers: int, kernel: tuple[int, ...]) -> None:
    """Raise AtollError unless the blocks and the patch embedding [D, C, p, p] fit config.json."""
    # A wrong config.json is noticed before any tensor is read.
    got = (taker.count("transformer_blocks"), *taker.shape("pos_embed.proj.weight", 4))
    if got != (layers, *kernel):
        raise AtollError(
            f"{taker.where}: {got[0]} blocks and a patch embedding {list(got[1:])}, config.json says {layers} and "
            f"{list(kernel)}; get both from one place"
        )


def _embedder(taker: Taker, name: str, width: int, classes: int) -> dict[str, Tensor]:
    """Convert one block's time embedder, with the null class in its last bias."""
    weights: dict[str, Tensor] = {}
    # The null class is the last row.
    null = taker.take(f"{name}.class_embedder.embedding_table.weight", classes + 1, width)[-1]
    last, bias = taker.linear(f"{name}.timestep_embedder.linear_2", width, width)
    fill(weights, "conditioner.time.0", taker.linear(f"{name}.timestep_embedder.linear_1", width, TIME_FEATURES))
    fill(weights, "conditioner.time.2", (last, bias + null))
    return weights


def attention(taker: Taker, weights: dict[str, Tensor], block: str, ours: str, width: int, bias: bool) -> None:
    """Convert self-attention and MLP of a BasicTransformerBlock of diffusers."""
    # diffusers has three layers for q, k and v; a native network has one.
    parts = [taker.linear(f"{block}.attn1.to_{part}", width, width, bias) for part in "qkv"]
    fill(weights, f"{ours}.attention.qkv", stacked(*parts))
    fill(weights, f"{ours}.attention.out", taker.linear(f"{block}.attn1.to_out.0", width, width))
    fill(weights, f"{ours}.mlp.0", taker.linear(f"{block}.ff.net.0.proj", 4 * width, width))
    fill(weights, f"{ours}.mlp.2", taker.linear(f"{block}.ff.net.2", width, 4 * width))
