"""A diffusion transformer for text-conditioned latents: DiT's block with PixArt's cross-attention.

Read it top to bottom; the sizes are at the end. Letters: B batch, C H W latent, N image tokens, L text tokens,
D width, h heads, d = D / h, p patch.

A block is, in the order of DiT (arXiv 2212.09748) and PixArt-alpha (arXiv 2310.00426), so that their weights
fit (HDDM, arXiv 2603.06741, orders it otherwise in Eqs. 16 and 18; that would break the transfer):

    x = x + gate_1 * self_attention(norm(x) * (1 + scale_1) + shift_1)
    x = x + cross_attention(x, states)                                     no norm, no gate
    x = x + gate_2 * mlp(norm(x) * (1 + scale_2) + shift_2)

The six vectors come from the time and the optional pooled vector, by one of two modulations:

- "single": one linear layer for the whole network and a table of six vectors per block (PixArt, AdaLN-Single);
- "per-block": one linear layer per block (DiT, adaLN-Zero).

XL/2 with 4 channels and 768 wide text has 605.7 M parameters with the first, 823.3 M with the second: 26 % less.
HDDM counts 605 M; PixArt's layout counts 607.0 M, since it projects the text by two layers instead of one.

The last four fields of the configuration serve foreign weights (`atoll.convert`); their defaults are DiT's.
"""

import math
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from atoll.choices import Checkpointing
from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.nn.attention import CrossAttention, SelfAttention, TextKV, read_states
from atoll.nn.fused import GeluMLP
from atoll.nn.inputs import check_states, checked_rows, compute_dtype, mask_bias
from atoll.nn.positions import sincos_table, token_grid
from atoll.nn.recompute import recomputed
from atoll.nn.sizes import check_sizes
from atoll.storage import bounds

ModulationKind = Literal["single", "per-block"]
TIME_FEATURES = 256  # sinusoids of the time, as in DiT,
TIME_PERIOD = 10000.0  # whose longest period is 2 pi times this
NORM_EPS = 1e-6


class DiTConfig(BaseModel):
    """The configuration of a DiT, saved in the card.

    Raises AtollError for sizes that do not fit each other, pydantic.ValidationError for a wrong type or key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["dit"] = "dit"
    size: tuple[bounds.Side, bounds.Side]  # (H, W) of the latent
    channels: bounds.Channels  # C of the latent
    patch: bounds.Side  # side of a token, in latent pixels
    width: bounds.Width  # D
    depth: bounds.Depth  # number of blocks
    heads: bounds.Width
    mlp_ratio: bounds.MlpRatio = 4.0  # hidden width of a block's MLP over D
    states_dim: bounds.Width  # width of the condition's states
    pooled_dim: bounds.Width | None = None  # width of the condition's pooled vector; None: not used
    modulation: ModulationKind = "single"
    final: ModulationKind | None = None  # modulation of the last norm; None: that of the blocks
    text_layers: Literal[1, 2] = 1  # linear layers that project the states; PixArt has 2
    mlp_eps: bounds.Epsilon = NORM_EPS  # of the norm before a block's MLP; diffusers' DiT uses 1e-5
    time_period: bounds.TimeScale = TIME_PERIOD  # diffusers' DiT uses 10000^(128/127)
    base_size: tuple[bounds.Side, bounds.Side] | None = None  # (H, W) of `atoll.nn.positions`' base grid; None: `size`

    @model_validator(mode="after")
    def _check(self) -> "DiTConfig":
        for size in (self.size, self.base_size or self.size):
            check_sizes(size, self.patch, self.width, self.heads)
        return self


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B,C,H,W] -> [B,N,p*p*C], row by row; inside a token (p,p,C), the order of DiT's output."""
    # Split both sides into patches, then make the patch the last axis.
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // patch, patch, W // patch, patch)  # [B,C,H/p,p,W/p,p]
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * C)  # [B,N,p*p*C]


