"""Small trainings in one process, by Atoll's own networks, objectives, optimizers and clusters.

For map.py and efficiency.py. What `atoll train` does besides (checkpoints, logs, prefetching, several processes) is
left out, so that hundreds of networks of 0.1 to 1 M parameters can be trained on two cores. All images are in memory.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from atoll.cluster import cluster_run
from atoll.condition import Tokens
from atoll.data.encode import encode_run
from atoll.encoders.text import build_encoder
from atoll.manifest import Manifest, TrainSettings, parse_manifest
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.plan import cost
from atoll.randomness import Stream, seeded
from atoll.schedule import PATH
from atoll.storage.cards import ClusterShardsCard
from atoll.storage.layout import RunLayout
from atoll.storage.shards import Shards, is_held_out
from atoll.train.batches import Rows, SeededSampler, drop_condition
from atoll.train.state import State
from atoll.train.targets import TargetsTerm, batches_with_targets, is_projector

LEVELS = tuple(round(0.05 + 0.1 * i, 2) for i in range(10))  # path times at which errors are measured
_MEASURED = 1000  # held-out rows
_CALL = 250  # rows of a call of the network when it is measured

_SETS: dict[str, dict[str, Any]] = {
    "eurosat": {"source": "parquet", "path": "$ATOLL_DATA/eurosat64_*of2.parquet", "split": "split"},
    "emoji": {"source": "parquet", "path": "$ATOLL_DATA/emoji64.parquet", "split": "split"},
    "mixture": {"source": "parquet", "path": "$ATOLL_MIXTURE", "split": "split", "key": "key"},
    "glyphs": {"source": "glyphs", "subset": "all"},
}
MOBILENET = {"name": "mobilenetv2", "weights": "$ATOLL_DATA/weights/mobilenetv2_tf_int8.npz"}


SQUEEZENET = {"name": "squeezenet", "weights": "$ATOLL_DATA/weights/squeezenet11_caffe_fp16.npz"}


class Lines:
    """Results, one JSON line each."""

    def __init__(self, file: Path, shown: str = "error"):
        self._file, self._shown = file, shown
        lines = file.read_text().splitlines() if file.is_file() else []
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Write a line."""
        self.rows[key] = {"key": key, **row}
        with self._file.open("a") as file:
            file.write(json.dumps(self.rows[key]) + "\n")
        print(key, round(row[self._shown], 5), f"{row.get('seconds', 0):.0f} s", flush=True)


@dataclass(frozen=True)
class Data:
    """A set of images in pixels, divided into clusters.

    Attributes:
        x0: images [n,C,H,W] float32.
        tokens: their captions.
        cluster: the cluster of each [n] int64.
        val: whether each is held out from training [n] bool.
        calibration: whether each training image is held out for calibration [n] bool, as `calibration_holdout` 0.05.
        encoder: of the captions.
        targets: of representation [n,dims,g,g] float16, if they were asked for.
        record: what they are.
    """

    x0: Tensor
    tokens: Tokens
    cluster: Tensor
    val: Tensor
    calibration: Tensor
    encoder: Any
    targets: Tensor | None = None
    record: Any = None

    def training(self, cluster: int | None = None) -> Tensor:
        """The rows to train on: all, or those of a cluster, [m] int64."""
        rows = ~self.val & ~self.calibration
        return (rows if cluster is None else rows & (self.cluster == cluster)).nonzero().flatten()

    def held_out(self, cluster: int | None = None) -> Tensor:
        """Up to 1,000 rows that nothing is trained on: of all, or those of them in a cluster, [m] int64."""
        rows = self.val.nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=seeded(0, 0, Stream.VALIDATION))[:_MEASURED]]
        return rows if cluster is None else rows[self.cluster[rows] == cluster]


