"""Statistics that the gate does not use: what they separate, and what they cost.

    python benchmarks/gate_other.py runs/demo --more runs/other/experts --out gate

Run `benchmarks/gate.py` with the same `--out` first: its probe and its poisoned experts are used. Each
statistic is the largest over every third noise level, in units of what needs no training:

- error: the gate's own, the error over the border;
- replica: the squared distance to another honest expert of the cluster, over the border;
- fused: the error of the ensemble with the expert over that without any expert of its cluster, top-2, the run's router;
- adjacent: the squared distance of its x0 at t and at 0.9 t, same image and noise, over the best linear denoiser's.

No threshold is derived. Each statistic gets the best threshold that a hand could choose for it: the largest honest
value. Writes other.json and prints a table for docs/collective.md. A second call continues.
"""

import argparse
import json
import math
import statistics
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gate import Gate, directory_of
from poison import CHEAP, DEAR
from torch import Tensor

from atoll.collective.gate.checks import tolerance
from atoll.collective.gate.errors import Draws, NoisyVelocity, expert_velocity, linear_velocity
from atoll.collective.gate.judge import OTHER_ROWS, PROBE_ROWS
from atoll.collective.gate.linear import LinearDenoiser
from atoll.collective.gate.probe import EDGES, LEVELS, Noisy
from atoll.condition import Condition
from atoll.ensemble import Ensemble
from atoll.ensemble.loading import load_ensemble, load_expert
from atoll.manifest import load_manifest
from atoll.schedule import PATH
from atoll.shapes import per_sample
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard
from atoll.storage.layout import CARD, ENSEMBLE, EXPERTS

NAMES = ("error", "replica", "fused", "adjacent")
NEARER = 0.9  # of a time: the adjacent one
SOME = range(0, LEVELS, 3)  # noise levels


@torch.inference_mode()
def velocities(velocity: NoisyVelocity, noisy: tuple[Noisy, ...]) -> Tensor:
    """Velocities [levels, n, ...] in float64."""
    return torch.stack([velocity(one) for one in noisy]).double()


def squares(difference: Tensor) -> Tensor:
    """Mean squares [levels, n] of [levels, n, ...]; what is undefined is infinite."""
    return torch.nan_to_num(difference.square().flatten(2).mean(2), nan=math.inf, posinf=math.inf)


def nearer(noisy: Noisy, latents: Tensor) -> Noisy:
    """The same images and noise at the adjacent time."""
    return Noisy(PATH.diffuse(latents, noisy.eps, NEARER * noisy.t), noisy.eps, NEARER * noisy.t)


def x0_of(velocity: Tensor, noisy: tuple[Noisy, ...]) -> Tensor:
    """x0 = x - t u on the linear path."""
    return torch.stack([one.x - per_sample(one.t, one.x) * u for one, u in zip(noisy, velocity, strict=True)])


def fused_velocity(ensemble: Ensemble, condition: Condition) -> NoisyVelocity:
    return lambda noisy: ensemble.velocity(noisy.x, noisy.t, (condition,))


