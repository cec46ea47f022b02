"""Trains the router, p(cluster | noisy latent, t) (DDM section 3.3): `atoll train router`."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atoll.encoders.codec.statistics import own_constants, with_codec
from atoll.encoders.text import build_encoder
from atoll.errors import AtollError
from atoll.manifest import Manifest, TrainSettings
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.randomness import Stream, random_rows, seeded
from atoll.schedule import PATH, Schedule
from atoll.storage.artifact import CARD, load_clusters, read_card, save_artifact
from atoll.storage.cards import ClustersCard, ClusterShardsCard, Lineage, RouterCard, TrainingRecord
from atoll.storage.layout import RunLayout, TrainingLayout, router_seed
from atoll.storage.memory import refuse_out_of_memory
from atoll.storage.shards import INDEX, SPLITS, Shards
from atoll.train.batches import CaptionedLatents, Rows, drop_condition, mirrored, sizes_of
from atoll.train.checkpoint import discard_checkpoints
from atoll.train.drawn_captions import caption_draws, tag_dropout
from atoll.train.island import Island, gathered_state
from atoll.train.loop import Task, train
from atoll.train.plans import TrainingMarks, finished
from atoll.train.prefetch import Batch
from atoll.train.skipped import without_skipped
from atoll.train.stopping import stop_signals, stoppable
from atoll.train.track import TrainProgress

NoisePath = tuple[Schedule, Tensor]  # a schedule, and the clusters [n] int64 whose latents it diffuses
_EVALUATED_AT = (0.1, 0.3, 0.5, 0.7, 0.9)
_EVALUATED_ON = 2048  # held-out latents at most


def train_router(
    run: Path,
    manifest: Manifest,
    *,
    resume: bool = False,
    restart: bool = False,
    progress: TrainProgress | None = None,
) -> Path:
    """Train the router on latents and their clusters.

    The data set is clusters/router if it exists (nothing else is needed then), else all of encoded/.

    Args:
        run: the run's directory.
        manifest: its atoll.yaml.
        resume: continue from the checkpoint if there is one.
        restart: discard a checkpoint or a finished router.
        progress: called with each line of metrics.jsonl that reports a step.

    Returns:
        The directory of its artifact.

    Raises:
        AtollError: missing or damaged shards, an assignment that lacks a latent, NaN loss, or an existing checkpoint or
            router.
    """
    # The data, the network and what identifies the training.
    parts, labels, lineage = _data(run)
    settings = manifest.train_of(manifest.router)
    parts, left_out = without_skipped(run, settings, parts)
    clusters, assignment, encoded = lineage.k, lineage.assignment, parts[0]
    choices = manifest.router.network
    encoder = build_encoder(encoded.data_card.condition, manifest.trust_in_cards(run))
    latent_shape = list(encoded.shape("latent"))
    # The router's config follows from the latents, the number of clusters and the text encoder.
    config = {
        "name": "router",
        "size": latent_shape[1:],
        "channels": latent_shape[0],
        "clusters": clusters,
        "pooled_dim": encoder.pooled_dim if choices.pooled else None,
        **choices.config(),
    }
    # Experts on other schedules change what the router must learn, so their paths are part of the mark.
    seed, path = router_seed(manifest.seed), RunLayout(run).router
    paths = _paths(manifest, clusters)
    about = {"path": [[path.config(), of.tolist()] for path, of in paths]} if paths else {}
    # The router is trained on one split and evaluated on the other.
    training, held_out = (CaptionedLatents(Rows.of(parts, split), encoder) for split in SPLITS)
    identity = {"network": config, "assignment": assignment, "seed": seed, **about, **left_out}
    identity |= {**own_constants(encoded.data_card.codec), **sizes_of(training.rows, latent_shape)}
    marks = TrainingMarks(identity, settings)
    if _is_extended(path, lineage, resume, restart) or finished(path, RouterCard, marks, resume, restart):
        return path
    # Train, then write the artifact.
    torch.manual_seed(seed)
    router = build_network(config)
    training.tags = tag_dropout(settings, encoder)
    with Island.join(settings.device, settings.threads) as island, stop_signals() as stopped:
        task = RouterTask(router, training, held_out, labels, settings=settings, seed=seed, paths=paths)
        for line in training.repeated(settings.batch) if island.is_first else ():
            warnings.warn(f"router: {line}", stacklevel=2)
        trained = train(
            task,
            settings,
            TrainingLayout.of(path).root,
            marks,
            island,
            resume=resume,
            restart=restart,
            progress=progress,
            stopped=stopped,
        )
        # The accuracy is measured with the EMA weights, which training leaves in the router.
        card = RouterCard(
            network=config,
            clusters=clusters,
            latent_shape=latent_shape,
            codec=encoded.data_card.codec,
            condition=encoded.data_card.condition,
            assignment=assignment,
            **({"lineage": lineage.ancestors} if lineage.ancestors else {}),
            **about,
            accuracy_at_t=task.accuracy(stoppable(router, island, stopped)),
            training=TrainingRecord(
                **trained.summary, **left_out, rows=len(training), seed=seed, torch=torch.__version__
            ),
        )
        # Every process takes part in gathering, only the first one writes.
        weights = {f"network.{name}": value for name, value in gathered_state(router).items()}
        if island.is_first:
            save_artifact(path, card, weights)
            if settings.keep_checkpoints == "none":
                discard_checkpoints(TrainingLayout.of(path).root)
    return path


class RouterTask(Task):
    """The training of the router: cross-entropy of log p(cluster | x_t, t[, text]), t uniform on each cluster's path.

    The text is dropped in a fraction of the rows, as in an expert's training, so that the router works without it too.

    Args:
        router: the network.
        data: latents to train on.
        held_out: latents to evaluate on, diffused along the linear path, where sampling evaluates the router.
        labels: clusters of all rows that `data` and `held_out` are selected from, [n] int64.
        settings: of the training.
        seed: of the batches.
        paths: the clusters' paths in training; none for the linear path for all.
    """

    def __init__(
        self,
        router: nn.Module,
        data: CaptionedLatents,
        held_out: CaptionedLatents,
        labels: Tensor,
        *,
        settings: TrainSettings,
        seed: int,
        paths: Sequence[NoisePath] = (),
    ):
        self.module, self.data, self.held_out, self.labels = router, data, held_out, labels
        self.settings, self.seed, self.paths = settings, seed, paths
        self.order = data.sampler(settings.batch, seed)
        self.null = data.encoder.null(1)

    def batch(self, index: int, local_rows: slice) -> Batch:
        g = seeded(self.seed, index)
        count, every = self.settings.batch, self.order.at(index)
        rows = every[local_rows]
        # Everything random is drawn for the whole batch, so it does not depend on the number of processes.
        t = torch.rand(count, generator=g)
        eps = torch.randn(count, *self.data.rows.shape_of(every), generator=g)
        dropped = torch.rand(count, generator=g) < self.settings.dropout
        # The labels count through all rows of the data set, so they are looked up by row number.
        labels = self.labels[self.data.rows.numbers[rows]]
        random = {"t": t[local_rows], "eps": eps[local_rows], "dropped": dropped[local_rows]}
        flips, draws = mirrored(self.seed, index, count), caption_draws(self.seed, index, count)
        return {**self.data.batch(rows, flips[local_rows], draws[local_rows]), **random, "label": labels}

    def losses(self, module: Callable[..., Tensor], batch: Batch) -> Tensor:
        condition = self.data.condition(batch)
        condition = drop_condition(condition, self.null.to(condition.states.device), batch["dropped"])
        # In float32: float16 latents would round the noise.
        x = self._diffuse(batch["x0"].float(), batch["t"], batch["eps"], batch["label"])
        return F.nll_loss(module(x, batch["t"], condition.pooled), batch["label"], reduction="none")

    def _diffuse(self, x0: Tensor, t: Tensor, eps: Tensor, labels: Tensor) -> Tensor:
        """Diffuse each row along the path of its cluster."""
        if not self.paths:
            return PATH.diffuse(x0, eps, t)
        # Experts on other schedules see other noise; the router then learns each cluster on its own path.
        x = torch.empty_like(x0)
        for schedule, clusters in self.paths:
            rows = torch.isin(labels, clusters.to(labels.device)).nonzero().flatten()
            x[rows] = schedule.diffuse(x0[rows], eps[rows], t[rows])
        return x

    def validate(self, module: Callable[..., Tensor]) -> dict[str, float]:
        return {f"accuracy at {time}": accuracy for time, accuracy in self.accuracy(module).items()}

    @torch.inference_mode()
    def accuracy(self, module: Callable[..., Tensor]) -> dict[str, float]:
        """Return the top-1 accuracy on held-out latents by time: {"0.1": 0.98, ...}; empty without such latents."""
        if not len(self.held_out):
            return {}
        rows = random_rows(len(self.held_out), _EVALUATED_ON, seeded(self.seed, 0, Stream.SUBSET)).sort().values
        device = next(self.module.parameters()).device
        # The same rows at every time, decoded once, in groups of one shape.
        groups = []
        for own in self.held_out.rows.alike(rows):
            batch = {name: tensor.to(device) for name, tensor in self.held_out.batch(own).items()}
            labels = self.labels[self.held_out.rows.numbers[own]].to(device)
            groups.append((batch["x0"].float(), self.held_out.condition(batch).pooled, labels))
        accuracies = {}
        for number, time in enumerate(_EVALUATED_AT):
            # The same noise at every validation, so accuracies compare.
            generator, right = seeded(self.seed, number, Stream.ROUTER_VALIDATION), []
            for x0, pooled, labels in groups:
                eps = torch.randn(x0.shape, generator=generator).to(device)
                t = torch.full((len(x0),), time, device=device)
                right.append(module(PATH.diffuse(x0, eps, t), t, pooled).argmax(1) == labels)
            accuracies[str(time)] = round(float(torch.cat(right).float().mean()), 4)
        return accuracies


def _paths(manifest: Manifest, clusters: int) -> list[NoisePath]:
    """The clusters' paths in training, none for the linear one. Raises AtollError for a cluster without an expert."""
    if manifest.router.path == "linear":
        return []
    # The first expert of each cluster determines its path.
    first = {expert.cluster: expert for expert in reversed(manifest.experts)}
    if missing := [str(cluster) for cluster in range(clusters) if cluster not in first]:
        raise AtollError(
            f"router.path: experts, but no expert of cluster {', '.join(missing)} is in atoll.yaml; add one, or "
            "take path: linear"
        )
    schedules = [Objective(**first[cluster].objective.model_dump()).schedule for cluster in range(clusters)]
    return [(schedule, torch.tensor([cluster])) for cluster, schedule in enumerate(schedules)]


