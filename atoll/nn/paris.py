"""Paris (arXiv 2510.03434), HDDM's predecessor: the networks of its released experts and router.

Read it top to bottom; the sizes are at the end. Letters: B batch, C H W latent, N image tokens, L text tokens,
D width, K clusters, p patch. Parameters have the names of the release, except in attention: its q, k and v are linear
layers here, which int8 quantisation needs.

A block of an expert is PixArt's (AdaLN-Single: one linear layer for all, a table of six vectors per block):

    x = x + gate_1 * self_attention(norm(x) * (1 + scale_1) + shift_1)
    x = x + cross_attention(x, states)                                     of the un-normalised stream, no gate
    x = x + gate_2 * mlp(norm(x) * (1 + scale_2) + shift_2)

The router's is DiT's (adaLN-Zero: a linear layer per block), without cross-attention, over a class token and the image.
Both differ from `atoll.nn.dit` in the eps of their norms, 1e-5. An expert's last modulation adds the time's embedding,
as it is before `t_block`, to its table.

Assumptions, since the release has no code and its weights were not available here: cross-attention has no mask, so it
reads a prompt's padding too; the router reads the experts' time, 0..1000; its class token comes first and has no
position; that token's last state enters the head without another norm; the head's GELUs are tanh like the others. The
public port to AWS Neuron (jimburtoft/neuronx-distributed-inference, contrib/models) does all of this.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.nn.attention import CrossAttention, SelfAttention, TextKV, read_states
from atoll.nn.dit import (
    TIME_FEATURES,
    modulate,
    time_features,
    unpatchify,
    zero,
)
from atoll.nn.inputs import check_input, compute_dtype
from atoll.nn.positions import sincos_positions
from atoll.nn.sizes import check_sizes
from atoll.storage import bounds

EPS = 1e-5  # of every norm


class _Config(BaseModel):
    """The configuration that an expert and the router share, saved in the card.

    Raises AtollError for sizes that do not fit each other, pydantic.ValidationError for a wrong type or key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[bounds.Side, bounds.Side]  # (H, W) of the latent
    channels: bounds.Channels  # C of the latent
    patch: bounds.Side  # side of a token, in latent pixels
    width: bounds.Width  # D
    depth: bounds.Depth  # number of blocks
    heads: bounds.Width
    mlp_ratio: bounds.MlpRatio = 4.0  # hidden width of a block's MLP over D

    @model_validator(mode="after")
    def _check(self) -> "_Config":
        check_sizes(self.size, self.patch, self.width, self.heads)
        return self


class ParisConfig(_Config):
    """The configuration of an expert's network."""

    name: Literal["paris"] = "paris"
    states_dim: bounds.Width  # width of the condition's states


class ParisRouterConfig(_Config):
    """The configuration of the router."""

    name: Literal["paris-router"] = "paris-router"
    clusters: bounds.Outputs  # K
    time_scale: bounds.TimeScale = 1000.0  # t in [0,1] becomes the scheduler's 0..1000


def mlp(width: int, ratio: float) -> nn.Sequential:
    """A block's MLP; [B,N,D] -> [B,N,D]."""
    hidden = round(width * ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))


class ExpertBlock(nn.Module):
    """One block of an expert, see the head of this file."""

    def __init__(self, config: ParisConfig) -> None:
        super().__init__()
        D = config.width
        self.scale_shift_table = nn.Parameter(torch.empty(6, D))
        self.attn = SelfAttention(D, config.heads)
        self.cross_attn = CrossAttention(D, config.heads)
        self.mlp = mlp(D, config.mlp_ratio)

    def forward(self, x: Tensor, prepared: Tensor, states: Tensor | None, keys_values: Tensor | None = None) -> Tensor:
        """Return x [B,N,D] after the block. keys_values [B,L,2D]: those of the states, if already computed."""
        # AdaLN-Single: this block's table plus the shared projection.
        vectors = (self.scale_shift_table + prepared).to(x.dtype).unsqueeze(2)  # [B,6,1,D] from [B,6,D]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors.unbind(1)  # [B,1,D] each
        x = torch.addcmul(x, gate_1, self.attn(modulate(x, shift_1, scale_1, EPS)))  # [B,N,D]
        # Cross-attention to the text, without a norm or gate.
        keys_values = self.cross_attn.kv(states) if keys_values is None else keys_values  # [B,L,2D]
        x = x + self.cross_attn(x, keys_values)  # [B,N,D]
        return torch.addcmul(x, gate_2, self.mlp(modulate(x, shift_2, scale_2, EPS)))  # [B,N,D]


