"""The router: p(cluster | noisy latent, time), from DiT's blocks with a CLS token and a linear head.

The published one (Paris, arXiv 2510.03434) is a DiT-B/2 of about 129 M parameters: here, SIZES["B/2"] with per-block
modulation has 129.5 M, with single modulation 89.4 M.
Letters: B batch, C H W latent, N image tokens, D width, K clusters, P pooled vector.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from atoll.nn.dit import (
    MODULATIONS,
    Conditioner,
    DiTBlock,
    ModulationKind,
    check_input,
    compute_dtype,
    initialize_blocks,
    modulate,
    patchify,
    sincos_positions,
    zero,
)
from atoll.nn.sizes import check_sizes
from atoll.storage import bounds


class RouterConfig(BaseModel):
    """The configuration of a router, saved in the card.

    Raises AtollError for sizes that do not fit each other, pydantic.ValidationError for a wrong type or key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["router"] = "router"
    size: tuple[bounds.Side, bounds.Side]  # (H, W) of the latent
    channels: bounds.Channels  # C of the latent
    patch: bounds.Side  # side of a token, in latent pixels
    width: bounds.Width  # D
    depth: bounds.Depth  # number of blocks
    heads: bounds.Width
    mlp_ratio: bounds.MlpRatio = 4.0  # hidden width of a block's MLP over D
    clusters: bounds.Outputs  # K
    pooled_dim: bounds.Width | None = None  # width of the condition's pooled vector; None: not used
    modulation: ModulationKind = "per-block"
    time_scale: bounds.TimeScale = 999.0  # t in [0,1] becomes the 0..999 that the time's sinusoids are made for

    @model_validator(mode="after")
    def _check(self) -> "RouterConfig":
        check_sizes(self.size, self.patch, self.width, self.heads)
        return self


class Router(nn.Module):
    """forward(x [B,C,H,W], t [B] in [0,1], pooled [B,P] or None) -> log p(cluster | x, t, pooled) [B,K].

    The log-probabilities are float32 at least, in whatever dtype the network computes. A router without `pooled_dim`
    ignores the pooled vector.

    Raises:
        AtollError: an input does not fit the configuration.
    """

    positions: Tensor

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        (H, W), p, D, kind = config.size, config.patch, config.width, config.modulation
        self.embed = nn.Linear(p * p * config.channels, D)
        self.register_buffer("positions", sincos_positions(H // p, W // p, D))  # persistent, as in DiT
        # One learnt token in front; the head reads its last state.
        self.cls = nn.Parameter(torch.empty(1, 1, D))
        self.conditioner = Conditioner(D, config.pooled_dim, kind)
        self.blocks = nn.ModuleList(
            DiTBlock(D, config.heads, config.mlp_ratio, kind, cross=False) for _ in range(config.depth)
        )
        self.final_modulation = MODULATIONS[kind](D, 2)
        self.head = nn.Linear(D, config.clusters)
        self.initialize()

    def initialize(self) -> None:
        """Initialise like the DiT. The head is zero, so that all clusters start equally likely."""
        initialize_blocks(self, self.conditioner)
        nn.init.normal_(self.cls, std=0.02)
        zero(self.head)

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        # Embed time, pooled vector and latent, as in DiT.
        config = self.config
        check_input(x, t, config.channels, config.size)
        dtype = compute_dtype(self.embed.weight, x)
        prepared, prepared_final = self.conditioner(t * config.time_scale, pooled, dtype)
        tokens = self.embed(patchify(x.to(dtype), config.patch))  # [B,N,D]
        tokens = tokens + self.positions.to(dtype)  # [B,N,D]
        # Prepend the CLS token, which collects what the head reads.
        tokens = torch.cat([self.cls.to(dtype).expand(len(x), -1, -1), tokens], dim=1)  # [B,1+N,D]
        for block in self.blocks:
            tokens = block(tokens, prepared)  # [B,1+N,D]
        # Classify from the CLS token.
        shift, scale = self.final_modulation(prepared_final, dtype).unbind(1)  # [B,1,D] each
        logits = self.head(modulate(tokens[:, :1], shift, scale)).squeeze(1)  # [B,K]
        # float32 at least: router probabilities weigh velocities.
        return F.log_softmax(logits, dim=1, dtype=torch.promote_types(dtype, torch.float32))  # [B,K]
