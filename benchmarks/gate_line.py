"""Where the gate's line lies: how far a change of one expert moves the fused images.

    python benchmarks/gate_line.py runs/demo --more runs/other/experts --out gate

Run `benchmarks/gate.py` with the same `--out` first: its experts and its probe are used. One expert of the run's
ensemble is exchanged at a time; 16 captions of its cluster are sampled with the same noise. The distance is the root
mean square over pixels. An honest expert with half of the training is compared with the finished one of its recipe.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from gate import Gate
from torch import Tensor

from atoll.condition import Condition
from atoll.ensemble import Ensemble
from atoll.ensemble.loading import load_ensemble, load_expert
from atoll.manifest import load_manifest
from atoll.randomness import cpu_generator
from atoll.solver import sample
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard
from atoll.storage.layout import CARD, ENSEMBLE, EXPERTS

STEPS, SCALE, IMAGES = 15, 2.0, 16
# Kinds near the line; all others move the images further.
NEAR = (
    *("weights_x_1.02", "weights_x_1.05", "weights_x_1.1", "weights_x_1.2", "noise_1_pc", "noise_2_pc", "noise_5_pc"),
    *("noise_10_pc", "noise_20_pc", "random_block_2", "another_cluster", "captions_ignored_own_curve"),
    *("wrong_above_0.9_own_curve", "wrong_for_a_tenth_of_captions", "captions_exchanged_own_curve"),
)


def images(ensemble: Ensemble, condition: Condition, shape: tuple[int, ...]) -> Tensor:
    """Sample a fused image for each caption."""
    noise = torch.randn(len(condition), *shape, generator=cpu_generator(0))
    with torch.inference_mode():
        return sample(partial(ensemble.velocity, condition=(condition,), guidance_scale=SCALE), noise, STEPS)


def variants(run: Path, more: Path, out: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield (kind, what it is compared with, the variant)."""
    for base in sorted(path.parent for path in (run / EXPERTS).glob(f"*/{CARD}")):
        yield "weights in bf16", base, out / "bf16" / base.name
        for path in sorted(path.parent for path in (out / "poison" / base.name).glob(f"*/{CARD}")):
            if path.name in NEAR:
                yield path.name.replace("_", " "), base, path
    for half in sorted(path.parent for path in more.glob(f"*-half/{CARD}")):
        finished = half.with_name(half.name.removesuffix("-half"))
        if (finished / CARD).is_file():
            yield "half of the training", finished, half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--more", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("gate"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    gate = Gate(args.run, args.out / "probe")
    loaded = load_ensemble(args.run / ENSEMBLE, trust=load_manifest(args.run).trust_in_cards(args.run))
    base, shape = loaded.ensemble, loaded.latent_shape

    def with_expert(path: Path, cluster: int) -> Tensor:
        rows = gate.reference(cluster).probe.rows((cluster,), IMAGES, 0)
        new = load_expert(path).expert
        experts = [new if one.clusters == (cluster,) else one for one in base.experts]
        return images(replace(base, experts=experts), gate.encoder(list(rows.captions)), shape)

    known: dict[Path, Tensor] = {}
    table: dict[str, list[float]] = {}
    for kind, reference, path in variants(args.run, args.more, args.out):
        cluster = read_card(path, ExpertCard).clusters[0]
        if reference not in known:
            known[reference] = with_expert(reference, cluster)
        distance = float((with_expert(path, cluster) - known[reference]).square().mean().sqrt())
        table.setdefault(kind, []).append(distance)
        print(f"{kind}: {path.parent.name}/{path.name} {distance:.3f}", flush=True)
    print("\n| one expert exchanged | experts | images move by (RMS) |\n|---|---|---|")
    for kind, values in sorted(table.items(), key=lambda item: min(item[1])):
        print(f"| {kind} | {len(values)} | {min(values):.3f} to {max(values):.3f} |")


if __name__ == "__main__":
    main()
