"""Which image feature, without a pretrained network, clusters the glyphs best?

    python benchmarks/features.py --subset demo --size 16 -k 4
    python benchmarks/features.py --subset all --size 32 -k 8 16

k-means on L2-normalised features (faiss, as `atoll cluster` does it), mean over seeds, of
  kind     NMI with the Unicode general category: capital, small, digit, other
  script   NMI with the first word of the Unicode name: latin, greek, braille, box, ...
  char     fraction of a character's faces in the character's most frequent cluster
  face     NMI with the face: how far it clusters by style (lower is better)
  largest  largest cluster / mean cluster

How far does bf16 change a network's vectors? |bf16 - fp32| / |fp32| over all of them, on a CPU, unchanged and at unit
length, as for clustering:

    python benchmarks/features.py --bf16 mobilenetv2,weights=$ATOLL_DATA/weights/mobilenetv2_tf_int8.npz \\
        --data "$ATOLL_DATA/eurosat64_*of2.parquet" --size 64
"""

import argparse
import math
import random
import time
import unicodedata
from collections.abc import Callable
from functools import partial

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.convert.arguments import frozen_network
from atoll.data.glyphs import Glyphs
from atoll.data.image import Framing, frame
from atoll.data.sources import build_source
from atoll.data.types import Raw
from atoll.encoders.feature import Hog, build_feature
from atoll.manifest import DataSettings


def ink(images: Tensor) -> Tensor:
    return 1 - images.mean(1, keepdim=True)  # [B,1,H,W]


def pixels(images: Tensor, grid: int | None = None) -> Tensor:
    x = ink(images)
    return (x if grid is None else F.adaptive_avg_pool2d(x, grid)).flatten(1)


def blurred(images: Tensor, sigma: float) -> Tensor:
    r = math.ceil(3 * sigma)
    k = torch.exp(-torch.arange(-r, r + 1).float().square() / (2 * sigma**2))
    k = k / k.sum()
    x = F.pad(ink(images), (r, r, r, r))
    return F.conv2d(F.conv2d(x, k.view(1, 1, 1, -1)), k.view(1, 1, -1, 1)).flatten(1)


def gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    x = F.pad(ink(images), (1, 1, 1, 1), mode="replicate")
    dx, dy = x[..., 1:-1, 2:] - x[..., 1:-1, :-2], x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    return dx, dy


def hog(images: Tensor, bins: int, grid: int, power: float, signed: bool = False) -> Tensor:
    dx, dy = gradients(images)
    strength = (dx.square() + dy.square()).sqrt()
    turns = torch.atan2(dy, dx) / (2 * math.pi) if signed else torch.atan2(dy, dx) / math.pi
    place = turns * bins  # soft assignment to the two nearest bins, circular
    low = place.floor()
    part = place - low
    maps = torch.zeros(len(images), bins, *dx.shape[-2:])
    maps.scatter_add_(1, (low.long() % bins), strength * (1 - part))
    maps.scatter_add_(1, ((low.long() + 1) % bins), strength * part)
    return F.adaptive_avg_pool2d(maps, grid).flatten(1).pow(power)


