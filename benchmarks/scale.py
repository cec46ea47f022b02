"""Bytes, machines, hours and cost of encoding and clustering, by formula: the table of docs/scale.md.

    python benchmarks/scale.py                       # 11 M (HDDM) and 158 M (DDM) images at 256 pixels

FLOPs of the frozen networks are counted on the real classes, on the meta device. How many images a core decodes is
measured here, on JPEGs of --side pixels. Everything else is arithmetic on the arguments, which the table repeats.
"""

import argparse
import io
import math
import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from atoll.data.image import Framing, frame
from atoll.plan.gpus import find_gpu


def forward_flops(size: int) -> dict[str, float]:
    """FLOPs of one image through sd-vae-ft-mse's encoder at size x size, and through DINOv2-large at 224 x 224."""
    from diffusers import AutoencoderKL
    from transformers import Dinov2Config, Dinov2Model

    kinds = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    with torch.device("meta"), torch.inference_mode():
        vae: Any = AutoencoderKL(
            down_block_types=kinds[0], up_block_types=kinds[1], block_out_channels=(128, 256, 512, 512),
            layers_per_block=2, latent_channels=4, sample_size=256,
        )  # fmt: skip
        large: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        large |= {"image_size": 224, "patch_size": 14, "attn_implementation": "eager"}
        dino: Any = Dinov2Model(Dinov2Config(**large))
        flops = {}
        for name, call, side in (("vae", vae.encode, size), ("dino", dino, 224)):
            with FlopCounterMode(display=False) as counter:
                call(torch.empty(1, 3, side, side))
            flops[name] = float(counter.get_total_flops())
    return flops


def decode_rate(side: int, size: int, seconds: float = 3.0) -> float:
    """Images/s that one core of this machine decodes, crops and resizes, from JPEGs with as much detail as photos."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
    data = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    framing, done, start = Framing(size, 3, 1), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        frame(data.getvalue(), framing)
        done += 1
    return done / (time.perf_counter() - start)


def table(images: float, o: argparse.Namespace, flops: dict[str, float], per_core: float) -> list[str]:
    gpu = find_gpu(o.gpu)
    assert gpu.tflops is not None
    assert gpu.usd_hour is not None
    latent, feature, text = 4 * (o.size // 8) ** 2 * 2, 1024 * 4, o.text_bytes
    encoded, trained = latent + feature + text, latent + text
    rate = gpu.tflops * 1e12 * o.mfu / sum(flops.values())
    hours = images / rate / 3600
    cores, usd = math.ceil(rate / per_core), hours * gpu.usd_hour
    fit = 2 * 256 * 1024 * 1024 * 1024 * 25 / (o.cpu_gflops * 1e9)
    assign = max(images * 2 * 1024 * 1024 / (o.cpu_gflops * 1e9), images * encoded / (o.disk * 1e6))
    return [
        f"| raw images, read once | {images * o.image_kb * 1e3 / 1e12:.2f} TB |",
        f"| `encoded/` | {images * encoded / 1e9:,.0f} GB in {images / 4096:,.0f} shards |",
        f"| `clusters/`, all {o.clusters} | {images * trained / 1e9:,.0f} GB |",
        f"| what one island downloads | {images * trained / o.clusters / 1e9:,.1f} GB |",
        f"| `clusters/router/` at a tenth | {images * trained / 10 / 1e9:,.1f} GB |",
        f"| encode: one {gpu.name.upper()} and {cores} cores that decode | {hours:,.0f} h, {usd:,.0f} USD |",
        f"| encode: eight of them (`--on ray`) | {hours / 8:,.0f} h |",
        f"| fine k-means on 262,144 of them, {o.cpu_gflops:g} GFLOP/s | {fit / 60:.0f} min |",
        f"| assignment and writing, disk {o.disk:g} MB/s | {assign / 3600:.1f} h |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=float, nargs="*", default=[11e6, 158e6])
    parser.add_argument("--size", type=int, default=256, help="pixels of what is encoded")
    parser.add_argument("--side", type=int, default=512, help="pixels of the JPEGs that are read")
    parser.add_argument("--image-kb", type=float, default=60, help="of such a JPEG")
    parser.add_argument("--text-bytes", type=float, default=120, help="caption and key of an image")
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--gpu", default="a100")
    parser.add_argument("--mfu", type=float, default=0.3, help="fraction of the GPU's bf16 speed that encoding reaches")
    parser.add_argument("--cpu-gflops", type=float, default=150, help="float32 matrix products of the machine")
    parser.add_argument("--disk", type=float, default=500, help="MB/s")
    o = parser.parse_args()
    flops, per_core = forward_flops(o.size), decode_rate(o.side, o.size)
    print(f"VAE encoder {flops['vae'] / 1e9:.0f} GFLOP, DINOv2-L {flops['dino'] / 1e9:.0f} GFLOP an image;")
    print(f"one core here decodes {per_core:.0f} JPEGs of {o.side} pixels a second\n")
    columns = [table(images, o, flops, per_core) for images in o.images]
    print("| | " + " | ".join(f"{images / 1e6:g} M" for images in o.images) + " |")
    print("|---|" + "---|" * len(columns))
    for lines in zip(*columns, strict=True):
        cells = [line.strip("| ").split(" | ") for line in lines]
        print(f"| {cells[0][0]} | " + " | ".join(cell[1] for cell in cells) + " |")


if __name__ == "__main__":
    main()