def _data(run: Path) -> tuple[list[Shards], Tensor, Lineage]:
    """Latents, their clusters [n] int64 through all directories, and the assignment with its ancestors."""
    layout = RunLayout(run)
    # Clusters that grew by new data hold more than encoded/ does.
    if layout.clusters_card.is_file() and not (layout.router_sample / INDEX).is_file():
        card = load_clusters(layout.clusters_card)
        if isinstance(card, ClustersCard) and card.lineage:
            parts = [Shards(layout.cluster(number)) for number in range(card.k)]
            labels = torch.cat([torch.full((len(part),), number) for number, part in enumerate(parts)])
            return parts, labels, card.descent
    shards, labels, clusters, assignment = _data_set(run)
    described = shards.data_card
    ancestors = described.lineage if isinstance(described, ClusterShardsCard) else None
    return [shards], labels, Lineage(assignment, clusters, ancestors or ())


def _is_extended(path: Path, lineage: Lineage, resume: bool, restart: bool) -> bool:
    """Return whether the router at `path` was extended to these clusters, which is as good as trained on them.

    Raises:
        AtollError: it was, and both resume and restart are False.
    """
    if restart or not (path / CARD).exists():
        return False
    card = read_card(path, RouterCard)
    if not card.network.get("grown") or card.assignment != lineage.assignment:
        return False
    if not resume:
        raise AtollError(f"{path} is already trained, and extended; add --restart to train it anew")
    return True