def unpatchify(tokens: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """[B,N,p*p*C] -> [B,C,H,W]: the inverse of `patchify` for a latent of `size` (H, W)."""
    B, (H, W) = len(tokens), size
    x = tokens.reshape(B, H // patch, W // patch, patch, patch, -1)  # [B,H/p,W/p,p,p,C]
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W)  # [B,C,H,W]


def time_features(time: Tensor, period: float = TIME_PERIOD) -> Tensor:
    """Sinusoids [B,256] of `time` [B], cosines first, periods from 2 pi to 2 pi * period: what DiT's MLP reads.

    Computed in float32 at least, and not from a buffer: `.to(torch.bfloat16)` would round a buffer, and 999 times a
    rounded frequency is the sinusoid of another time.
    """
    time = time.to(torch.promote_types(time.dtype, torch.float32))  # [B]
    half = TIME_FEATURES // 2
    index = torch.arange(half, device=time.device, dtype=time.dtype)  # [128]
    angles = time[:, None] * torch.exp(-math.log(period) * index / half)  # [B,128]
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # [B,256]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = NORM_EPS) -> Tensor:
    """norm(x) * (1 + scale) + shift; x [B,N,D], shift and scale [B,1,D]. The norm has no weights."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)  # [B,N,D]


def text_projection(states_dim: int, width: int, layers: int) -> nn.Module:
    """The projection of the states to the network's width: one linear layer, or PixArt's MLP of two."""
    if layers == 1:
        return nn.Linear(states_dim, width)
    return nn.Sequential(nn.Linear(states_dim, width), nn.GELU("tanh"), nn.Linear(width, width))


class SingleModulation(nn.Module):
    """`count` vectors per sample: a table of this layer plus a projection that all layers share (PixArt Eq. 1)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(count, width))

    def forward(self, prepared: Tensor, dtype: torch.dtype) -> Tensor:
        vectors = self.table + prepared  # [B,count,D] from [B,count or 1,D]
        return vectors.to(dtype).unsqueeze(2)  # [B,count,1,D]