class RouterBlock(nn.Module):
    """One block of the router, see the head of this file."""

    def __init__(self, config: ParisRouterConfig) -> None:
        super().__init__()
        D = config.width
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.attn = SelfAttention(D, config.heads)
        self.mlp = mlp(D, config.mlp_ratio)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        # adaLN-Zero: this block's own projection of the conditioning vector.
        vectors = self.adaLN_modulation(c).unflatten(1, (6, 1, -1)).to(x.dtype)  # [B,6,1,D] from [B,D]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors.unbind(1)  # [B,1,D] each
        x = torch.addcmul(x, gate_1, self.attn(modulate(x, shift_1, scale_1, EPS)))  # [B,1+N,D]
        return torch.addcmul(x, gate_2, self.mlp(modulate(x, shift_2, scale_2, EPS)))  # [B,1+N,D]


class TimeEmbedding(nn.Module):
    """time [B] in 0..1000 -> [B,D]; sinusoids as DiT's, cosines first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(time_features(time).to(dtype))  # [B,D]


class FinalLayer(nn.Module):
    """Tokens [B,N,D] and the time's embedding [B,D] -> [B,N,p*p*C]."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        vectors = (self.scale_shift_table + c[:, None]).to(x.dtype).unsqueeze(2)  # [B,2,1,D]
        shift, scale = vectors.unbind(1)  # [B,1,D] each
        return self.linear(modulate(x, shift, scale, EPS))  # [B,N,p*p*C]


