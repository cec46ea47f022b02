"""train.init: an expert that starts from another one's weights."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from atoll.artifact import WEIGHTS, read_card
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.train.expert import train_expert


def begin_from(run, path: str, more: str = "") -> None:
    text = (run / "atoll.yaml").read_text()
    (run / "atoll.yaml").write_text(text.replace("steps: 8", f"steps: 8\n  init: {path}{more}"))


def test_training_begins_with_the_weights_and_the_card_says_whose(run, trained_run) -> None:
    """With a learning rate of next to nothing, what comes out is what went in; the objective is another one."""
    shutil.copytree(trained_run / "experts/0-eps-cosine", run / "foreign")
    begin_from(run, "foreign", "\n  lr: 1.0e-12")
    path = train_expert(run, load_manifest(run), "1")
    mine, other = load_file(path / WEIGHTS), load_file(run / "foreign" / WEIGHTS)
    for name in other:
        if name.startswith("network."):
            torch.testing.assert_close(mine[name], other[name], rtol=0, atol=1e-10)
    told = read_card(path, "expert")["training"]["init"]
    assert told == {"name": "0-eps-cosine", "sha256": read_card(run / "foreign", "expert")["weights"]["sha256"]}


def test_other_weights_at_the_same_place_are_another_training(run, trained_run) -> None:
    shutil.copytree(trained_run / "experts/0-eps-cosine", run / "foreign")
    begin_from(run, "foreign")
    train_expert(run, load_manifest(run), "1")
    train_expert(run, load_manifest(run), "1", resume=True)
    shutil.rmtree(run / "foreign")
    shutil.copytree(trained_run / "experts/2-x0-linear-beta", run / "foreign")
    with pytest.raises(AtollError, match="other settings"):
        train_expert(run, load_manifest(run), "1", resume=True)


def test_a_network_that_differs_is_refused_by_its_keys(run, trained_run) -> None:
    begin_from(run, str(trained_run / "experts/0-eps-cosine"))
    text = (run / "atoll.yaml").read_text()
    (run / "atoll.yaml").write_text(text.replace("depth: 1", "depth: 2", 1).replace("width: 16", "width: 32", 1))
    with pytest.raises(AtollError, match=r"width 16 \(here 32\), depth 1 \(here 2\)") as error:
        train_expert(run, load_manifest(run), "1")
    assert "\n" not in str(error.value)


def test_no_expert_there_is_one_line(run) -> None:
    begin_from(run, "nowhere")
    with pytest.raises(AtollError, match=r"nowhere.card.json: not found"):
        train_expert(run, load_manifest(run), "1")
