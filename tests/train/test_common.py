"""The common model: experts start from it, alone and from it only; what is refused, and what is said."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from atoll.errors import AtollError
from atoll.manifest import Manifest, load_manifest
from atoll.storage.artifact import WEIGHTS, read_card, write_json
from atoll.storage.cards import ExpertCard
from atoll.storage.layout import RunLayout
from atoll.train.expert import train_common, train_expert, train_monolith
from atoll.train.lora import train_lora
from tests.cards import clusters_card
from tests.conftest import RUN, write_run

FLOW = {"prediction": "flow", "schedule": "linear"}
COMMON = {"objective": FLOW, "train": {"steps": 6, "batch": 9}}
STILL = {"lr": 1e-12, "warmup": 0}  # so small a rate leaves the weights as they were


def write(run: Path, common: dict | None = COMMON, **sections) -> Manifest:
    """Write an atoll.yaml whose experts start from the common model, with changes of its sections."""
    content = {**RUN, "train": {**RUN["train"], "init": "common"}, **({"common": common} if common else {})}
    for name, changes in sections.items():
        content[name] = {**content.get(name, {}), **changes} if isinstance(changes, dict) else changes
    (run / "atoll.yaml").write_text(yaml.safe_dump(content))
    return load_manifest(run)


def network(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(path / WEIGHTS).items() if name.startswith("network.")}


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    """A run with a trained common model; not to be changed by a test."""
    run = write_run(tmp_path_factory.mktemp("started") / "run")
    train_common(run, write(run))
    return run


@pytest.fixture
def mine(started, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(started, tmp_path / "mine"))


def test_an_isolated_expert_starts_from_the_common_weights(started, tmp_path) -> None:
    """It needs its cluster and the common model, and nothing else of the run."""
    island = tmp_path / "island"
    for part in ("common", "clusters/cluster-001"):
        shutil.copytree(started / part, island / part)
    path = train_expert(island, write(island, train={**RUN["train"], **STILL, "init": "common"}), "1")
    start, end = network(island / "common"), network(path)
    assert start.keys() == end.keys()
    for name, value in start.items():
        torch.testing.assert_close(end[name], value, rtol=0, atol=1e-10)
    record = read_card(path, ExpertCard).training.init
    assert (record.name, record.sha256) == ("common", read_card(island / "common", ExpertCard).weights_sha256)
    # With a rate it moves away.
    moved = network(train_expert(island, write(island), "1", restart=True))
    assert any(not torch.equal(moved[name], value) for name, value in start.items())


def test_the_common_model_is_an_expert_of_all_clusters_with_a_seed_of_its_own(started) -> None:
    card = read_card(started / "common", ExpertCard)
    assert (card.name, card.clusters, card.k) == ("common", (0, 1, 2), 3)
    assert (card.training.steps, card.training.rows, card.training.init) == (6, 42, None)
    assert card.training.seed == 996
    assert len(card.calibration.slope) == 19


def test_an_expert_does_not_go_on_from_another_common_model(mine) -> None:
    manifest = load_manifest(mine)
    path = train_expert(mine, manifest, "1")
    assert train_expert(mine, manifest, "1", resume=True) == path
    train_common(mine, write(mine, {**COMMON, "train": {"steps": 7, "batch": 9}}), restart=True)
    with pytest.raises(AtollError, match="was trained under other settings or on other data"):
        train_expert(mine, load_manifest(mine), "1", resume=True)


def test_only_experts_inherit_the_start(mine) -> None:
    student = {"objective": FLOW, "train": {"init": "./common"}}
    manifest = write(mine, student=student)
    parts = [*manifest.experts, manifest.common, manifest.router, manifest.monolith, manifest.student]
    assert [manifest.starts_from_common(part) for part in parts] == [True] * 3 + [False] * 3 + [True]
    assert [manifest.train_of(part).init for part in parts[3:]] == [None] * 3 + ["./common"]
    assert manifest.train_of(manifest.common).lr == RUN["train"].get("lr", 1e-3)
    assert read_card(train_monolith(mine, manifest), ExpertCard).training.init is None
    # The monolith starts from the common model too, if its own section says so.
    manifest = write(mine, monolith={"train": {"init": "common"}})
    path = train_monolith(mine, manifest, restart=True)
    assert read_card(path, ExpertCard).training.init.name == "common"
    # One expert may begin anew.
    alone = [RUN["experts"][0], {**RUN["experts"][1], "train": {"init": None}}]
    manifest = write(mine, experts=alone)
    assert [manifest.starts_from_common(expert) for expert in manifest.experts] == [True, False]


def test_another_start_of_the_run_is_inherited_by_all(mine) -> None:
    manifest = write(mine, train={**RUN["train"], "init": "../first"})
    assert [manifest.train_of(part).init for part in (manifest.common, manifest.monolith)] == ["../first"] * 2


@pytest.mark.parametrize("lora", [False, True])
def test_an_expert_before_the_common_model_names_the_command(run, lora) -> None:
    manifest = write(run)
    with pytest.raises(AtollError, match=r"run/common is not there yet; run `atoll train common` first") as error:
        train_lora(run, manifest, "1", 2) if lora else train_expert(run, manifest, "1")
    assert "\n" not in str(error.value)
    assert not (run / "experts").exists()
    assert not (run / "loras").exists()


def test_a_network_that_differs_is_refused_with_both_values(mine) -> None:
    with pytest.raises(AtollError, match=r"common is a network with width 16 \(here 32\); make atoll.yaml's equal"):
        train_expert(mine, write(mine, network={"width": 32}), "1")


def test_an_expert_of_another_objective_is_told_what_it_starts_from(mine) -> None:
    expected = (
        r"common predicts flow \(linear, time scale 999\), this training eps \(cosine, time scale 999\); it takes the "
        "weights as they are, so it starts from a network that predicts something else"
    )
    manifest = load_manifest(mine)
    with pytest.warns(UserWarning, match=expected):
        train_expert(mine, manifest, "0")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="train.init")
        train_expert(mine, manifest, "1")
    # Times that are sampled or weighted otherwise ask for the same prediction.
    weighted = [{"cluster": 1, "objective": {**FLOW, "time_sampling": "logit-normal"}}]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="train.init")
        train_expert(mine, write(mine, experts=weighted), "1", restart=True)
    scaled = [{"cluster": 1, "objective": {**FLOW, "time_scale": 1.0}}]
    with pytest.warns(UserWarning, match=r"this training flow \(linear, time scale 1\)"):
        train_expert(mine, write(mine, experts=scaled), "1", restart=True)


@pytest.mark.parametrize(
    ("common", "sections", "message"),
    [
        (None, {}, r"train.init: common, but there is no `common:` section; add one .* or write ./common for a dir"),
        (
            None,
            {"train": {"init": None}, "monolith": {"train": {"init": "common"}}},
            "monolith: train.init: common, but",
        ),
        (
            None,
            {"train": {"init": None}, "experts": [{**RUN["experts"][1], "train": {"init": "common"}}]},
            "expert 1-flow-linear: train.init: common, but there is no",
        ),
        (None, {"train": {"init": None}, "lora": {"train": {"init": "common"}}}, "lora: train.init: common, but there"),
        ({**COMMON, "train": {"init": "common"}}, {}, "common: train.init: common, but it cannot start from itself"),
        ({**COMMON, "train": {"init": "./common/"}}, {}, "it cannot start from itself; leave it out"),
        (COMMON, {"router": {"train": {"init": "common"}}}, "router: train.init: common, but a router starts from no"),
        ({**COMMON, "train": {"step": 5}}, {}, "step"),
        ({**COMMON, "network": {"widht": 5}}, {}, "widht"),
        ({"train": {"steps": 5}}, {}, "common.objective: Field required"),
    ],
)
def test_what_cannot_be_is_refused_with_the_file(run, common, sections, message) -> None:
    with pytest.raises(AtollError, match=message) as error:
        write(run, common, **sections)
    assert "\n" not in str(error.value)


def test_without_the_section_a_directory_called_common_is_any_expert(run, trained_run) -> None:
    shutil.copytree(trained_run / "experts/1-flow-linear", run / "common")
    manifest = write(run, None, train={**RUN["train"], "init": "./common"})
    assert not any(manifest.starts_from_common(expert) for expert in manifest.experts)
    assert manifest.train_of(manifest.monolith).init == "./common"
    assert read_card(train_expert(run, manifest, "1"), ExpertCard).training.init.name == "1-flow-linear"
    with pytest.raises(AtollError, match="names no common model; add a `common:` section with its objective"):
        train_common(run, manifest)


def test_settings_of_all_parts_reach_the_common_model(run) -> None:
    manifest = write(run, {**COMMON, "network": {"patch": 4}})
    skipping = manifest.skipping("keys.txt")
    assert skipping.common is not None
    assert skipping.train_of(skipping.common).skip == "keys.txt"
    assert manifest.size_step(1) == 4


def test_a_run_whose_clusters_grew_keeps_its_common_model(mine) -> None:
    """Experts started from it; the shards of a further cluster would be other data."""
    old = read_card(mine / "common", ExpertCard).assignment
    text = (mine / "atoll.yaml").read_text()
    (mine / "atoll.yaml").write_text(text.replace("k: 3", "k: 4"))
    with pytest.raises(AtollError, match="cluster-003"):
        train_common(mine, load_manifest(mine), resume=True)
    ancestor = {"assignment": old, "clusters": [[0], [1], [2]]}
    card = clusters_card(4, assignment="f" * 64, lineage=[ancestor])
    write_json(RunLayout(mine).clusters_card, card)
    before = (mine / "common" / WEIGHTS).read_bytes()
    assert train_common(mine, load_manifest(mine), resume=True) == mine / "common"
    assert (mine / "common" / WEIGHTS).read_bytes() == before
    with pytest.raises(AtollError, match="cluster-003"):
        train_common(mine, load_manifest(mine), restart=True)


def test_the_commands(run, atoll) -> None:
    write(run)
    code, _, err = atoll("train", "expert", "1", "-r", run, "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "run `atoll train common` first" in err
    code, out, _ = atoll("train", "common", "-r", run, "--quiet")
    assert (code, out) == (0, f"{run}/common written\n")
    assert atoll("train", "expert", "1", "-r", run, "--quiet")[0] == 0
    code, _, err = atoll("train", "common", "-r", run, "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "is already trained" in err
