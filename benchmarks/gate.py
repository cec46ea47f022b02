"""How well the gate of a collective separates honest experts from poisoned ones.

    python benchmarks/gate.py runs/demo --more runs/other/experts --out gate
    python benchmarks/gate.py runs/demo --cost --out gate               # on an idle machine

The experts of the run and those in `--more` are honest: each is judged as it is on several draws of rows and noise, and
once with weights rounded to bf16. Poisoned ones are made of the run's experts (`benchmarks/poison.py`). Everything
stays in `--out`: a second call continues, and judges only what trials.json lacks; remove it when the gate changes. The
probe is every row that no expert was trained on: the val split, and what training held back. Writes results.json and
prints the tables of docs/collective.md, together with the results.json of other data sets (`--add`).
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from poison import APART, CHEAP, DEAR, Honest, Poison, noisy, scaled

from atoll.collective.gate.checks import HONEST_SPREAD, IMPRECISION, NEAR_DATA
from atoll.collective.gate.errors import Draws, expert_velocity, linear_velocity
from atoll.collective.gate.judge import OTHER_ROWS, PROBE_ROWS, ClusterReference, judge
from atoll.collective.gate.linear import LinearDenoiser
from atoll.collective.gate.probe import EDGES, Probe
from atoll.encoders.text import build_encoder
from atoll.ensemble.loading import load_expert
from atoll.nn import build_network
from atoll.storage.artifact import read_card, read_tensors, save_artifact
from atoll.storage.cards import ClusterShardsCard, ExpertCard
from atoll.storage.layout import CARD, CLUSTERS, EXPERTS, cluster_path
from atoll.storage.shards import Shards, ShardWriter, is_held_out

ORDER = ("contents", "card", "null", "others", "error", "prompt", "captions", "single")


@dataclass(frozen=True)
class Trial:
    """One admission.

    Attributes:
        kind: of the expert: how it was made.
        expert: its name.
        path: its directory.
        refused_by: the checks that refuse.
        over: each statistic over its threshold.
        worst: each check's worst ratio.
    """

    kind: str
    expert: str
    path: str
    refused_by: tuple[str, ...]
    over: dict[str, float]
    worst: dict[str, float]


def write_probe(run: Path, out: Path, holdout: float) -> Path:
    """Copy the rows that no expert was trained on into a probe."""
    for directory in sorted((run / CLUSTERS).glob("cluster-*")):
        shards = Shards(directory)
        rows = torch.cat([shards.rows("val"), is_held_out([shards], holdout).nonzero().flatten()]).sort().values
        with ShardWriter(out / directory.name, shards.card(ClusterShardsCard)) as writer:
            keys = [shards.keys[row] for row in rows.tolist()]
            writer.append(keys, shards.captions_of(rows), ["val"] * len(rows), {"latent": shards.read("latent", rows)})
    return out


class Gate:
    """The gate with the run's references."""

    def __init__(self, run: Path, probe: Path):
        first = Shards(cluster_path(run / CLUSTERS, 0)).card(ClusterShardsCard)
        self.run, self.probe, self.encoder = run, Probe(probe, first.descent), build_encoder(first.condition)
        self._references: dict[int, ClusterReference] = {}

    def reference(self, cluster: int) -> ClusterReference:
        if cluster not in self._references:
            shards = (Shards(cluster_path(self.run / CLUSTERS, cluster)),)
            self._references[cluster] = ClusterReference((cluster,), self.probe, shards, self.encoder)
        return self._references[cluster]

    def __call__(
        self, kind: str, path: Path, seed: int, claimed: str | None = None, cluster: int | None = None
    ) -> Trial:
        card = read_card(path, ExpertCard)
        reference = self.reference(card.clusters[0] if cluster is None else cluster)
        checks = judge(path, reference, name=claimed or card.name, seed=seed, thorough=True)
        over = {c.name: c.statistic / c.threshold if c.threshold else 2 * c.statistic for c in checks}
        worst = {c.name: c.worst for c in checks if not math.isnan(c.worst)}
        return Trial(kind, card.name, str(path), tuple(c.name for c in checks if not c.passed), over, worst)

    def cost(self, path: Path, repeats: int, warm: bool = True) -> list[float]:
        """Admissions in passes of its rows over the noise levels, each between two passes; in CPU seconds."""
        loaded, card = load_expert(path), read_card(path, ExpertCard)
        reference = self.reference(card.clusters[0])
        rows = reference.probe.rows(reference.clusters, PROBE_ROWS, 0)
        noisy = Draws.of(rows.latents, EDGES, reference.own, 0).noisy
        velocity = expert_velocity(loaded.expert, self.encoder(list(rows.captions)))

        def one_pass() -> float:
            start = time.process_time()
            with torch.inference_mode():
                for one in noisy:
                    velocity(one)
            return time.process_time() - start

        def admission(seed: int) -> float:
            start = time.process_time()
            judge(path, reference, name=card.name, seed=seed, thorough=True)
            return time.process_time() - start

        # What is computed once per cluster, and the first calls of everything, do not count.
        _ = reference.own, reference.captioned
        if warm:
            admission(0)
            one_pass()
        ratios, before = [], one_pass()
        for seed in range(repeats):
            seconds, after = admission(seed), one_pass()
            ratios.append(2 * seconds / (before + after))
            before = after
        return ratios

    def linear_ratios(self, path: Path, seed: int) -> tuple[float, float]:
        """The largest ratios of an expert's error to that of the best linear denoiser: over all levels, and over those
        at which the linear denoisers of the cluster and of the others are alike (0 if there are none)."""
        card, loaded = read_card(path, ExpertCard), load_expert(path)
        reference = self.reference(card.clusters[0])
        rows = reference.probe.rows(reference.clusters, PROBE_ROWS, seed)
        far = reference.others(OTHER_ROWS, seed)
        assert far is not None
        draws = Draws.of(rows.latents, EDGES, reference.own, seed)
        errors = draws.errors(expert_velocity(loaded.expert, self.encoder(list(rows.captions)))).mean(1)
        linear, other = (
            draws.errors(linear_velocity(one)).mean(1) for one in (reference.own, LinearDenoiser.of(far.latents))
        )
        ratios, alike = errors / linear, other / linear < IMPRECISION
        # There, experts that predict x0 are compared otherwise.
        compared = torch.tensor(EDGES[:-1]) >= (NEAR_DATA if loaded.expert.objective.prediction == "x0" else 0)
        both = compared & alike
        return float(ratios[compared].max()), float(ratios[both].max()) if bool(both.any()) else 0.0