class Others:
    """The statistics of one run's experts.

    Args:
        run: with its ensemble.
        honest: experts, the replicas among them.
        probe: the gate's.
    """

    def __init__(self, run: Path, honest: list[Path], probe: Path):
        self.gate, self.honest = Gate(run, probe), honest
        trust = load_manifest(run).trust_in_cards(run)
        self.ensemble = load_ensemble(run / ENSEMBLE, trust=trust).ensemble

    def replica(self, name: str, clusters: tuple[int, ...]) -> Path:
        """The first honest expert of these clusters with another name."""
        return next(p for p in self.honest if read_card(p, ExpertCard).clusters == clusters and p.name != name)

    def __call__(self, path: Path, name: str, seed: int) -> tuple[dict[str, float], dict[str, float]]:
        """The statistics of an expert, and their seconds over those of one pass. name: of the expert it is made of."""
        card, candidate = read_card(path, ExpertCard), load_expert(path).expert
        reference = self.gate.reference(card.clusters[0])
        rows = reference.probe.rows(reference.clusters, PROBE_ROWS, seed)
        far = reference.others(OTHER_ROWS, seed)
        draws = Draws.of(rows.latents, EDGES, reference.own, seed).select(SOME)
        condition = self.gate.encoder(list(rows.captions))
        seconds: dict[str, float] = {}

        def timed(name: str, velocity: NoisyVelocity, noisy: tuple[Noisy, ...] = draws.noisy) -> Tensor:
            start = time.process_time()
            result = velocities(velocity, noisy)
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - start
            return result

        own = timed("pass", expert_velocity(candidate, condition))
        values: dict[str, float] = {}
        seconds["error"] = seconds["pass"]
        # A replica.
        other = load_expert(self.replica(name, card.clusters)).expert
        other_cluster = LinearDenoiser.of(far.latents) if far else None
        border = tolerance(draws, reference.own, other_cluster, candidate.objective.prediction)
        distance = squares(own - timed("replica", expert_velocity(other, condition))) / draws.scale
        values["replica"] = float((distance.mean(1) / border.mean(1)).max())
        # The ensemble with and without.
        rest = [one for one in self.ensemble.experts if one.clusters != card.clusters]
        target = torch.stack([one.eps - rows.latents for one in draws.noisy])
        values["error"] = float((squares(own - target) / draws.scale).mean(1).div(border.mean(1)).max())
        with_it, without = (
            squares(timed("fused", fused_velocity(replace(self.ensemble, experts=experts), condition)) - target)
            for experts in ([*rest, candidate], rest)
        )
        values["fused"] = float((with_it.mean(1) / without.mean(1)).max())
        # The adjacent time.
        near = tuple(nearer(one, rows.latents) for one in draws.noisy)
        linear = linear_velocity(reference.own)
        moved, least = (
            squares(x0_of(at, draws.noisy) - x0_of(then, near)).mean(1)
            for at, then in (
                (own, timed("adjacent", expert_velocity(candidate, condition), near)),
                (velocities(linear, draws.noisy), velocities(linear, near)),
            )
        )
        values["adjacent"] = float((moved / least).max())
        return values, {name: seconds[name] / seconds["pass"] for name in NAMES}


def chosen(paths: list[Path], limit: int) -> list[Path]:
    """At most `limit` of these, evenly."""
    return [paths[number * len(paths) // limit] for number in range(limit)] if len(paths) > limit else paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--more", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("gate"))
    parser.add_argument(
        "--limit", type=int, default=1000, help="honest and poisoned experts each at most, evenly chosen"
    )
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="other.json of other data sets, for the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    own = sorted(path.parent for path in (args.run / EXPERTS).glob(f"*/{CARD}"))
    honest = sorted(path.parent for path in args.more.glob(f"*/{CARD}")) + own
    # All kinds by turns, so that an even choice has each of them. What does not load has no statistic.
    kinds = [directory_of(kind) for kind in {**CHEAP, **DEAR} if kind != "not finite"]
    paths = [args.out / "poison" / base.name / kind for kind in kinds for base in own]
    poisoned = [path for path in paths if (path / CARD).is_file()]

    others, cache = Others(args.run, honest, args.out / "probe"), args.out / "other.json"
    known: dict[str, Any] = json.loads(cache.read_text()) if cache.is_file() else {}
    for group, experts in (("honest", chosen(honest, args.limit)), ("poisoned", chosen(poisoned, args.limit))):
        for path in experts:
            if str(path) not in known:
                name = path.name if group == "honest" else path.parent.name
                values, costs = others(path, name, 0)
                known[str(path)] = {"group": group, "kind": path.name, "values": values, "costs": costs}
                cache.write_text(json.dumps(known))
    for path in args.add:
        known |= json.loads(path.read_text())
    report(list(known.values()))


def report(trials: list[dict[str, Any]]) -> None:
    """Print the table; `error`, the gate's own statistic on the same draws, for comparison."""
    honest, poisoned = ([t["values"] for t in trials if t["group"] == group] for group in ("honest", "poisoned"))
    top = {name: max(values[name] for values in honest) for name in NAMES}
    print(f"{len(honest)} honest, {len(poisoned)} poisoned")
    print("| statistic | honest | poisoned: least, median | above all honest | not by error | passes |")
    print("|---|---|---|---|---|---|")
    for name in NAMES:
        low, rest = min(values[name] for values in honest), [values[name] for values in poisoned]
        above = [values for values in poisoned if values[name] > top[name]]
        new = sum(values["error"] <= top["error"] for values in above)
        cost = statistics.median(t["costs"][name] for t in trials)
        print(
            f"| {name} | {low:.2f} to {top[name]:.2f} | {min(rest):.2f}, {statistics.median(rest):.3g} "
            f"| {len(above)} of {len(rest)} | {new} | {cost:.2f} |"
        )
    for name in NAMES:
        missed = Counter(t["kind"] for t in trials if t["group"] == "poisoned" and t["values"][name] <= top[name])
        print(f"\nnot above an honest one by {name}: {dict(missed)}")


if __name__ == "__main__":
    main()
