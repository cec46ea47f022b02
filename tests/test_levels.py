"""Objectives of some noise levels: training times, calibration, validation, and what is refused."""

import pytest
import torch
import yaml

from atoll.calibration import NODES, nodes_within
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.objective import LEVEL_MARGIN, Objective
from atoll.schedule import PATH, Cosine, Linear, LinearBeta, TableSchedule
from atoll.testing import GaussianMixture
from atoll.train.calibrate import measure_calibration
from tests.conftest import RUN

SCHEDULES = [Linear(), Cosine(), LinearBeta(), TableSchedule([0.99, 0.6, 0.2, 0.01])]


def path_times(objective: Objective, t: torch.Tensor) -> torch.Tensor:
    return PATH.time_at(objective.schedule.log_snr(t.double()))


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_training_times_fill_the_levels_and_a_margin(prediction, schedule, sampling) -> None:
    objective = Objective(prediction, schedule, time_sampling=sampling, levels=(0.3, 0.6))
    t = objective.sample_time(4000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32
    own = path_times(objective, t)
    low, high = 0.3 - LEVEL_MARGIN, 0.6 + LEVEL_MARGIN
    assert low - 1e-4 <= own.min() < low + 0.06
    assert high - 0.06 < own.max() <= high + 1e-4
    # Uniform, or logit-normal, in the schedule's own time between the edges.
    t_min, t_max = objective.window
    assert abs(float(t.mean()) - (t_min + t_max) / 2) < 0.01 * (t_max - t_min) + 1e-3
    spread = {"uniform": 12**-0.5, "logit-normal": 0.2083}[sampling]
    assert abs(float(t.std()) / (t_max - t_min) - spread) < 0.01


def test_an_edge_at_0_or_1_stays_at_the_support() -> None:
    for schedule in SCHEDULES:
        whole, fine, coarse = (Objective("eps", schedule, levels=one) for one in (None, (0, 0.2), (0.2, 1)))
        assert fine.window[0] == whole.window[0] == whole.support[0]
        assert coarse.window[1] == whole.window[1] == whole.support[1]
        # Both are trained at the levels where one follows the other.
        assert coarse.window[0] < fine.window[1]
    assert Objective("flow", "linear", levels=(0.03, 0.97)).window == (0.0, 1.0)
    # An eps-network knows no level near t = 1, whatever its levels are.
    assert Objective("eps", "linear", levels=(0.9, 0.999999)).window[1] == Objective("eps", "linear").support[1]


def test_without_levels_times_and_cards_are_as_before() -> None:
    objective = Objective("flow", "cosine")
    t = objective.sample_time(16, torch.Generator().manual_seed(3))
    low, high = objective.support
    assert torch.equal(t, low + (high - low) * torch.rand(16, generator=torch.Generator().manual_seed(3)))
    assert "levels" not in objective.config()
    some = Objective("flow", "cosine", levels=[0, 0.2])
    assert some.config() == {**objective.config(), "levels": [0.0, 0.2]}
    assert Objective(**some.config()).levels == (0.0, 0.2)


@pytest.mark.parametrize(
    "levels",
    [
        (0.2,),
        (0.2, 0.2),
        (0.5, 0.2),
        (-0.1, 0.5),
        (0.5, 1.1),
        (0, float("nan")),
        (False, True),
        ("0", "1"),
        0.5,
        {},
        "01",
    ],
)
def test_other_levels_are_refused(levels) -> None:
    with pytest.raises(AtollError, match=r"expected two times of the linear path, 0 <= low < high <= 1") as error:
        Objective("flow", "linear", levels=levels)
    assert "\n" not in str(error.value)


def test_levels_that_nothing_can_train_on_are_refused() -> None:
    with pytest.raises(AtollError, match=r"levels 0.2 to 1 with a shift: .* leave out one"):
        Objective("flow", "linear", shift=3, levels=(0.2, 1))
    narrow = TableSchedule([0.5, 0.4])
    with pytest.raises(AtollError, match=r"levels 0 to 0.2: flow on table knows path times 0.5 to 0.55\d only"):
        Objective("flow", narrow, levels=(0, 0.2))


def test_a_calibration_is_measured_within_the_window() -> None:
    mixture = GaussianMixture.random(components=4, clusters=1, shape=(2, 3, 1), seed=1)
    objective = Objective("flow", "linear", time_scale=1.0, levels=(0.2, 1.0))
    exact, low = mixture.network(objective), objective.window[0]

    def network(x, time, condition=None):
        """It is wrong where it was never trained."""
        return torch.where((time < low)[:, None, None, None], torch.full_like(x, 1e3), exact(x, time))

    latents, _ = mixture.sample(64, torch.Generator().manual_seed(0))
    calibration = measure_calibration(network, objective, latents, None, samples=64)
    times = PATH.time_at(calibration.log_snr.double())
    torch.testing.assert_close(times.sort().values, torch.tensor([t for t in NODES if t >= low]).double())
    # Beyond the last node it is constant.
    at = PATH.log_snr(torch.tensor([low, 0.01, 0.2], dtype=torch.float64))
    shrinkage = calibration.shrinkage_over_sigma(at)
    assert (shrinkage == shrinkage[2]).all()
    assert calibration.slope.max() > 0.9


@pytest.mark.parametrize(("window", "count"), [((0.0, 1.0), 19), ((0.0, 0.25), 4), ((0.0, 0.05), 2), ((0.31, 0.42), 2)])
def test_a_narrow_window_has_two_nodes(window, count) -> None:
    nodes = nodes_within(*window)
    assert len(nodes) == count
    assert all(window[0] <= t <= window[1] for t in nodes)
    assert nodes == NODES or count < 19


def write(run, **sections):
    content = {**RUN, **sections}
    run.mkdir(exist_ok=True)
    (run / "atoll.yaml").write_text(yaml.safe_dump(content))
    return load_manifest(run)


FINE = {"prediction": "flow", "schedule": "linear", "levels": [0, 0.2]}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"monolith": {"objective": FINE}}, "monolith: objective.levels: it samples alone, at every level"),
        ({"student": {"objective": FINE}}, "student: objective.levels: it samples alone"),
        (
            {"experts": [{"cluster": 0, "objective": FINE, "train": {"sample_every": 5}}]},
            "expert 0-flow-linear: train.sample_every with objective.levels: .* set sample_every: 0 in its train",
        ),
        (
            {"experts": [{"cluster": 0, "objective": FINE}], "train": {"validation": {"prompts": ["one"]}}},
            "expert 0-flow-linear: train.validation with objective.levels: .* set validation: null",
        ),
        ({"experts": [{"cluster": 0, "objective": {**FINE, "levels": [0.5, 0.2]}}]}, "levels .*; expected two times"),
        ({"experts": [{"cluster": 0, "objective": {**FINE, "levels": [0.5]}}]}, "levels"),
    ],
)
def test_what_a_network_of_some_levels_cannot_do_is_refused(tmp_path, sections, message) -> None:
    with pytest.raises(AtollError, match=message) as error:
        write(tmp_path / "run", **sections)
    assert "\n" not in str(error.value)


def test_a_manifest_passes_levels_on(tmp_path) -> None:
    rest = {"objective": {"prediction": "flow", "schedule": "linear", "levels": [0.2, 1]}}
    manifest = write(tmp_path / "run", experts=[{"cluster": 0, "objective": FINE}], generalist=rest)
    assert Objective(**manifest.experts[0].objective.model_dump()).levels == (0.0, 0.2)


def test_a_report_names_the_levels() -> None:
    from atoll.evaluate.variants import objective_text

    assert objective_text(Objective("eps", "cosine")) == "eps on cosine"
    assert objective_text(Objective("flow", "linear", levels=(0.2, 1))) == "flow on linear at the levels 0.2 to 1"