def dit_s2(path: Path, out: Path) -> Path:
    """Write an untrained DiT-S/2 (33 M weights) under the card of an expert; its cost is that of a trained one."""
    card = read_card(path, ExpertCard)
    network = {**card.network, "patch": 2, "width": 384, "depth": 12, "heads": 6}
    tensors = {name: value.clone() for name, value in read_tensors(path, card).items() if name[:8] != "network."}
    fresh = build_network(network).state_dict()
    save_artifact(
        out,
        card.model_copy(update={"network": network}),
        tensors | {f"network.{name}": value for name, value in fresh.items()},
    )
    return out


def rounded(path: Path, out: Path) -> Path:
    """Write an expert with weights that bf16 holds."""
    if not (out / CARD).is_file():
        card = read_card(path, ExpertCard)
        save_artifact(out, card, {k: v.bfloat16().float() for k, v in read_tensors(path, card).items()})
    return out


def directory_of(kind: str) -> str:
    """The directory of a kind of poisoned expert."""
    return kind.replace("%", "pc").replace(",", "").replace(" ", "_")


def made(honest: Honest, name: str, poison: Poison, out: Path) -> Path:
    """Write a poisoned expert, unless it is there."""
    path = out / honest.card.name / directory_of(name)
    if not (path / CARD).is_file():
        start = time.process_time()
        save_artifact(path, *poison(honest))
        print(f"{path.relative_to(out)}: {time.process_time() - start:.0f} s", flush=True)
    return path


def stale(finished: Path, half: Path, out: Path) -> Path:
    """Write the weights of a half-trained expert under the card of the finished one."""
    card = read_card(finished, ExpertCard)
    path = out / card.name / "stale"
    if not (path / CARD).is_file():
        save_artifact(path, card, {k: v.clone() for k, v in read_tensors(half, read_card(half, ExpertCard)).items()})
    return path


