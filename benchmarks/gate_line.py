"""Where the gate's line lies: how far a change of one expert moves the fused images, and whether it is refused.

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
    table: dict[str, list[tuple[float, bool]]] = {}
    for kind, reference, path in variants(args.run, args.more, args.out):
        cluster = read_card(path, ExpertCard).clusters[0]
        trial = gate(kind, path, 3000)
        # What cannot be evaluated moves no image.
        if "contents" in trial.refused_by:
            continue
        if reference not in known:
            known[reference] = with_expert(reference, cluster)
        distance = float((with_expert(path, cluster) - known[reference]).square().mean().sqrt())
        table.setdefault(kind, []).append((distance, bool(trial.refused_by)))
        print(f"{kind}: {path.parent.name}/{path.name} {distance:.3f} {trial.refused_by}", flush=True)
    print("\n| one expert exchanged | images move by (RMS) | refused |\n|---|---|---|")
    for kind, values in sorted(table.items(), key=lambda item: min(item[1])):
        low, high = min(d for d, _ in values), max(d for d, _ in values)
        print(f"| {kind} | {low:.3f} to {high:.3f} | {sum(r for _, r in values)} of {len(values)} |")


if __name__ == "__main__":
    main()
