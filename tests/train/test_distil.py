"""Distillation: the teacher is exact for any objectives, and the student trains like any expert."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from atoll.calibration import Calibration
from atoll.encoders.text import build_encoder
from atoll.ensemble import Ensemble, Expert
from atoll.ensemble.loading import load_ensemble
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.objective import Objective
from atoll.schedule import Cosine, Linear, LinearBeta, TableSchedule
from atoll.storage.artifact import WEIGHTS, read_card
from atoll.storage.cards import ExpertCard
from atoll.testing import GaussianMixture
from atoll.train.distil import distil_run, teacher_of
from tests.conftest import RUN

SHAPE = (2, 3, 1)
SCHEDULES = (Linear(), Cosine(), LinearBeta(), TableSchedule([0.99, 0.7, 0.4, 0.1, 0.0]))


def exact_ensemble(mixture, routing) -> Ensemble:
    identity = Calibration.identity(torch.zeros(SHAPE, dtype=torch.float64))
    objectives = [Objective("eps", "cosine"), Objective("flow", "linear")]
    experts = [Expert(mixture.network(o, k), o, (k,), identity, str(k)) for k, o in enumerate(objectives)]
    return Ensemble(experts, None if routing == "oracle" else mixture.router, routing)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("routing", ["oracle", "full"])
def test_the_teacher_is_exact_at_any_point_of_any_schedule(prediction, schedule, routing) -> None:
    mixture = GaussianMixture.random(6, 2, SHAPE, seed=2)
    objective = Objective(prediction, schedule)
    low, high = objective.support
    t = torch.linspace(low + 0.03 * (high - low), high - 0.03 * (high - low), 9, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    cluster = torch.arange(9) % 2
    x0 = torch.cat([mixture.cluster(int(k)).sample(1, g)[0] for k in cluster])
    x = objective.schedule.diffuse(x0, torch.randn(x0.shape, generator=g, dtype=x0.dtype), t)
    taught = teacher_of(exact_ensemble(mixture, routing))(objective, x, t, None, cluster)
    for name, value in zip(("x0", "eps"), taught, strict=True):
        for k in (0, 1):
            rows = cluster == k
            own = k if routing == "oracle" else None
            exact = mixture.x0_eps(x[rows], t[rows], schedule, own)[("x0", "eps").index(name)]
            torch.testing.assert_close(value[rows], exact, atol=1e-6, rtol=1e-6)


def with_student(run, **student):
    settings = {**RUN, "student": {"objective": {"prediction": "v", "schedule": "cosine"}, **student}}
    (run / "atoll.yaml").write_text(yaml.safe_dump(settings))
    return load_manifest(run)


@pytest.fixture
def run(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run")


def test_the_student_covers_all_clusters_and_is_sampled_alone(run) -> None:
    path = distil_run(run, with_student(run))
    card = read_card(path, ExpertCard).plain()
    assert (card["clusters"], card["objective"]["prediction"]) == ([0, 1, 2], "v")
    assert card["training"]["teacher"]["by"] == "owner"
    alone = load_ensemble(path).ensemble
    condition = build_encoder(RUN["condition"])(["moss"] * 2)
    assert alone.velocity(torch.randn(2, 1, 4, 8), torch.rand(2), condition).isfinite().all()


def test_owner_and_ensemble_teach_differently(run) -> None:
    weights = {}
    for teacher in ("owner", "ensemble"):
        path = distil_run(run, with_student(run, teacher=teacher), restart=True)
        weights[teacher] = load_file(path / WEIGHTS)["network.final.weight"]
    assert not torch.equal(weights["owner"], weights["ensemble"])


def test_a_student_resumes_bit_exactly_with_the_same_teacher_only(run) -> None:
    manifest = with_student(run)
    whole = load_file(distil_run(run, manifest) / WEIGHTS)
    shutil.rmtree(run / "student")
    shutil.rmtree(run / ".train-student")

    class Stop(Exception):
        pass

    def stop(line):
        if line["step"] == 4:
            raise Stop

    with pytest.raises(Stop):
        distil_run(run, manifest, progress=stop)
    again = load_file(distil_run(run, manifest, resume=True) / WEIGHTS)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    with pytest.raises(AtollError, match="other settings"):
        distil_run(run, with_student(run, teacher="ensemble"), resume=True)


def test_a_missing_student_or_ensemble_is_named(run) -> None:
    with pytest.raises(AtollError, match="names no student"):
        distil_run(run, load_manifest(run))
    shutil.rmtree(run / "ensemble")
    with pytest.raises(AtollError, match="no ensemble to learn from"):
        distil_run(run, with_student(run))