def _data_set(run: Path) -> tuple[Shards, Tensor, int, str]:
    """(latents, their clusters [n] int64, number of clusters, hash of the assignment)."""
    layout = RunLayout(run)
    # The sample holds latents and clusters; otherwise the assignment is joined by the keys.
    if (layout.router_sample / INDEX).is_file():
        sample = Shards(layout.router_sample)
        described = sample.card(ClusterShardsCard)
        return sample, sample.read("cluster", slice(None)), described.clusters, described.assignment
    # All of encoded/: the clusters come from the assignment, by key.
    card = load_clusters(layout.clusters_card)
    # The experts' latents are normalised by the statistics of the run.
    encoded = with_codec(Shards(layout.encoded), card.codec, layout.clusters)
    cluster_of = _assignment(layout.assignment)
    try:
        labels = torch.tensor([cluster_of[key] for key in encoded.keys])
    except KeyError as error:
        raise AtollError(
            f"{layout.clusters}: the assignment lacks the key {error}, so it belongs to other data; "
            "run `atoll cluster --force`"
        ) from None
    return encoded, labels, card.k, card.assignment


def _assignment(file: Path) -> dict[str, int]:
    """The cluster of each key."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, columns=["key", "cluster"])
    except (OSError, pa.ArrowException) as error:
        refuse_out_of_memory(error, file)
        raise AtollError(f"{file}: cannot be read ({error}); run `atoll cluster --force`") from None
    # A dictionary, since the rows of the assignment need not have the order of the latents.
    return dict(zip(table["key"].to_pylist(), table["cluster"].to_pylist(), strict=True))