def centred(feature: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    x = feature(images)
    return x - x.mean(1, keepdim=True)


def joined(a: Callable[[Tensor], Tensor], b: Callable[[Tensor], Tensor], weight: float, images: Tensor) -> Tensor:
    return torch.cat([F.normalize(a(images)), weight * F.normalize(b(images))], 1)


def pca(feature: Callable[[Tensor], Tensor], dim: int, images: Tensor) -> Tensor:
    x = feature(images)
    x = x - x.mean(0)
    _, vectors = torch.linalg.eigh(x.T @ x)
    return x @ vectors[:, -dim:]


def nmi(a: np.ndarray, b: np.ndarray) -> float:
    """Normalised mutual information, by the mean of the entropies."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1)
    joint /= joint.sum()
    pa, pb = joint.sum(1), joint.sum(0)
    entropy = lambda p: -(p[p > 0] * np.log(p[p > 0])).sum()  # noqa: E731
    return float(2 * (entropy(pa) + entropy(pb) - entropy(joint.ravel())) / (entropy(pa) + entropy(pb)))


CANDIDATES: dict[str, Callable[[Tensor], Tensor]] = {
    "atoll.encoders.feature.Hog()": Hog(),
    "pixels": pixels,
    "pixels centred": partial(centred, pixels),
    "pixels 8x8": partial(pixels, grid=8),
    "pixels 4x4": partial(pixels, grid=4),
    "blur 1/16 side": lambda x: blurred(x, x.shape[-1] / 16),
    "blur 1/8 side": lambda x: blurred(x, x.shape[-1] / 8),
    "pca 32 of pixels": partial(pca, pixels, 32),
    "pca 32 of blur 1/16": partial(pca, lambda x: blurred(x, x.shape[-1] / 16), 32),
    "hog 8 bins 4x4": partial(hog, bins=8, grid=4, power=1),
    "hog 8 bins 4x4 sqrt": partial(hog, bins=8, grid=4, power=0.5),
    "hog 8 bins 4x4 signed sqrt": partial(hog, bins=8, grid=4, power=0.5, signed=True),
    "hog 6 bins 4x4 sqrt": partial(hog, bins=6, grid=4, power=0.5),
    "hog 4 bins 4x4 sqrt": partial(hog, bins=4, grid=4, power=0.5),
    "hog 8 bins 2x2 sqrt": partial(hog, bins=8, grid=2, power=0.5),
    "hog 8 bins 8x8 sqrt": partial(hog, bins=8, grid=8, power=0.5),
    "hog 4 bins 8x8 sqrt": partial(hog, bins=4, grid=8, power=0.5),
    "hog 6 bins 8x8 sqrt": partial(hog, bins=6, grid=8, power=0.5),
    "hog 8 bins 8x8 signed sqrt": partial(hog, bins=8, grid=8, power=0.5, signed=True),
    "hog 8 bins 8x8": partial(hog, bins=8, grid=8, power=1),
    "hog 8 bins 8x8 power 0.3": partial(hog, bins=8, grid=8, power=0.3),
    "hog 8 bins 8x8 centred sqrt": partial(centred, partial(hog, bins=8, grid=8, power=0.5)),
    "pca 32 of hog 4x4 sqrt": partial(pca, partial(hog, bins=8, grid=4, power=0.5), 32),
    "hog 4x4 sqrt + pixels 4x4": partial(joined, partial(hog, bins=8, grid=4, power=0.5), partial(pixels, grid=4), 1.0),
    "hog 4x4 sqrt + 0.5 pixels 8x8": partial(
        joined, partial(hog, bins=8, grid=4, power=0.5), partial(pixels, grid=8), 0.5
    ),
}


def load_images(path: str, size: int, count: int) -> Tensor:
    """`count` random images of parquet files, [n,3,size,size] in [0,1]."""
    source = build_source(DataSettings(source="parquet", path=path, size=size))
    raws = (raw for block in source.blocks() for raw in source.read(block) if isinstance(raw, Raw))
    files = [raw.image for raw in raws if isinstance(raw.image, bytes)]
    chosen = random.Random(0).sample(files, min(count, len(files)))
    return torch.from_numpy(np.stack([frame(file, Framing(size, 3, size)) for file in chosen])).float() / 255


def difference(narrow: Tensor, wide: Tensor) -> float:
    """|narrow - wide| / |wide| over all vectors together."""
    return float((narrow - wide).norm() / wide.norm())


def tell_bf16(words: str, images: Tensor) -> None:
    """Print how far bf16 changes the vectors; words: NAME,KEY=VALUE,... of a feature."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        feature = build_feature(frozen_network("bf16", words)).to("cpu", dtype)
        found.append(torch.cat([feature(part) for part in images.split(64)]))
    wide, narrow = found
    print(
        f"{words.split(',')[0]} of {len(images)} images of {images.shape[-1]}x{images.shape[-1]}: bf16 moves the "
        f"vectors by {difference(narrow, wide):.1%}, at unit length by "
        f"{difference(F.normalize(narrow), F.normalize(wide)):.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subset", default="demo", choices=["demo", "all"])
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("-k", type=int, nargs="+", default=[4])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="candidates whose names hold this")
    parser.add_argument("--bf16", default="", metavar="NAME,KEY=VALUE", help="how far bf16 moves this feature, alone")
    parser.add_argument("--data", default="", help="parquet files of images, for --bf16")
    parser.add_argument("--images", type=int, default=256, help="so many of them")
    args = parser.parse_args()
    if args.bf16:
        if not args.data:
            parser.error("--bf16 needs --data: parquet files to take them from")
        tell_bf16(args.bf16, load_images(args.data, args.size, args.images))
        return
    source = Glyphs(args.subset, args.size)
    glyphs = [glyph for block in source.blocks() for glyph in source.read(block)]
    images = torch.from_numpy(np.stack([np.asarray(glyph.image) for glyph in glyphs])).float() / 255  # [N,1,H,W]
    codes = [int(glyph.key.split("/")[0][2:], 16) for glyph in glyphs]
    number = lambda words: np.unique(np.array(words), return_inverse=True)[1]  # noqa: E731
    kind_of = lambda code: {"Lu": "Lu", "Ll": "Ll", "Nd": "Nd"}.get(unicodedata.category(chr(code)), "other")  # noqa: E731
    kind = number([kind_of(code) for code in codes])
    script = number([unicodedata.name(chr(code)).split()[0] for code in codes])
    face = number([glyph.key.split("/")[1] for glyph in glyphs])
    char = number(codes)
    for k in args.k:
        print(f"\n{args.subset} {args.size}x{args.size}, {len(images)} images, K={k}, {args.seeds} seeds")
        print(f"| {'feature':29} | dim | kind | script | char | face | largest | images/s |")
        print(f"|{'-' * 31}|{'---|' * 7}")
        for name, feature in CANDIDATES.items():
            if args.only not in name:
                continue
            start = time.perf_counter()
            x = torch.cat([feature(part) for part in images.split(4096)]) if "pca" not in name else feature(images)
            speed = len(images) / (time.perf_counter() - start)
            x = F.normalize(x).numpy()
            rows = []
            for seed in range(args.seeds):
                means = faiss.Kmeans(x.shape[1], k, niter=50, nredo=4, seed=seed, max_points_per_centroid=10**9)
                means.train(x)
                found = means.index.search(x, 1)[1][:, 0]
                table = np.zeros((char.max() + 1, k))
                np.add.at(table, (char, found), 1)
                sizes = np.bincount(found, minlength=k)
                rows.append(
                    [nmi(kind, found), nmi(script, found), table.max(1).sum() / len(x), nmi(face, found),
                     sizes.max() / sizes.mean()]
                )  # fmt: skip
            a, b, c, d, e = np.mean(rows, 0)
            print(f"| {name:29} | {x.shape[1]} | {a:.3f} | {b:.3f} | {c:.3f} | {d:.3f} | {e:.2f} | {speed:,.0f} |")


if __name__ == "__main__":
    main()
