"""The published DiT (arXiv 2212.09748), written from the paper in plain torch, at a size that a CPU can train.

Its `state_dict` has the names and shapes of facebookresearch/DiT's checkpoints; it shares no code with Atoll's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 32, 4, 96, 4, 4, 10


def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B,N,D], shift and scale [B,D] -> [B,N,D]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # [B,h,N,d] each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # [B,N,D]


class ClassBlock(nn.Module):
    """adaLN-Zero: shifts, scales and gates from the vector of label and time (DiT, section 3.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.attn = Attention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=1)  # [B,D] each
        x = x + gate_1[:, None] * self.attn(norm(x, shift_1, scale_1))  # [B,N,D]
        hidden = F.gelu(self.mlp["fc1"](norm(x, shift_2, scale_2)), approximate="tanh")  # [B,N,4D]
        return x + gate_2[:, None] * self.mlp["fc2"](hidden)  # [B,N,D]


def frequencies(count: int) -> Tensor:
    return torch.exp(-math.log(10000) * torch.arange(count) / count)  # [count]


def positions(side: int) -> Tensor:
    """Fixed sinusoids [1,side*side,D] of column and row."""
    place = torch.arange(side).float()[:, None] * frequencies(WIDTH // 4)  # [side,D/4]
    waves = torch.cat([place.sin(), place.cos()], dim=1)  # [side,D/2]
    both = [waves.expand(side, -1, -1), waves[:, None].expand(-1, side, -1)]  # of the column, of the row
    return torch.cat(both, dim=2).reshape(1, side * side, WIDTH)


class ClassDiT(nn.Module):
    """The published DiT (arXiv 2212.09748) with its `state_dict`'s names and shapes; it predicts eps only.

    forward(x [B,3,H,W], time [B], label [B]) -> eps; the label CLASSES is the null class.
    """

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.pos_embed = nn.Parameter(positions(SIDE // PATCH), requires_grad=False)
        time_mlp = nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.t_embedder = nn.ModuleDict({"mlp": time_mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(CLASSES + 1, WIDTH)})
        self.blocks = nn.ModuleList(ClassBlock() for _ in range(DEPTH))
        last = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        self.final_layer = nn.ModuleDict({"adaLN_modulation": last, "linear": nn.Linear(WIDTH, PATCH * PATCH * 3)})
        self.initialize()

    def initialize(self) -> None:
        """Xavier; N(0, 0.02) for the embeddings of time and label; zero for all modulation and the last layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in [*self.t_embedder.modules(), *self.y_embedder.modules()]:
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        angles = time[:, None] * frequencies(128)  # [B,128]
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=1))  # [B,D]
        c = c + self.y_embedder["embedding_table"](label)  # [B,D]
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed  # [B,N,D]
        for block in self.blocks:
            tokens = block(tokens, c)  # [B,N,D]
        tokens = norm(tokens, *self.final_layer["adaLN_modulation"](c).chunk(2, dim=1))  # [B,N,D]
        tokens = self.final_layer["linear"](tokens)  # [B,N,p*p*C]
        side = SIDE // PATCH
        patches = tokens.unflatten(2, (PATCH, PATCH, 3)).unflatten(1, (side, side))  # [B,H/p,W/p,p,p,C]
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)  # [B,C,H,W]