def load(work: Path, name: str, size: int, k: int, seed: int = 0, *, targets: bool = False, **clusters: Any) -> Data:
    """Encode and cluster a set, unless that is done, and read it into memory.

    Args:
        work: directory for the encoded images, shared by all K and seeds.
        name: "eurosat", "emoji", "mixture" or "glyphs".
        size: side of the images, in pixels.
        k: number of clusters.
        seed: of the clustering.
        targets: whether targets of representation are stored, of MobileNetV2's patch features.
        clusters: further settings of `clusters:` in atoll.yaml.
    """
    tag = "".join(f"-{value}" for value in clusters.values())
    run = work / f"{name}-{size}{'-targets' if targets else ''}" / f"k{k}{tag}-seed-{seed}"
    if (cache := run / "data.pt").is_file():
        return Data(**torch.load(cache, weights_only=False))
    manifest = _manifest(name, size, k, seed, clusters, targets)
    # The images are encoded once for all clusterings.
    source = run.parent / "encoded-run"
    source.mkdir(parents=True, exist_ok=True)
    encode_run(source, manifest, resume=True)
    run.mkdir(exist_ok=True)
    if not RunLayout(run).encoded.exists():
        RunLayout(run).encoded.symlink_to(os.path.relpath(RunLayout(source).encoded, run))
    cluster_run(run, manifest)
    shards = [Shards(RunLayout(run).cluster(number)) for number in range(k)]
    rows = Rows.of(shards, None)
    encoder = build_encoder(shards[0].card(ClusterShardsCard).condition)
    every = torch.arange(len(rows))
    val = torch.zeros(len(rows), dtype=torch.bool)
    val[Rows.of(shards, "val").numbers] = True
    # One order for all clusterings, so that the same rows are measured with the same noise.
    latents, captions = rows.latents(every), rows.captions(every)
    digests = [
        hashlib.sha256(x.numpy().tobytes() + c.encode()).digest() for x, c in zip(latents, captions, strict=True)
    ]
    order = torch.tensor(sorted(range(len(rows)), key=digests.__getitem__))
    fields = {
        "x0": latents[order].float(),
        "tokens": encoder.tokenize([captions[i] for i in order.tolist()]),
        "cluster": rows.clusters(order),
        "val": val[order],
        "calibration": is_held_out(shards, 0.05)[order],
        "encoder": encoder,
        "targets": rows.targets(order) if targets else None,
        "record": shards[0].card(ClusterShardsCard).targets,
    }
    torch.save(fields, cache)
    return Data(**fields)


