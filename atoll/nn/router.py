"""The router: p(cluster | noisy latent, time), from DiT's or MMDiT's blocks with a CLS token and a linear head.

The published one (Paris, arXiv 2510.03434) is a DiT-B/2 of about 129 M parameters: here, SIZES["B/2"] with per-block
modulation has 129.5 M, with single modulation 89.4 M.
Letters: B batch, C H W latent, N image tokens, D width, K clusters, P pooled vector, F frozen features, M nodes.

A router grows with its clusters: each step adds one cluster by one logit z, and the old weights stay as they are.

    new cluster:  log p(new) = log sigmoid(z),           log p(old k) + log sigmoid(-z) for every old k
    split of p:   log p(K) = log p(p) + log sigmoid(z),  log p(p) + log sigmoid(-z) for what remains in p

The old clusters' probabilities keep their ratios in the first case; in the second, all others keep their values and the
two parts sum to their parent's.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from atoll.choices import hidden_width
from atoll.errors import AtollError
from atoll.nn.dit import (
    MODULATIONS,
    Conditioner,
    DiTBlock,
    ModulationKind,
    initialize_blocks,
    modulate,
    patchify,
    zero,
)
from atoll.nn.inputs import compute_dtype
from atoll.nn.joint_blocks import MMDiTBlock
from atoll.nn.positions import TokenGrid, positions_of, sincos_table, token_grid
from atoll.nn.rotary import rotations
from atoll.nn.sizes import check_head_width, check_sizes
from atoll.storage import bounds

GROWN_NODES = 5  # noise levels at which the weights of a grown logit are stored: t = 0, 0.25, ... 1


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
    clusters: bounds.Outputs  # K, the grown ones included
    pooled_dim: bounds.Width | None = None  # width of the condition's pooled vector; None: not used
    modulation: ModulationKind = "per-block"
    block: Literal["dit", "mmdit"] = "dit"  # whose blocks
    time_scale: bounds.TimeScale = 999.0  # t in [0,1] becomes the 0..999 that the time's sinusoids are made for
    grown: bounds.GrowthSteps = ()  # the cluster that was split, None for a new one; one logit each

    @model_validator(mode="after")
    def _check(self) -> "RouterConfig":
        check_sizes(self.size, self.patch, self.width, self.heads)
        if self.block == "mmdit":
            check_head_width(self.width, self.heads)
        # The head has at least one output, and a cluster exists before it is split.
        first = self.clusters - len(self.grown)
        if first < 1 or any(p is not None and p >= first + step for step, p in enumerate(self.grown)):
            raise AtollError(f"grown {list(self.grown)}: expected steps from at least one cluster to {self.clusters}")
        return self


def grow(log_p: Tensor, logit: Tensor, parent: int | None) -> Tensor:
    """Add a cluster to log-probabilities; see the head of this file.

    Args:
        log_p: log-probabilities [B,K].
        logit: of the new cluster [B]: against all old ones, or against the rest of its parent.
        parent: the cluster that is split; None for a new cluster.

    Returns:
        Log-probabilities [B,K+1].
    """
    # log sigmoid is finite for any finite logit, so no probability underflows to log 0.
    new, rest = F.logsigmoid(logit)[:, None], F.logsigmoid(-logit)[:, None]  # [B,1] each
    if parent is None:
        return torch.cat([log_p + rest, new], dim=1)
    # The columns of the other clusters are copied, bit for bit.
    part = log_p[:, parent : parent + 1]
    return torch.cat([log_p[:, :parent], part + rest, log_p[:, parent + 1 :], part + new], dim=1)


class GrownLogit(nn.Module):
    """The logit of one step of growth: linear in frozen features, with weights interpolated between noise levels.

    forward(features [B,F], t [B]) -> z [B]. Linear in its parameters, so fitting it to clusters is a convex problem.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(GROWN_NODES, features))
        self.bias = nn.Parameter(torch.zeros(GROWN_NODES))

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        # Hat functions at equal steps of t: two neighbouring nodes share each time.
        position = t.to(features).clamp(0, 1)[:, None] * (GROWN_NODES - 1)  # [B,1]
        hats = (1 - (position - torch.arange(GROWN_NODES).to(position)).abs()).clamp(min=0)  # [B,M]
        scores = F.linear(features, self.weight.to(features), self.bias.to(features))  # [B,M]
        return (hats * scores).sum(1)  # [B]