class _Tokens(nn.Module):
    """The layers that an expert and the router share: tokens from the latent, and the time embedding."""

    def __init__(self, config: ParisConfig | ParisRouterConfig) -> None:
        super().__init__()
        (H, W), p, D = config.size, config.patch, config.width
        self.patch_embed = nn.Conv2d(config.channels, D, p, stride=p)
        self.pos_embed = nn.Parameter(torch.empty(1, (H // p) * (W // p), D))
        self.time_embed = TimeEmbedding(D)

    def tokens(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        embedded = self.patch_embed(x.to(dtype)).flatten(2).transpose(1, 2)  # [B,N,D] from [B,C,H,W]
        return embedded + self.pos_embed.to(embedded.dtype)  # [B,N,D]

    def initialize_tokens(self, config: ParisConfig | ParisRouterConfig) -> None:
        """Initialise matrices by Xavier and biases by zero, as in DiT; positions start as fixed sinusoids."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("weight") and parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter.flatten(1))
        # Positions are parameters in the release; they start as DiT's fixed ones.
        rows, columns = (side // config.patch for side in config.size)
        self.pos_embed.data = sincos_positions(rows, columns, config.width)[None].to(self.pos_embed.device)


class Paris(_Tokens):
    """An expert: forward(x [B,C,H,W], time [B], condition) -> the velocity noise - x0 [B,C,H,W], in the dtype of x.

    `time` is the scheduler's 0..1000 (time_scale 1000). The network computes in the dtype of its weights, or in
    autocast's. It ignores the condition's mask and pooled vector.

    Raises:
        AtollError: an input does not fit the configuration.
    """

    def __init__(self, config: ParisConfig) -> None:
        super().__init__(config)
        self.config = config
        D = config.width
        self.text_proj = nn.Linear(config.states_dim, D)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.layers = nn.ModuleList(ExpertBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(D, config.patch**2 * config.channels)
        self.initialize()

    def initialize(self) -> None:
        """Initialise with zero gates, zero cross-attention output and zero network output."""
        # Like DiT, every block starts as the identity.
        self.initialize_tokens(self.config)
        for module in (self.t_block, self.final_layer):
            zero(module)
        for layer in self.layers:
            assert isinstance(layer, ExpertBlock)
            nn.init.zeros_(layer.scale_shift_table)
            zero(layer.cross_attn.out)

    def read_prompt(self, condition: Condition) -> TextKV:
        """Compute the text keys and values, which `forward` accepts in place of the condition."""
        return read_states(self, self._states(condition))

    def _states(self, condition: Condition) -> Tensor:
        return self.text_proj(condition.states.to(compute_dtype(self.text_proj.weight, condition.states)))  # [B,L,D]

    def forward(self, x: Tensor, time: Tensor, condition: Condition | TextKV | None) -> Tensor:
        config = self.config
        check_input(x, time, config.channels, config.size)
        dtype = compute_dtype(self.text_proj.weight, x)
        # Embed time and latent.
        c = self.time_embed(time, dtype)  # [B,D]
        prepared = self.t_block(c).unflatten(1, (6, -1))  # [B,6,D]
        tokens = self.tokens(x, dtype)  # [B,N,D]
        # The blocks, with cached or freshly computed text keys and values.
        if isinstance(condition, TextKV):
            tokens = condition.through(
                self.layers, tokens, lambda layer, x, rows, _, read: layer(x, prepared[rows], None, read)
            )  # [B,N,D]
        else:
            states = self._states(require_condition(condition, len(x), config.states_dim))  # [B,L,D]
            for layer in self.layers:
                tokens = layer(tokens, prepared, states)  # [B,N,D]
        # The final layer, and back to a latent.
        tokens = self.final_layer(tokens, c)  # [B,N,p*p*C]
        return unpatchify(tokens, config.patch, config.size).to(x.dtype)  # [B,C,H,W]


class ParisRouter(_Tokens):
    """forward(x [B,C,H,W], t [B] in [0,1], pooled) -> log p(cluster | x, t) [B,K]; `pooled` is ignored.

    The log-probabilities are float32 at least.

    Raises:
        AtollError: an input does not fit the configuration.
    """

    def __init__(self, config: ParisRouterConfig) -> None:
        super().__init__(config)
        self.config = config
        D = config.width
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.layers = nn.ModuleList(RouterBlock(config) for _ in range(config.depth))
        self.head = nn.Sequential(
            nn.Linear(D, D), nn.GELU("tanh"), nn.LayerNorm(D, EPS), nn.GELU("tanh"), nn.Linear(D, config.clusters)
        )
        self.initialize()

    def initialize(self) -> None:
        """Initialise with zero gates; all clusters start equally likely."""
        self.initialize_tokens(self.config)
        nn.init.normal_(self.cls_token, std=0.02)
        for layer in self.layers:
            assert isinstance(layer, RouterBlock)
            zero(layer.adaLN_modulation)
        zero(self.head[4])

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        config = self.config
        check_input(x, t, config.channels, config.size)
        # Embed time and latent, and prepend the class token.
        dtype = compute_dtype(self.patch_embed.weight, x)
        c = self.time_embed(t * config.time_scale, dtype)  # [B,D]
        tokens = self.tokens(x, dtype)  # [B,N,D]
        tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(len(x), -1, -1), tokens], dim=1)  # [B,1+N,D]
        for layer in self.layers:
            tokens = layer(tokens, c)  # [B,1+N,D]
        # Classify from the class token.
        logits = self.head(tokens[:, 0])  # [B,K]
        return F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))  # [B,K]


def require_condition(condition: Condition | None, rows: int, states_dim: int) -> Condition:
    """Return the condition. Raise AtollError unless it has `rows` rows and states as wide as `states_dim`."""
    # One row per sample.
    if condition is None or len(condition) != rows:
        got = "none" if condition is None else f"{len(condition)} rows"
        raise AtollError(f"condition: got {got}, expected {rows} rows; no prompt is encoder.null({rows})")
    # States of the width that the network was trained with.
    if condition.states.shape[2] != states_dim:
        raise AtollError(
            f"condition states: got {condition.states.shape[2]} wide, expected {states_dim}; "
            "use the encoder that the network was trained with"
        )
    return condition


# The release uses the sizes of `atoll.nn.dit`: ParisConfig(**LATENT, **SIZES["XL/2"], states_dim=768) has 606.0 M
# parameters, ParisRouterConfig(**LATENT, **SIZES["B/2"], clusters=8) 129.1 M: as published.
LATENT = {"size": (32, 32), "channels": 4}
