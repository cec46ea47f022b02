"""Distils the ensemble into one dense model: `atoll distil` (DDM, arXiv 2501.05450, section 5).

At the student's own (x, t) the teacher's x0 and eps replace the data in the student's target. Since the targets of all
predictions are linear in both, student and teacher may have any objectives. The student is a plain expert of all
clusters, and is sampled alone.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from atoll.condition import Condition
from atoll.encoders.codec.statistics import refuse_other_statistics
from atoll.encoders.text import PromptEncoder, build_encoder
from atoll.encoders.trust import Trust
from atoll.ensemble import Ensemble, Sampler
from atoll.ensemble.loading import load_ensemble
from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.objective import Objective
from atoll.schedule import PATH
from atoll.shapes import per_sample
from atoll.storage.artifact import read_json, sha256_file
from atoll.storage.cards import ClusterShardsCard, TeacherRecord
from atoll.storage.layout import ENSEMBLE_CARD, STUDENT, RunLayout, student_seed
from atoll.storage.shards import Shards
from atoll.train.denoiser import train_denoiser
from atoll.train.denoiser_artifact import TrainingSpec
from atoll.train.denoising import Teacher
from atoll.train.track import TrainProgress


def distil_run(
    run: Path,
    manifest: Manifest,
    *,
    resume: bool = False,
    restart: bool = False,
    progress: TrainProgress | None = None,
) -> Path:
    """Train the run's student on its ensemble and all clusters' latents.

    Args:
        run: the run's directory.
        manifest: its atoll.yaml.
        resume: continue from the checkpoint if there is one.
        restart: discard a checkpoint or a finished student.
        progress: called with each line of metrics.jsonl that reports a step.

    Returns:
        The student's directory.

    Raises:
        AtollError: the manifest names no student, there is no ensemble, or the ensemble encodes captions otherwise than
            the data's encoder; and as `train_expert`.
    """
    if manifest.student is None:
        raise AtollError("atoll.yaml names no student; add a `student:` section with its objective")
    clusters, layout = tuple(range(manifest.clusters.k)), RunLayout(run)
    shards = [Shards(layout.cluster(k)) for k in clusters]
    # A student is trained like an expert of all clusters, with the ensemble as its target.
    spec = TrainingSpec(
        run=run,
        path=layout.student,
        name=STUDENT,
        part=manifest.student,
        clusters=clusters,
        seed=student_seed(manifest.seed),
    )
    teaching = _Teaching(
        layout.ensemble, manifest.student.teacher, shards[0].card(ClusterShardsCard), manifest.trust_in_cards(run)
    )
    return train_denoiser(spec, manifest, shards, resume=resume, restart=restart, progress=progress, teaching=teaching)


class _Teaching:
    """The run's ensemble, loaded on the device where the student trains."""

    def __init__(self, path: Path, teacher: str, data: ClusterShardsCard, trust: Trust):
        # A missing ensemble is reported before the training starts.
        if not (path / ENSEMBLE_CARD).is_file():
            raise AtollError(f"{path}: no ensemble to learn from; run `atoll assemble`")
        # A damaged card fails here, not when the teacher is loaded.
        read_json(path / ENSEMBLE_CARD)
        self._path, self._teacher, self._trust, self._data = path, teacher, trust, data
        self._encoder = PromptEncoder([build_encoder(data.condition, trust)])
        self.about = TeacherRecord(ensemble=sha256_file(path / ENSEMBLE_CARD), by=teacher)

    def on(self, device: torch.device) -> Teacher:
        # Loaded only here: the mark of the training needs the hash of the ensemble, not its weights.
        loaded = load_ensemble(self._path, device=device, trust=self._trust)
        refuse_other_statistics(self._path, loaded.card.codec, "the student", self._data.codec)
        # The teacher reads the student's encodings, so both need one text encoder.
        if not loaded.encoder.reads_like(self._encoder):
            raise AtollError(
                f"{self._path}: its experts encode captions with {loaded.encoder.configs()}, the data's encoder is "
                f"{self._encoder.configs()[0]}; distil from experts with the data's encoder"
            )
        # The teacher that the manifest names: the whole ensemble, or each cluster's own expert.
        ensemble = loaded.ensemble
        if self._teacher == "owner":  # the cluster is known, so no router is needed
            ensemble = replace(ensemble, router=None, routing="oracle", alignment="snr")
        return teacher_of(ensemble)


def teacher_of(ensemble: Ensemble) -> Teacher:
    """Return the teacher that gives the ensemble's (x0, eps) at any point of any schedule.

    For the student's x = alpha x0 + sigma eps the ensemble is evaluated at c x on the linear path, at the time of equal
    log-SNR, where it has the same (x0, eps). c is the ratio of the alphas, and equally of the sigmas.
    """

    # The sampler evaluates the teacher as sampling does.
    sampler = Sampler(ensemble)

    @torch.no_grad()
    def teach(
        objective: Objective, x: Tensor, t: Tensor, condition: Condition, cluster: Tensor
    ) -> tuple[Tensor, Tensor]:
        # The point of equal log-SNR on the linear path.
        schedule = objective.schedule
        log_snr = schedule.log_snr(t)
        t_path = PATH.time_at(log_snr)
        # Each ratio is used on the side where it does not divide by a small number.
        ratio = torch.where(log_snr < 0, PATH.sigma(t_path) / schedule.sigma(t), PATH.alpha(t_path) / schedule.alpha(t))
        x_scaled = per_sample(ratio, x) * x
        # The velocity on the linear path determines both estimates.
        u = sampler.velocity(x_scaled, t_path, condition, cluster=cluster)
        return x_scaled - per_sample(t_path, x) * u, x_scaled + per_sample(1 - t_path, x) * u

    return teach
