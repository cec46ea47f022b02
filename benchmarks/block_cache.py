"""Gain and cost of first-block caching: `python benchmarks/block_cache.py runs/demo --device cpu`.

The same prompts and noise are sampled with every threshold, interleaved batch by batch. "skipped" is the fraction of a
network's evaluations that stopped after the first block; "PSNR" compares the images with those without caching; the
Fréchet distance is to the run's real images, on 48 principal components of the pixels.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import torch

from atoll.condition import move_to
from atoll.evaluate.metrics.frechet import Moments, PixelPCA, frechet_distance
from atoll.evaluate.run import open_run
from atoll.randomness import seeded_noise
from atoll.solver import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--method", default="dpm++2m")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = open_run(arguments.run, arguments.device)
    reference, ensemble = run.reference, run.loaded.ensemble
    rows = run.encoded.rows("train")
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    probe, base = rows[: arguments.images], rows[arguments.images :]
    space = PixelPCA.fit(map(reference.images, base.split(128)), 48)
    real = Moments(space.dim)
    for part in base.split(128):
        real.update(space(reference.images(part)))
    thresholds = [0.0, *arguments.thresholds]
    seconds, skip_rate = dict.fromkeys(thresholds, 0.0), dict.fromkeys(thresholds, 0.0)
    error, drawn = dict.fromkeys(thresholds, 0.0), {threshold: Moments(space.dim) for threshold in thresholds}
    with torch.inference_mode():
        for part in probe.split(arguments.batch):
            conditions = move_to(reference.encoder(reference.captions(part)), arguments.device)
            noise = seeded_noise(part.tolist(), run.loaded.latent_shape).to(arguments.device)
            exact = None
            for threshold in thresholds:
                start = time.perf_counter()
                prompts = ensemble.prompt_cache(conditions, block_cache=threshold)
                velocity = partial(ensemble.velocity, prompt_cache=prompts, guidance_scale=arguments.guidance)
                x0 = sample(velocity, noise, arguments.steps, arguments.method)
                seconds[threshold] += time.perf_counter() - start
                images = reference.codec.decode(x0).cpu()
                exact = images if exact is None else exact
                skip_rate[threshold] += prompts.skip_rate * len(part) / len(probe)
                error[threshold] += float((images - exact).square().mean()) * len(part) / len(probe)
                drawn[threshold].update(space(images))
    print(f"{len(probe)} images, {arguments.steps} steps of {arguments.method}, guidance {arguments.guidance:g}")
    print(f"{'threshold':>9} {'skipped':>7} {'speed':>6} {'PSNR dB':>8} {'FD-pca48':>9}")
    table = []
    for threshold in thresholds:
        psnr = -10 * math.log10(error[threshold]) if error[threshold] else math.inf
        distance, speed = frechet_distance(drawn[threshold], real), seconds[0.0] / seconds[threshold]
        print(f"{threshold:9g} {skip_rate[threshold]:7.2f} {speed:6.2f} {psnr:8.1f} {distance:9.3f}")
        table.append(
            {
                "threshold": threshold,
                "skipped": skip_rate[threshold],
                "speed": speed,
                "psnr": psnr if math.isfinite(psnr) else None,
                "frechet": distance,
            }
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
