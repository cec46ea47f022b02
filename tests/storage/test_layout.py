"""The layout of a run: names round-trip, paths stay inside, seeds differ, and nobody else spells them."""

from pathlib import Path

import pytest

from atoll.errors import AtollError
from atoll.storage import layout
from atoll.storage.layout import RunLayout, TrainingLayout, cluster_name, cluster_number


def paths_of(made: RunLayout | TrainingLayout) -> list[Path]:
    names = [name for name, value in vars(type(made)).items() if isinstance(value, layout._Below)]
    return [getattr(made, name) for name in names]


@pytest.mark.parametrize("number", [0, 7, 42, 999, 1000, 12345])
def test_cluster_names_round_trip(number) -> None:
    assert cluster_number(cluster_name(number)) == number


def test_cluster_names_sort_as_numbers_below_a_thousand() -> None:
    names = [cluster_name(number) for number in range(1000)]
    assert names == sorted(names)


@pytest.mark.parametrize(
    "name", ["", "cluster-", "cluster-3", "cluster-0003", "cluster--01", "cluster-003.txt", "cluster-abc", "003"]
)
def test_other_names_are_not_clusters(name) -> None:
    with pytest.raises(AtollError, match="expected a name such as cluster-000"):
        cluster_number(name)


def test_paths_of_a_run_differ_and_stay_inside(tmp_path) -> None:
    run = RunLayout(tmp_path)
    paths = [*paths_of(run), run.cluster(3), run.expert("3-flow")]
    assert len(paths) > 15
    assert len(set(paths)) == len(paths)
    assert all(path.resolve().is_relative_to(tmp_path) and path != tmp_path for path in paths)


@pytest.mark.parametrize("name", ["", ".", "..", "../3-flow", "3-a/b", "/etc", "3-a\\b"])
def test_expert_names_cannot_leave_the_run(tmp_path, name) -> None:
    with pytest.raises(AtollError, match="expected a plain name"):
        RunLayout(tmp_path).expert(name)


def test_training_state_lies_beside_its_artifact(tmp_path) -> None:
    artifact = RunLayout(tmp_path).expert("3-flow")
    training = TrainingLayout.of(artifact)
    assert training.root == tmp_path / "experts" / ".train-3-flow"
    assert training.name == "3-flow"
    paths = [*paths_of(training), training.sharded_checkpoint(300, 0), training.snapshot(300, 1), training.samples(300)]
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(training.root) for path in paths)


def test_every_part_of_a_run_has_its_own_seed() -> None:
    parts = (layout.monolith_seed, layout.router_seed, layout.student_seed)
    seeds = [part(seed) for part in parts for seed in range(3)]
    seeds += [layout.expert_seed(seed, number) for seed in range(3) for number in range(997)]
    assert len(set(seeds)) == len(seeds)