class Router(nn.Module):
    """forward(x [B,C,H,W], t [B] in [0,1], pooled [B,P] or None) -> log p(cluster | x, t, pooled) [B,K].

    The log-probabilities are float32 at least, in whatever dtype the network computes. A router without `pooled_dim`
    ignores the pooled vector.

    Raises:
        AtollError: an input does not fit the configuration.
    """

    positions: Tensor | None

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        p, D, kind = config.patch, config.width, config.modulation
        self.embed = nn.Linear(p * p * config.channels, D)
        # Persistent, as in DiT. MMDiT's blocks rotate instead.
        self._table = sincos_table(config.size, None, p, D)
        self.register_buffer("positions", self._table.own() if config.block == "dit" else None)
        # One learnt token in front; the head reads its last state.
        self.cls = nn.Parameter(torch.empty(1, 1, D))
        self.conditioner = Conditioner(D, config.pooled_dim, kind)
        self.blocks = nn.ModuleList(self._block() for _ in range(config.depth))
        self.final_modulation = MODULATIONS[kind](D, 2)
        self.head = nn.Linear(D, config.clusters - len(config.grown))
        self.grown = nn.ModuleList(GrownLogit(5 * D + (config.pooled_dim or 0)) for _ in config.grown)
        self.initialize()

    def _block(self) -> nn.Module:
        config = self.config
        if config.block == "dit":
            return DiTBlock(config.width, config.heads, config.mlp_ratio, config.modulation, cross=False)
        hidden = hidden_width(config.width, config.mlp_ratio)
        return MMDiTBlock(config.width, config.heads, hidden, config.modulation, text=False)

    def initialize(self) -> None:
        """Initialise like the DiT. The head is zero, so that all clusters start equally likely."""
        initialize_blocks(self, self.conditioner)
        nn.init.normal_(self.cls, std=0.02)
        zero(self.head)

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        log_p, states = self._founding(x, t, pooled)
        if not self.grown:
            return log_p
        # One cluster more at each step, from the same features.
        features = self._features(states, pooled)  # [B,F]
        for parent, logit in zip(self.config.grown, self.grown, strict=True):
            log_p = grow(log_p, logit(features, t), parent)  # [B,K]
        return log_p

    def features(self, x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Return what the logits of growth read, [B,F]; arguments as in `forward`."""
        return self._features(self._founding(x, t, pooled)[1], pooled)

    def _founding(self, x: Tensor, t: Tensor, pooled: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities of the clusters that the head knows, and the states behind them [B,1+N,D] or [B,1,D]."""
        # Embed time, pooled vector and latent, as in DiT.
        config = self.config
        grid = token_grid(x, t, config.channels, config.patch)
        dtype = compute_dtype(self.embed.weight, x)
        prepared, prepared_final = self.conditioner(t * config.time_scale, pooled, dtype)
        tokens = self.embed(patchify(x.to(dtype), config.patch))  # [B,N,D]
        if self.positions is not None:
            tokens = tokens + self._table.at(grid, self.positions).to(dtype)  # [B,N,D]
        rope = self._rope(x, grid)
        # Prepend the CLS token, which collects what the head reads.
        tokens = torch.cat([self.cls.to(dtype).expand(len(x), -1, -1), tokens], dim=1)  # [B,1+N,D]
        states = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, prepared, *rope)  # [B,1+N,D]
            # The middle block has seen the latent, and has not yet dropped what the old clusters do not need.
            if number in (max(1, config.depth // 2), config.depth):
                states.append(tokens)
        # Classify from the CLS token.
        shift, scale = self.final_modulation(prepared_final, dtype).unbind(1)  # [B,1,D] each
        final = modulate(tokens[:, :1], shift, scale)  # [B,1,D]
        logits = self.head(final).squeeze(1)  # [B,K]
        # float32 at least: router probabilities weigh velocities.
        log_p = F.log_softmax(logits, dim=1, dtype=torch.promote_types(dtype, torch.float32))  # [B,K]
        return log_p, [states[0], states[-1], final]

    def _rope(self, x: Tensor, grid: TokenGrid) -> tuple[Tensor, ...]:
        """The rotations that MMDiT's blocks read, [1,1,1+N,d/2,2]; none for DiT's. CLS is not rotated."""
        config = self.config
        if config.block == "dit":
            return ()
        base = (config.size[0] // config.patch, config.size[1] // config.patch)
        places = positions_of(grid, base, x.device)  # [N,2]
        positions = F.pad(places, (0, 0, 1, 0)).to(torch.promote_types(x.dtype, torch.float32))  # [1+N,2]
        return (rotations(positions, config.width // config.heads),)

    def _features(self, states: list[Tensor], pooled: Tensor | None) -> Tensor:
        """CLS and mean token of two blocks, the head's input, and the pooled vector: [B,F], float32 at least."""
        middle, last, final = (state.to(torch.promote_types(state.dtype, torch.float32)) for state in states)
        vectors = [middle[:, 0], middle[:, 1:].mean(1), last[:, 0], last[:, 1:].mean(1), final[:, 0]]  # [B,D] each
        # Normalised: the residual stream has no scale of its own.
        normalised = [F.layer_norm(vector, vector.shape[-1:]) for vector in vectors]
        if pooled is not None and self.config.pooled_dim:
            normalised.append(pooled.to(normalised[0]))  # [B,P]
        return torch.cat(normalised, dim=1)  # [B,F]
