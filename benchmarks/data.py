"""Encoding against a plain loop, and reading shards: `python benchmarks/data.py encode|read [--json out.json]`.

encode: images through a latent codec and a feature network, by `atoll encode`'s own code and by a plain loop: one image
at a time, decoded and encoded in one process, in float32, with torch's threads. Interleaved.
read: random batches of latents and captions from memory-mapped shards, in one process, page cache warm.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from atoll.data.encode import encode_run
from atoll.encoders.codec import build_codec
from atoll.encoders.feature import build_feature
from atoll.manifest import Manifest, parse_manifest
from atoll.storage.shards import Shards, ShardWriter

# The maximum that a DiT-XL/2 consumes on an H200, in latents per second: training at the matmul ceiling measured there.
XL2_NEEDS = 900


def manifest(options: argparse.Namespace) -> Manifest:
    networks = {
        "codec": {"name": options.codec, **({"weights": str(options.weights)} if options.codec != "pixels" else {})},
        "feature": {"name": "mobilenetv2", "weights": str(options.weights / "mobilenetv2_tf_int8.npz")},
    }
    text = {
        "name": "benchmark",
        "data": {"source": "parquet", "path": str(options.images), "size": options.size, "duplicates": "keep"},
        **networks,
        "experts": [{"cluster": 0, "objective": {"prediction": "flow", "schedule": "linear"}}],
    }
    return parse_manifest(json.dumps(text), "benchmark")


def encode(options: argparse.Namespace) -> dict[str, Any]:
    """Images/s of both, their ratio, and the peak memory of this process and its children while Atoll encodes."""
    table = pq.read_table(options.images).slice(0, options.rows)
    with tempfile.TemporaryDirectory() as scratch:
        options.images = Path(scratch) / "images.parquet"
        pq.write_table(table, options.images)
        settings = manifest(options)
        column = next(n for n in table.column_names if n.startswith("image"))
        images = table[column].to_pylist()
        rates: dict[str, list[float]] = {"plain": [], "batched": [], "atoll": []}
        peaks = []
        for turn in range(options.turns):
            for name, batch in (("plain", 1), ("batched", 32)):
                start = time.perf_counter()
                plain_loop(images, settings, batch)
                rates[name].append(len(images) / (time.perf_counter() - start))
            with peak_memory() as peak:
                start = time.perf_counter()
                encode_run(Path(scratch) / f"run-{turn}", settings)
                rates["atoll"].append(len(images) / (time.perf_counter() - start))
            peaks.append(peak[0])
    ratios = {name: [a / p for a, p in zip(rates["atoll"], rates[name], strict=True)] for name in ("plain", "batched")}
    return {
        "images": len(images),
        "images_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "atoll_over_plain": statistics.median(ratios["plain"]),
        "atoll_over_batched": statistics.median(ratios["batched"]),
        "peak_gb": max(peaks) / 2**30,
    }


@torch.inference_mode()
def plain_loop(files: list[bytes], settings: Manifest, batch: int) -> None:
    """The plain loop; its result goes to one file at the end."""
    codec, feature = build_codec(settings.codec), build_feature(settings.feature)
    size, latents, features = settings.data.size, [], []
    for start in range(0, len(files), batch):
        images = []
        for data in files[start : start + batch]:
            image = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
        x = torch.stack(images)
        latents.append(codec.encode(x).half())
        features.append(feature(x))
    with tempfile.TemporaryFile() as file:
        torch.save({"latent": torch.cat(latents), "feature": torch.cat(features)}, file)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """[bytes]: the largest proportional set size of this process and its children, sampled ten times per second."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            peak[0] = max(peak[0], sum(_pss(pid) for pid in _family(os.getpid())))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _family(pid: int) -> list[int]:
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return [pid, *(p for child in children for p in _family(child))]


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def read(options: argparse.Namespace) -> dict[str, Any]:
    """Latents/s of random batches with their captions, and the ratio to what DiT-XL/2 needs."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "shards"
        latents = torch.randn(4096, 4, 32, 32).half()
        with ShardWriter(directory, {}) as writer:
            for start in range(0, options.rows, 4096):
                count = min(4096, options.rows - start)
                keys = [f"{start + i:09d}" for i in range(count)]
                writer.append(
                    keys,
                    [f"a caption of image {key}" for key in keys],
                    ["train"] * count,
                    {"latent": latents[:count]},
                )
        shards, generator = Shards(directory), torch.Generator().manual_seed(0)
        shards.read("latent", torch.arange(len(shards)))  # into the page cache
        shards.captions_of(torch.arange(1))

        def batch() -> None:
            rows = torch.randint(len(shards), (256,), generator=generator)
            shards.read("latent", rows)
            shards.captions_of(rows)

        rate = 256 / seconds(batch, options.turns)
    return {"rows": options.rows, "latents_per_s": rate, "over_xl2_need": rate / XL2_NEEDS}


def seconds(work: Callable[[], None], turns: int, calls: int = 50) -> float:
    """The median over turns of the mean time of a call."""
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["encode", "read"])
    parser.add_argument("--images", type=Path, help="a parquet file of images (encode)")
    parser.add_argument("--weights", type=Path, help="the directory of taef2_encoder.pth and mobilenetv2_tf_int8.npz")
    parser.add_argument("--codec", default="taef2")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.rows = options.rows or {"encode": 384, "read": 100_000}[options.what]
    result = {"encode": encode, "read": read}[options.what](options)
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