class PerBlockModulation(nn.Module):
    """`count` vectors per sample: this layer's linear map of the conditioning vector (DiT, adaLN-Zero)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, prepared: Tensor, dtype: torch.dtype) -> Tensor:
        vectors = self.linear(prepared).unflatten(1, (self.count, -1))  # [B,count,D] from [B,D]
        return vectors.to(dtype).unsqueeze(2)  # [B,count,1,D]


MODULATIONS = {"single": SingleModulation, "per-block": PerBlockModulation}


class Conditioner(nn.Module):
    """Time [B] and the optional pooled vector [B,P] -> inputs of the blocks' modulations and of the final one."""

    def __init__(
        self,
        width: int,
        pooled_dim: int | None,
        kind: ModulationKind,
        final: ModulationKind | None = None,
        period: float = TIME_PERIOD,
    ) -> None:
        super().__init__()
        self.final, self.period = final or kind, period
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.pooled = nn.Linear(pooled_dim, width) if pooled_dim else None
        self.shared = nn.Linear(width, 6 * width) if kind == "single" else None

    def forward(
        self, time: Tensor, pooled: Tensor | None, dtype: torch.dtype, more: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        # Embed time and pooled vector, and add them (and `more`, [1 or B,D]): the conditioning vector c.
        c = self.time(time_features(time, self.period).to(dtype))  # [B,D]
        c = c if more is None else c + more  # [B,D]
        if self.pooled is not None:
            if pooled is None or pooled.shape[1] != self.pooled.in_features:
                got = "none" if pooled is None else f"{pooled.shape[1]} wide"
                raise AtollError(
                    f"pooled vector: got {got}, expected {self.pooled.in_features} wide; "
                    "use the encoder that the network was trained with"
                )
            c = c + self.pooled(pooled.to(dtype))  # [B,D]
        # "single" applies its linear layer once, for all blocks; "per-block" leaves that to each block.
        activated = F.silu(c)  # [B,D]
        prepared = activated if self.shared is None else self.shared(activated).unflatten(1, (6, -1))  # [B,6,D]
        return prepared, c[:, None] if self.final == "single" else activated  # [B,D] or [B,6,D], [B,1,D] or [B,D]


class DiTBlock(nn.Module):
    """One block, see the head of this file; without `cross` it has no cross-attention (the router's blocks)."""

    checkpointing: Checkpointing = "none"  # set by the training loop

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        kind: ModulationKind,
        cross: bool = True,
        mlp_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.mlp_eps = mlp_eps
        self.modulation = MODULATIONS[kind](width, 6)
        self.attention = SelfAttention(width, heads)
        self.cross = CrossAttention(width, heads) if cross else None
        self.mlp = GeluMLP(width, hidden)

    def forward(
        self,
        x: Tensor,
        prepared: Tensor,
        states: Tensor | None = None,
        bias: Tensor | None = None,
        keys_values: Tensor | None = None,
    ) -> Tensor:
        """Return x [B,N,D] after the block. keys_values [B,L,2D]: those of the states, if already computed."""
        return recomputed(self._forward, self.checkpointing, x, prepared, states, bias, keys_values)  # [B,N,D]

    def _forward(
        self, x: Tensor, prepared: Tensor, states: Tensor | None, bias: Tensor | None, keys_values: Tensor | None
    ) -> Tensor:
        vectors = self.modulation(prepared, x.dtype)  # [B,6,1,D]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors.unbind(1)  # [B,1,D] each
        # Self-attention, modulated and gated.
        x = torch.addcmul(x, gate_1, self.attention(modulate(x, shift_1, scale_1)))  # [B,N,D]
        # Cross-attention to the text: no norm, no gate.
        if self.cross is not None:
            keys_values = self.cross.kv(states) if keys_values is None else keys_values  # [B,L,2D]
            x = x + self.cross(x, keys_values, bias)  # [B,N,D]
        # MLP, modulated and gated.
        return torch.addcmul(x, gate_2, self.mlp(modulate(x, shift_2, scale_2, self.mlp_eps)))  # [B,N,D]


def zero(module: nn.Module) -> None:
    """Set every parameter of `module` to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def initialize_blocks(network: nn.Module, conditioner: Conditioner) -> None:
    """Initialise a network of these blocks as HDDM does, so that every block starts as the identity."""
    # Xavier for linear layers.
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # N(0, 0.02) in the conditioner.
    for module in conditioner.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    # Zero for everything that shifts, scales or gates.
    if conditioner.shared is not None:
        zero(conditioner.shared)
    for module in network.modules():
        if isinstance(module, SingleModulation | PerBlockModulation):
            zero(module)


class DiT(nn.Module):
    """The denoiser: forward(x [B,C,H,W], time [B], condition) -> [B,C,H,W], in the dtype of x.

    `time` is scaled already (0..999 by default, see the objective's time_scale). The network computes in the dtype of
    its weights, or in autocast's. Latents may have any size that the patch divides, see `atoll.nn.positions`. Raises
    AtollError if an input does not fit the configuration.
    """

    positions: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        p, D, kind = config.patch, config.width, config.modulation
        self.embed = nn.Linear(p * p * config.channels, D)
        # Fixed, but persistent: a network built on the meta device then loads it together with its weights.
        self._table = sincos_table(config.size, config.base_size, p, D)
        self.register_buffer("positions", self._table.own())
        self.conditioner = Conditioner(D, config.pooled_dim, kind, config.final, config.time_period)
        self.embed_states = text_projection(config.states_dim, D, config.text_layers)
        self.blocks = nn.ModuleList(
            DiTBlock(D, config.heads, config.mlp_ratio, kind, mlp_eps=config.mlp_eps) for _ in range(config.depth)
        )
        self.final_modulation = MODULATIONS[config.final or kind](D, 2)
        self.final = nn.Linear(D, p * p * config.channels)
        self.initialize()

    def initialize(self) -> None:
        """Initialise as HDDM does: DiT's scheme, PixArt's for the text. The output is exactly zero."""
        initialize_blocks(self, self.conditioner)
        # The text projection as in PixArt.
        for module in self.embed_states.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        # Cross-attention and the final layer contribute nothing at first.
        for module in self.modules():
            if isinstance(module, CrossAttention):
                zero(module.out)
        zero(self.final)

    def embed_condition(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Project the states to [B,L,D] and make the attention bias [B,1,1,L], -inf where masked."""
        check_states(condition, self.config.states_dim)
        dtype = compute_dtype(self.embed.weight, condition.states)
        states = self.embed_states(condition.states.to(dtype))  # [B,L,D]
        return states, mask_bias(condition.mask, dtype)  # [B,L,D], [B,1,1,L]

    def read_prompt(self, condition: Condition) -> TextKV:
        """Compute the text keys and values, which `forward` accepts in place of the condition.

        This saves the text layers at every further call: 4 % of XL/2 at 256 image and 77 text tokens, 15 % of S/2 at
        64. Valid for this network and its current weights only.
        """
        states, bias = self.embed_condition(condition)  # [B,L,D], [B,1,1,L]
        return read_states(self, states, bias, condition.pooled)

    def forward(
        self, x: Tensor, time: Tensor, condition: Condition | TextKV | None, *, tap: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the prediction.

        Args:
            x: latent [B,C,H,W].
            time: [B].
            condition: of B rows, or what `read_prompt` returned for it.
            tap: also return the tokens after this many blocks; needs a `Condition`.

        Returns:
            [B,C,H,W]; with `tap` also the tokens [B,N,D].
        """
        # Check the inputs.
        config = self.config
        if tap is not None and not 0 < tap <= config.depth:
            raise AtollError(f"tap: got {tap}, expected a number of blocks from 1 to {config.depth}")
        grid = token_grid(x, time, config.channels, config.patch)
        condition = checked_rows(condition, len(x))
        # Embed time, pooled vector and latent.
        dtype = compute_dtype(self.embed.weight, x)
        prepared, prepared_final = self.conditioner(time, condition.pooled, dtype)  # [B,6,D], [B,1,D] or [B,D]
        tokens = self.embed(patchify(x.to(dtype), config.patch))  # [B,N,D]
        tokens = tokens + self._table.at(grid, self.positions).to(dtype)  # [B,N,D]
        # The blocks, with cached or freshly computed text keys and values.
        features = None
        if isinstance(condition, TextKV):
            if tap is not None:
                raise AtollError("tap: got keys and values of a prompt; pass the condition itself")
            tokens = condition.through(
                self.blocks, tokens, lambda block, x, rows, bias, read: block(x, prepared[rows], None, bias, read)
            )  # [B,N,D]
        else:
            states, bias = self.embed_condition(condition)  # [B,L,D], [B,1,1,L]
            for number, block in enumerate(self.blocks, 1):
                tokens = block(tokens, prepared, states, bias)  # [B,N,D]
                features = tokens if number == tap else features
        # The final layer, and back to a latent.
        shift, scale = self.final_modulation(prepared_final, dtype).unbind(1)  # [B,1,D] each
        tokens = self.final(modulate(tokens, shift, scale))  # [B,N,p*p*C]
        output = unpatchify(tokens, config.patch, (x.shape[2], x.shape[3])).to(x.dtype)  # [B,C,H,W]
        return output if features is None else (output, features)


class DiTSize(TypedDict):
    """The fields of a configuration that the name of a size fixes."""

    patch: int
    width: int
    depth: int
    heads: int


# DiTConfig(size=(32, 32), channels=4, states_dim=768, **SIZES["B/2"]). Parameters with these and "single":
# tiny 1.3 M, S/2 29.8 M, B/2 118.4 M, L/2 411.6 M, XL/2 605.7 M.
SIZES: dict[str, DiTSize] = {
    "tiny": {"patch": 4, "width": 128, "depth": 4, "heads": 4},
    "S/2": {"patch": 2, "width": 384, "depth": 12, "heads": 6},
    "B/2": {"patch": 2, "width": 768, "depth": 12, "heads": 12},
    "L/2": {"patch": 2, "width": 1024, "depth": 24, "heads": 16},
    "XL/2": {"patch": 2, "width": 1152, "depth": 28, "heads": 16},
}
