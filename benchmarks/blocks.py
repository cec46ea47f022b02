"""What each part of the MMDiT's block does: the study of the two networks, with one part of the block replaced.

    ATOLL_DATA=... python benchmarks/blocks.py blocks-eurosat [--out studies/blocks-eurosat] [--parts qk-norm rope ...]

Trains the study's runs first, as `atoll study` does. Then every part is replaced by what `dit` has in its place, at the
same FLOPs, and the run `mmdit` is trained and evaluated again, below OUT/without-PART. Finished work is skipped.
Prints and writes to OUT/parts.json one line per network: the metrics, and their differences to the whole block.

- qk-norm: queries and keys are not normalised.
- rope: no rotation; sinusoidal positions are added to the tokens once.
- gated: a GELU between two layers in place of the gated MLP.
- bias-free: every linear layer of a block has a bias.
- joint: image tokens attend to each other, then to the text in an attention of its own.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll import nn as networks
from atoll.manifest import load_manifest
from atoll.nn import joint_blocks, mmdit
from atoll.nn.attention import head_attention
from atoll.nn.dit import modulate
from atoll.nn.positions import TokenGrid, sincos_positions
from atoll.storage.artifact import write_json
from atoll.storage.layout import RunLayout
from atoll.study import load_study, run_study
from atoll.study import run as study_run
from atoll.study.table import collect
from atoll.train.expert import train_expert

METRICS = ("denoising", "FD-")  # by the beginnings of their names


def only_rotated(x: Tensor, rope: Tensor | None = None) -> Tensor:
    """`normed_heads` without the norm: [B,N,h,d] -> [B,h,N,d]."""
    y = x.transpose(1, 2).contiguous()  # [B,h,N,d]
    if rope is None:
        return y
    (a, b), (cos, sin) = y.unflatten(-1, (-1, 2)).unbind(-1), rope.to(y.dtype).unbind(-1)  # [B,h,N,d/2] each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)  # [B,h,N,d]


class PositionedEmbed(nn.Linear):
    """The embedding of patches, with fixed positions added, as in `dit`; of a square grid."""

    def forward(self, patches: Tensor) -> Tensor:
        side = round(patches.shape[1] ** 0.5)
        return super().forward(patches) + sincos_positions(side, side, self.out_features).to(patches.dtype)  # [B,N,D]


class UnrotatedMMDiT(mmdit.MMDiT):
    """The network with positions added to its tokens, and no rotation."""

    def __init__(self, config: mmdit.MMDiTConfig) -> None:
        super().__init__(config)
        assert isinstance(self.embed, nn.Linear)
        embed = PositionedEmbed(self.embed.in_features, self.embed.out_features, bias=False)
        embed.load_state_dict(self.embed.state_dict())  # the weights that were drawn
        self.embed = embed

    def _rope(self, x: Tensor, grid: TokenGrid, positions: Tensor | None) -> Tensor:
        return super()._rope(x, grid, positions) * 0 + torch.tensor([1.0, 0.0])  # cosine 1, sine 0: no rotation


class GELUMLP(nn.Module):
    """down(gelu(up(x))) of the gated MLP's FLOPs: a hidden width of 3/2; [B,N,D] -> [B,N,D]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = joint_blocks.linear(width, 3 * hidden // 2), joint_blocks.linear(3 * hidden // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class CrossBlock(joint_blocks.MMDiTBlock):
    """A block with an attention to the text of its own; the MLP's ratio pays for its two projections."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__(width, heads, hidden - round(2 * width / 3))
        self.q_text = joint_blocks.linear(width, width)
        self.out_text = joint_blocks.linear(width, width)

    def _forward(
        self,
        x: Tensor,
        prepared: Tensor,
        rope: Tensor,
        text: Tensor | None,
        bias: Tensor | None,
        keys_values: Tensor | None,
    ) -> Tensor:
        # The image alone.
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.vectors(prepared, x.dtype)  # [B,1,D] each
        q, k, v = self.project(x, shift_1, scale_1, rope)  # [B,h,N,d] each
        x = torch.addcmul(x, gate_1, self.out(head_attention(q, k, v, None)))  # [B,N,D]
        # The text: the padding of the image tokens in the bias is not needed.
        read = self.read(text) if keys_values is None else keys_values  # [B,L,2D]
        k, v = read.unflatten(2, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)  # [B,h,L,d]
        q = joint_blocks.normed_heads(self.q_text(x).unflatten(2, (self.heads, -1)))  # [B,h,N,d]
        own = None if bias is None else bias[..., : read.shape[1]]
        x = x + self.out_text(head_attention(q, k, v, own))  # [B,N,D]
        return torch.addcmul(x, gate_2, self.mlp(modulate(x, shift_2, scale_2)))  # [B,N,D]


# What replaces a part: (the module, the name in it, the replacement).
PARTS: dict[str, tuple[object, str, object]] = {
    "qk-norm": (joint_blocks, "normed_heads", only_rotated),
    "rope": (networks, "MMDiT", UnrotatedMMDiT),
    "gated": (joint_blocks, "GatedMLP", GELUMLP),
    "bias-free": (joint_blocks, "linear", nn.Linear),
    "joint": (mmdit, "MMDiTBlock", CrossBlock),
}


@contextmanager
def without(part: str) -> Iterator[None]:
    """Replace a part of the block while networks are built, trained and evaluated."""
    module, name, replacement = PARTS[part]
    with patch.object(module, name, replacement):
        yield


def train_here(run: Path, *, jobs: int | None, only: object) -> bool:
    """`launch_run` in this process, where the part is replaced; the one expert alone, as no router is needed."""
    manifest = load_manifest(run)
    for expert in manifest.experts:
        if not RunLayout(run).expert(expert.full_name).is_dir():
            train_expert(run, manifest, expert.full_name, resume=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="*", type=int)
    options = parser.parse_args()
    study = load_study(options.study)
    out, seeds = options.out or Path("studies") / study.name, tuple(options.seeds or study.seeds)
    rows: dict[str, dict[str, dict[int, float]]] = {}
    log: Callable[[str], None] = lambda line: print(line, flush=True)  # noqa: E731

    # The whole networks, then the block without each part; the images are encoded once.
    with patch.object(study_run, "launch_run", train_here):
        run_study(study, out, seeds, log=log)
        rows |= {row.run: row.values for row in collect(study, out, seeds)}
        for part in options.parts:
            place = out / f"without-{part}"
            place.mkdir(exist_ok=True)
            for shared in ("encoded", "evaluation"):
                if not (place / shared).is_symlink():
                    (place / shared).symlink_to(Path("..") / shared)
            alone = study.model_copy(update={"runs": {"mmdit": study.runs["mmdit"]}, "baseline": None})
            with without(part):
                run_study(alone, place, seeds, log=log)
            rows[f"without {part}"] = collect(alone, place, seeds)[0].values
            write_json(out / "parts.json", rows)

    # Differences are paired by seed.
    whole = rows["mmdit"]
    for metric in [name for name in whole if name.startswith(METRICS)]:
        print(f"\n{metric}: mean; difference to mmdit, by seed")
        for name, values in rows.items():
            gaps = " ".join(f"{values[metric][seed] - whole[metric][seed]:+.4f}" for seed in seeds)
            print(f"  {name:20} {statistics.mean(values[metric][seed] for seed in seeds):.4f}  {gaps}")
    print(json.dumps({"seeds": seeds, "out": str(out)}))


if __name__ == "__main__":
    main()