def distinct(paths: list[Path]) -> list[Path]:
    """Leave out experts with the weights of an earlier one."""
    seen: dict[str, Path] = {}
    for path in paths:
        seen.setdefault(read_card(path, ExpertCard).weights_sha256, path)
    return list(seen.values())


class Trials:
    """Trials that are there already, by kind, path and seed; new ones are saved as they come."""

    def __init__(self, gate: Gate, path: Path):
        self.gate, self.path = gate, path
        content = json.loads(path.read_text()) if path.is_file() else {}
        self._trials = {key: Trial(**value) for key, value in content.items()}

    def __call__(self, kind: str, path: Path, seed: int) -> Trial:
        key = f"{kind} {path} {seed}"
        if key not in self._trials:
            self._trials[key] = self.gate(kind, path, seed)
            self.path.write_text(json.dumps({key: vars(trial) for key, trial in self._trials.items()}))
        return self._trials[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--more", type=Path, help="directory with more honest experts of the same clusters")
    parser.add_argument("--out", type=Path, default=Path("gate"))
    parser.add_argument("--draws", type=int, default=3, help="draws of rows and noise per honest expert")
    parser.add_argument("--holdout", type=float, default=0.05, help="what training held back")
    parser.add_argument("--train", type=int, default=2, help="experts whose poisons are trained")
    parser.add_argument(
        "--add", type=Path, nargs="*", default=[], help="results.json of other data sets, for the tables"
    )
    parser.add_argument("--cost", action="store_true", help="measure the cost of admission, and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    probe = args.out / "probe"
    gate = Gate(args.run, probe if probe.is_dir() else write_probe(args.run, probe, args.holdout))
    own = sorted(path.parent for path in (args.run / EXPERTS).glob(f"*/{CARD}"))
    more = sorted(path.parent for path in args.more.glob(f"*/{CARD}")) if args.more else []
    if args.cost:
        with tempfile.TemporaryDirectory() as place:
            large = dit_s2(own[0], Path(place) / "dit-s2")
            for path, repeats in [*((path, 7) for path in own), (large, 1)]:
                ratios = gate.cost(path, repeats, warm=repeats > 1)
                span = f"{min(ratios):.3f} to {max(ratios):.3f}"
                print(f"{path.name}: {statistics.median(ratios):.3f} ({span})", flush=True)
        return
    trials = Trials(gate, args.out / "trials.json")

    # Honest: as it is, and in bf16.
    experts = distinct(own + more)
    honest = [trials("stored", path, seed) for path in experts for seed in range(args.draws)]
    honest += [trials("bf16", rounded(path, args.out / "bf16" / path.name), 0) for path in experts]
    # Poisoned.
    poisoned, apart = [], []
    for number, path in enumerate(own):
        source = Honest.load(path, args.run)
        kinds = {**CHEAP, **(DEAR if number in _trained(own, args.train) else {})}
        for name, poison in kinds.items():
            poisoned.append(trials(name, made(source, name, poison, args.out / "poison"), 1000 + number))
        for name, poison in (APART if number in _trained(own, args.train) else {}).items():
            apart.append(trials(name, made(source, name, poison, args.out / "poison"), 1000 + number))
    for half in (path for path in more if path.name.endswith("-half")):
        finished = half.with_name(half.name.removesuffix("-half"))
        if finished in more:
            poisoned.append(trials("stale", stale(finished, half, args.out / "poison"), 1000))
    # What the smallest strengths do.
    graded = []
    strengths: dict[str, Poison] = {f"weights x {f}": scaled(f) for f in (1.02, 1.05, 1.1)}
    strengths |= {f"noise {100 * share:g} %": noisy(share) for share in (0.01, 0.02, 0.05, 0.1)}
    for path in own:
        source = Honest.load(path, args.run)
        graded += [
            trials(name, made(source, name, poison, args.out / "poison"), 2000) for name, poison in strengths.items()
        ]
    content: dict[str, Any] = {
        "honest": [vars(t) for t in honest],
        "poisoned": [vars(t) for t in poisoned],
        "apart": [vars(t) for t in apart],
        "graded": [vars(t) for t in graded],
        "ratios": {str(path): gate.linear_ratios(path, 0) for path in experts},
    }
    (args.out / "results.json").write_text(json.dumps(content, indent=1))
    for path in args.add:
        content = {key: merged(value, json.loads(path.read_text())[key]) for key, value in content.items()}
    report(content)


def merged(one: Any, two: Any) -> Any:
    return one | two if isinstance(one, dict) else one + two


def _trained(own: list[Path], count: int) -> list[int]:
    """The experts whose poisons are trained: one of each objective first."""
    first = {
        read_card(path, ExpertCard).objective["prediction"]: number for number, path in reversed([*enumerate(own)])
    }
    order = [*sorted(first.values(), reverse=True), *(n for n in range(len(own)) if n not in first.values())]
    return order[:count]


def report(content: dict[str, Any]) -> None:
    """Print the tables."""
    honest, poisoned, apart, graded = (
        [Trial(**one) for one in content[key]] for key in ("honest", "poisoned", "apart", "graded")
    )
    experts = len(content["ratios"])
    refused = [trial for trial in poisoned if trial.refused_by]
    wrongly = [trial for trial in honest if trial.refused_by]
    two = [trial for trial in poisoned if {"contents", "card"} & set(trial.refused_by)]
    print(f"\nhonest: {experts} experts, {len(honest)} admissions, {len(wrongly)} refused;")
    # No event in n independent trials (Clopper and Pearson 1934).
    print(
        f"none of {experts} would bound the rate of refused ones at 95 % to {100 * (1 - 0.05 ** (1 / experts)):.1f} %"
    )
    print(f"poisoned: {len(poisoned)} of {len({t.kind for t in poisoned})} kinds, {len(refused)} refused")
    print(f"by the two cheapest checks alone: {len(two)} of {len(poisoned)}")
    for trial in [*wrongly, *(t for t in poisoned if not t.refused_by)]:
        print("WRONG", trial)
    print("\n| check | honest, largest statistic over threshold | poisoned refused by it | smallest, median | alone |")
    print("|---|---|---|---|---|")
    for name in ORDER[1:]:
        top = max(t.over.get(name, -math.inf) for t in honest)
        hits = [t.over[name] for t in poisoned if name in t.refused_by]
        alone = sum(t.refused_by == (name,) for t in poisoned)
        low = f"{min(hits):.2f}, {statistics.median(hits):.3g}" if hits else ""
        print(f"| {name} | {top:.2f} | {len(hits)} | {low} | {alone} |")
    best = [max(v for v in t.over.values()) for t in poisoned]
    print(f"largest of all statistics over thresholds: honest {max(max(t.over.values()) for t in honest):.2f} at most,")
    print(f"poisoned {min(best):.2f} at least, median {statistics.median(best):.1f}")
    for title, trials in (("kind", poisoned), ("apart", apart), ("strength", graded)):
        print(f"\n| {title} | refused | checks that refuse | error over the border, worst level |\n|---|---|---|---|")
        kinds: dict[str, list[Trial]] = defaultdict(list)
        for trial in trials:
            kinds[trial.kind].append(trial)
        for kind, group in kinds.items():
            names = [n for n in ORDER if any(n in t.refused_by for t in group)]
            worst = [t.worst["error"] for t in group if "error" in t.worst]
            span = f"{min(worst):.2f} to {max(worst):.3g}" if worst else ""
            print(
                f"| {kind} | {sum(bool(t.refused_by) for t in group)} of {len(group)} | {', '.join(names)} | {span} |"
            )
    for title, place, bound in (("all levels", 0, HONEST_SPREAD), ("levels where clusters are alike", 1, IMPRECISION)):
        ratios = [both[place] for both in content["ratios"].values() if both[place] > 0]
        print(f"error over the best linear denoiser's, largest over {title}: {min(ratios):.2f} to {max(ratios):.2f};")
        print(f"tolerance bound of {len(ratios)} experts {tolerance_bound(ratios):.2f}, in the gate {bound}")


def tolerance_bound(ratios: list[float]) -> float:
    """The bound of 99.9 % of all log-normal ratios at 95 % confidence (one-sided, Natrella 1963)."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, spread, n, z, c = statistics.mean(logs), statistics.stdev(logs), len(logs), 3.0902, 1.6449
    a, b = 1 - c**2 / (2 * (n - 1)), z**2 - c**2 / n
    return math.exp(mean + (z + math.sqrt(z**2 - a * b)) / a * spread)


if __name__ == "__main__":
    main()
