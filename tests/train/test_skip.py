"""Lists of keys whose rows are left out: of training, calibration, the router, stackings and the evaluation."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from atoll.assemble import assemble_run
from atoll.ensemble.replicas import measure_stacking
from atoll.errors import AtollError
from atoll.evaluate.run import open_run
from atoll.manifest import EvaluateSettings, Manifest, load_manifest
from atoll.storage.artifact import CARD, WEIGHTS
from atoll.storage.layout import RunLayout
from atoll.storage.shards import Shards, ShardWriter, SkipList, is_held_out
from atoll.train.calibrate_expert import calibrate_expert
from atoll.train.expert import train_expert, train_monolith
from atoll.train.router import train_router
from tests.conftest import RUN, write_run

HOLDOUT = {**RUN["train"], "calibration_holdout": 0.3}


def manifest(run: Path, **train: object) -> Manifest:
    (run / "atoll.yaml").write_text(yaml.safe_dump({**RUN, "train": {**HOLDOUT, **train}}))
    return load_manifest(run)


def listed(run: Path, *keys: str, name: str = "keys.txt") -> str:
    (run / name).write_text("\n".join(keys) + "\n")
    return name


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / WEIGHTS)


def equal(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return all(torch.equal(theirs[name], value) for name, value in mine.items())


def card(path: Path) -> dict:
    return json.loads((path / CARD).read_text())


def without(directory: Path, keys: set[str]) -> None:
    """Write a directory of shards anew, without some rows."""
    old = Shards(directory)
    rows = [row for row, key in enumerate(old.keys) if key not in keys]
    columns = {name: old.read(name, torch.tensor(rows)) for name in old.columns}
    texts = ([texts[row] for row in rows] for texts in (old.keys, old.captions, old.splits))
    with ShardWriter(directory, old.data_card) as writer:
        writer.append(*texts, columns)


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run")


CLUSTER_1 = [f"image-{row:03d}" for row in range(1, 60, 3)]
GONE = [*CLUSTER_1[:4], "image-003"]  # the last one is in another cluster


@pytest.mark.filterwarnings("ignore:.*of 5 keys are in no row")
@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_a_list_trains_the_weights_that_the_data_without_its_rows_train(run, tmp_path, holdout) -> None:
    """Bit for bit, with calibration and validation."""
    shutil.copytree(run, tmp_path / "less")
    without(RunLayout(tmp_path / "less").cluster(1), set(GONE))
    skipping = manifest(run, skip=listed(run, *GONE), calibration_holdout=holdout)
    trained = train_expert(run, skipping, "1")
    plain = train_expert(tmp_path / "less", manifest(tmp_path / "less", calibration_holdout=holdout), "1")
    assert equal(trained, plain)
    record = card(trained)["training"]
    assert record["skip"]["keys"] == 4
    assert record["rows"] == card(plain)["training"]["rows"]
    assert record["mark"] != card(plain)["training"]["mark"]
    assert card(trained)["calibration"] == card(plain)["calibration"]


@pytest.mark.filterwarnings("ignore:.*keys are in no row")
def test_the_mark_knows_the_rows_that_are_left_out(run) -> None:
    train_expert(run, manifest(run, skip=listed(run, *CLUSTER_1[:4])), "1")
    # The same rows: in another order, another file, with keys of other clusters.
    for keys in (reversed(CLUSTER_1[:4]), [*CLUSTER_1[:4], "image-000", "nothing"]):
        train_expert(run, manifest(run, skip=listed(run, *keys, name="other.txt")), "1", resume=True)
    # Other rows, or none.
    for keys in (CLUSTER_1[:3], CLUSTER_1[:5], ["image-000"]):
        with pytest.raises(AtollError, match="was trained under other settings or on other data"):
            train_expert(run, manifest(run, skip=listed(run, *keys)), "1", resume=True)
    with pytest.raises(AtollError, match="was trained under other settings or on other data"):
        train_expert(run, manifest(run), "1", resume=True)


def test_a_list_of_other_clusters_keys_changes_nothing(run, tmp_path) -> None:
    shutil.copytree(run, tmp_path / "plain")
    with pytest.warns(UserWarning, match=r"keys\.txt: 1 of 1 keys are in no row of .*cluster-001: image-000$"):
        trained = train_expert(run, manifest(run, skip=listed(run, "image-000")), "1")
    plain = train_expert(tmp_path / "plain", manifest(tmp_path / "plain"), "1")
    assert card(trained)["training"]["mark"] == card(plain)["training"]["mark"]
    assert "skip" not in card(trained)["training"]


def test_keys_that_do_not_exist_are_counted_and_named(run) -> None:
    name = listed(run, "image-001", "zz", "a key\twith a tab", " spaced", "b", "c")
    said = r"keys\.txt: 5 of 6 keys are in no row of 3 directories of shards:  spaced, a key.with a tab, b and 2 more$"
    with pytest.warns(UserWarning, match=said):
        train_monolith(run, manifest(run, skip=name))


def test_router_and_monolith_leave_the_rows_out(run, tmp_path) -> None:
    shutil.copytree(run, tmp_path / "less")
    less = RunLayout(tmp_path / "less")
    for directory in (less.encoded, *less.existing_clusters()):
        without(directory, set(GONE))
    skipping = manifest(run, skip=listed(run, *GONE))
    for train in (train_router, train_monolith):
        trained, plain = train(run, skipping), train(tmp_path / "less", manifest(tmp_path / "less"))
        assert equal(trained, plain)
        assert card(trained)["training"]["skip"]["keys"] == 5
    assert card(RunLayout(run).router)["accuracy_at_t"] == card(less.router)["accuracy_at_t"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"keys\.txt: cannot be read \(No such file"),
        (b"", r"keys\.txt: holds no key; write one per line"),
        (b"\n  \n", "holds no key"),
        (b"\xff\xfe", r"cannot be read \(not UTF-8\); expected a text file with one key per line"),
        ("\n".join(CLUSTER_1).encode(), r"names all 14 training rows of .*cluster-001; none is left to train on"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(run, content, said) -> None:
    if content is not None:
        (run / "keys.txt").write_bytes(content)
    with pytest.raises(AtollError, match=said):
        train_expert(run, manifest(run, skip="keys.txt"), "1")
    assert not RunLayout(run).experts.exists()


@pytest.mark.parametrize("text", ["a\nb c\n", "a\r\nb c\r\n", "\ufeffa\n\n b c\n".replace("\n b", "\nb")])
def test_lines_are_keys(tmp_path, text) -> None:
    (tmp_path / "keys.txt").write_bytes(text.encode())
    assert SkipList(tmp_path / "keys.txt").keys == {"a", "b c"}


def test_rows_that_are_left_out_are_never_held_out(run) -> None:
    shards = Shards(RunLayout(run).cluster(1))
    held_out = is_held_out([shards], 0.5).nonzero().flatten().tolist()
    first = shards.keys[held_out[0]]
    view = shards.without([first])
    assert is_held_out([view], 0.5).nonzero().flatten().tolist() == held_out[1:]
    # The fallback for few rows is not a row that is left out.
    (smallest,) = is_held_out([shards], 1e-9).nonzero().flatten().tolist()
    (other,) = is_held_out([shards.without([shards.keys[smallest]])], 1e-9).nonzero().flatten().tolist()
    assert other != smallest
    # A view of a view leaves both out; the shards themselves stay as they are.
    assert len(view.without(shards.keys[:2]).rows()) == len(shards) - len({first, *shards.keys[:2]})
    assert len(shards.rows()) == len(shards)


@pytest.mark.filterwarnings("ignore:.*of 5 keys are in no row")
def test_a_calibration_needs_the_list_of_the_training(run) -> None:
    trained = train_expert(run, manifest(run, skip=listed(run, *GONE)), "1")
    shards, measured = [RunLayout(run).cluster(1)], card(trained)["calibration"]
    with pytest.raises(
        AtollError, match=r"was trained without 4 rows of its data; name the list of their keys by --skip"
    ):
        calibrate_expert(trained, shards)
    wrong = run / listed(run, *GONE[:2], name="wrong.txt")
    with pytest.raises(
        AtollError, match=r"wrong\.txt: leaves 2 rows out, and not the 4 rows that .* was trained without"
    ):
        calibrate_expert(trained, shards, skip=wrong)
    again = calibrate_expert(trained, shards, skip=run / "keys.txt").config()
    assert {key: measured[key] for key in again} == json.loads(json.dumps(again))


@pytest.mark.filterwarnings("ignore:.*keys are in no row")
def test_stackings_and_evaluation_leave_the_rows_out(run, monkeypatch) -> None:
    replica = {"cluster": 1, "name": "second", "objective": {"prediction": "eps", "schedule": "cosine"}}
    content = {**RUN, "train": {**HOLDOUT, "skip": "keys.txt"}, "experts": [RUN["experts"][1], replica]}
    (run / "atoll.yaml").write_text(yaml.safe_dump(content))
    shards = Shards(RunLayout(run).cluster(1))
    # Two of these rows would be held out, and so be measured on.
    held_out = [shards.keys[row] for row in is_held_out([shards], 0.3).nonzero().flatten().tolist()]
    gone = [*held_out[:2], *GONE]
    listed(run, *gone)
    skipping = load_manifest(run)
    for expert in skipping.experts:
        train_expert(run, skipping, expert.full_name)
    train_router(run, skipping)
    measured: list[torch.Tensor] = []

    def measure(experts, latents, *rest, **options):
        measured.append(latents)
        return measure_stacking(experts, latents, *rest, **{**options, "samples": 8})

    monkeypatch.setattr("atoll.assemble.measure_stacking", measure)
    assemble_run(run, skipping)
    rows = [row for row, key in enumerate(shards.keys) if key in held_out and key not in gone]
    assert torch.equal(measured[0], shards.read("latent", torch.tensor(rows)).float())
    # Of the reference, no row that is left out is measured or shown.
    opened = open_run(run, skip="keys.txt")
    settings = EvaluateSettings(images=30, reference=100, held_out=100)
    keys = opened.encoded.keys
    for rows in (*opened.reference.split(settings), opened.reference.held_out(settings)):
        assert {keys[row] for row in rows.tolist()}.isdisjoint(gone)
    assert len(open_run(run).encoded.rows()) == 60


def test_the_command_line_names_a_list(run, monkeypatch, tmp_path) -> None:
    from typer.testing import CliRunner

    from atoll.cli import app

    manifest(run)
    (tmp_path / "lists").mkdir()
    listed(tmp_path / "lists", *CLUSTER_1[:4])
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["train", "expert", "1", "-r", "run", "--skip", "lists/keys.txt", "--quiet"])
    assert done.exit_code == 0, done.output
    training = card(RunLayout(run).expert("1-flow-linear"))["training"]
    assert training["skip"]["keys"] == 4
    assert training["settings"]["skip"] == "../lists/keys.txt"
    failed = CliRunner().invoke(app, ["train", "router", "-r", "run", "--skip", "none.txt", "--quiet"])
    assert "none.txt: cannot be read" in str(failed.exception)