def _manifest(name: str, size: int, k: int, seed: int, clusters: dict[str, Any], targets: bool) -> Manifest:
    glyphs = name == "glyphs"
    content = {
        "name": name,
        "seed": seed,
        "data": {**_SETS[name], "size": size},
        "codec": {"name": "pixels", "channels": 1 if glyphs else 3},
        "condition": {"name": "hash", "dim": 64, "length": 16},
        "feature": {"name": "hog"} if glyphs else MOBILENET,
        "clusters": {"k": k, "method": "balanced", **clusters},
        **({"targets": {"feature": MOBILENET, "dims": 8, "grid": size // 4}} if targets else {}),
        "experts": [{"cluster": 0, "objective": {"prediction": "flow", "schedule": "linear"}}],
    }
    return parse_manifest(yaml.safe_dump(content), name)


def network_config(data: Data, width: int, name: str = "mmdit", depth: int = 4) -> dict[str, Any]:
    """The configuration of a network with heads of 32 and patches of 4 x 4 pixels."""
    channels, *size = data.x0.shape[1:]
    shape = {"channels": channels, "size": list(size), "patch": 4, "states_dim": 64}
    return {"name": name, **shape, "width": width, "depth": depth, "heads": max(1, width // 32)}


def training_flops(data: Data, config: dict[str, Any]) -> int:
    """FLOPs of one image's training step, as `atoll plan` counts them."""
    return cost.training_flops(cost.sizes_of(config, data.tokens.ids.shape[1]))


class Levelled(Objective):
    """Flow Matching with times drawn from a density over ten levels, weighted back by its inverse, or not.

    Args:
        density: ten weights, of the times in 0..0.1, 0.1..0.2, ...
        is_weighted: whether the loss is divided by the density, so that its expectation stays that of uniform times.
    """

    def __init__(self, density: tuple[float, ...], is_weighted: bool):
        super().__init__("flow", "linear")
        self.density = torch.tensor(density) / sum(density) * len(density)
        self.is_weighted = is_weighted

    def sample_time(self, batch: int, generator: torch.Generator | None = None, tokens: int = 1) -> Tensor:
        level = torch.multinomial(self.density, batch, replacement=True, generator=generator)
        return (level + torch.rand(batch, generator=generator)) / len(self.density)

    def loss(self, output: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        plain = super().loss(output, x0, eps, t)
        level = (t * len(self.density)).long().clamp(max=len(self.density) - 1)
        return plain / self.density[level] if self.is_weighted else plain


class Training:
    """One training that can be continued from any of its states.

    Args:
        data: the images.
        rows: those to train on.
        config: of the network.
        settings: of the training; the schedule of its rate ends at settings.steps.
        objective: what the network predicts.
        seed: of weights, order and noise.
        start: weights to begin with, by name; None: new ones.
    """

    def __init__(
        self,
        data: Data,
        rows: Tensor,
        config: dict[str, Any],
        settings: TrainSettings,
        objective: Objective,
        seed: int,
        start: dict[str, Tensor] | None = None,
    ):
        self.data, self.rows, self.config, self.settings = data, rows, config, settings
        self.objective, self.seed = objective, seed
        torch.manual_seed(seed)
        self.network: nn.Module = build_network(config)
        if start is not None:
            self.network.load_state_dict(start)
        self.term: TargetsTerm | None = None
        if settings.targets_weight:
            end, block = batches_with_targets(settings), max(1, config["depth"] // 2)
            self.term = TargetsTerm(settings.targets_weight, block, end, data.record)
            self.term.attach(self.network, seed)
        self.state = State(self.network, settings)
        self._order = SeededSampler(len(rows), settings.batch, seed)
        self._null = data.encoder.null(1)
        self.seconds = 0.0  # of the processor

    def run(self, steps: int) -> None:
        """Train up to a step."""
        settings, state, begun = self.settings, self.state, time.process_time()
        self.network.train()
        side = self.config["size"][0] // self.config["patch"]
        while state.numbers.step < steps:
            # As `atoll.train.denoiser` does.
            step = state.numbers.step
            rows = self.rows[self._order.at(step)]
            g = seeded(self.seed, step)
            t = self.objective.sample_time(settings.batch, g, side**2)
            eps = torch.randn(settings.batch, *self.data.x0.shape[1:], generator=g)
            dropped = torch.rand(settings.batch, generator=g) < settings.dropout
            x0, condition = self.data.x0[rows], self.data.encoder.encode(self.data.tokens.index(rows))
            condition = drop_condition(condition, self._null, dropped)
            x = self.objective.schedule.diffuse(x0, eps, t)
            state.begin()
            with torch.autocast("cpu", torch.bfloat16):
                if self.term is not None and step < self.term.end and self.data.targets is not None:
                    output, seen = self.network(x, t * self.objective.time_scale, condition, tap=self.term.block)
                    more = self.term.losses(seen, self.data.targets[rows], (side, side)).mean()
                else:
                    output, more = self.network(x, t * self.objective.time_scale, condition), 0.0
                loss = self.objective.loss(output, x0, eps, t).mean() + more
                loss.backward()
            state.clip()
            state.update()
        self.seconds += time.process_time() - begun

    def branch(self, settings: TrainSettings) -> "Training":
        """The same training with another schedule, continued from here; this one is left as it is."""
        other = Training(self.data, self.rows, self.config, settings, self.objective, self.seed)
        own = self.state.tensors()
        with torch.no_grad():
            for name, tensor in other.state.tensors().items():
                tensor.copy_(own[name])
        other.state.numbers.step = self.state.numbers.step
        other.seconds = self.seconds
        return other

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, by name."""
        weights = {name: value.clone() for name, value in self.network.state_dict().items()}
        weights |= {name: value.clone() for name, value in zip(self.state.names, self.state.ema, strict=True)}
        return {name: value for name, value in weights.items() if not is_projector(name)}


@torch.inference_mode()
def velocities(
    config: dict[str, Any], weights: dict[str, Tensor], objective: Objective, data: Data, rows: Tensor, seed: int = 0
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield (t, predicted velocity [m,C,H,W], true one) at each of LEVELS; a row's noise depends on the row alone."""
    network = build_network(config)
    network.load_state_dict(weights)
    network.eval()
    shape = (len(data.x0), *data.x0.shape[1:])
    for number, t in enumerate(LEVELS):
        eps = torch.randn(shape, generator=seeded(seed, number, Stream.VALIDATION))[rows]
        x0 = data.x0[rows]
        x = PATH.diffuse(x0, eps, torch.full((len(rows),), t))
        # The objective's own time and scale of equal log-SNR.
        own_t = objective.schedule.time_at(PATH.log_snr(torch.tensor([t], dtype=torch.float64))).float()
        scale = (objective.schedule.alpha(own_t) / PATH.alpha(torch.tensor([t]))).item()
        parts = []
        for part in torch.arange(len(rows)).split(_CALL):
            times = own_t.expand(len(part))
            condition = data.encoder.encode(data.tokens.index(rows[part]))
            with torch.autocast("cpu", torch.bfloat16):
                output = network(x[part] * scale, times * objective.time_scale, condition)
            clean, noise = objective.to_x0_eps(output.float(), x[part] * scale, times)
            parts.append(noise - clean)
        yield t, torch.cat(parts), eps - x0


def errors(
    config: dict[str, Any], weights: dict[str, Tensor], objective: Objective, data: Data, rows: Tensor
) -> list[float]:
    """Mean squared error of the velocity at each of LEVELS."""
    return [
        float((output - true).square().mean()) for _, output, true in velocities(config, weights, objective, data, rows)
    ]


def over_clusters(per_cluster: Sequence[list[float]], counts: Sequence[int]) -> list[float]:
    """The errors of all held-out rows, from those of each cluster's."""
    total = sum(counts)
    return [sum(e[i] * n for e, n in zip(per_cluster, counts, strict=True)) / total for i in range(len(LEVELS))]


def mean(levels: Sequence[float]) -> float:
    """The error averaged over the levels."""
    return math.fsum(levels) / len(levels)
