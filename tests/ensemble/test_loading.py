"""Experts, routers and ensembles from disk: hashes, missing parts, cards with anything in them."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.assemble import assemble
from atoll.ensemble.loading import load_ensemble, load_expert
from atoll.errors import AtollError
from atoll.storage.artifact import CARD, WEIGHTS


@pytest.fixture
def run(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run")


def edit(file, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_loaded_expert_is_as_it_was_trained(run) -> None:
    loaded = load_expert(run / "experts" / "0-eps-cosine")
    assert loaded.expert.objective.prediction == "eps"
    assert loaded.expert.clusters == (0,)
    assert loaded.expert.calibration is not None
    assert not any(p.requires_grad for p in loaded.expert.network.parameters())


def test_a_run_can_be_moved_to_another_directory(run, tmp_path) -> None:
    moved = run.rename(tmp_path / "elsewhere")
    assert len(load_ensemble(moved / "ensemble").ensemble.experts) == 3


def test_a_tampered_weight_file_is_refused(run) -> None:
    file = run / "experts" / "1-flow-linear" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(AtollError, match=r"1-flow-linear.*sha256"):
        load_ensemble(run / "ensemble")


@pytest.mark.parametrize(("part", "change"), [("experts/1-flow-linear", {"clusters": [0]}), ("router", {"k": 4})])
def test_a_tampered_card_is_refused(run, part, change) -> None:
    edit(run / part / CARD, **change)
    with pytest.raises(AtollError, match=rf"{part}.*is not the one that was assembled"):
        load_ensemble(run / "ensemble")


def test_a_missing_expert_is_a_warning_or_with_strict_an_error(run) -> None:
    shutil.rmtree(run / "experts" / "1-flow-linear")
    with pytest.warns(UserWarning, match="1-flow-linear is missing"):
        loaded = load_ensemble(run / "ensemble")
    x, t = torch.randn(4, 1, 4, 8), torch.full((4,), 0.5)
    assert torch.isfinite(loaded.ensemble.velocity(x, t, loaded.encoder(["moss"] * 4))).all()
    with pytest.raises(AtollError, match="--strict"):
        load_ensemble(run / "ensemble", strict=True)


def test_no_experts_or_no_router_is_an_error(run) -> None:
    shutil.rmtree(run / "router")
    with pytest.raises(AtollError, match="router"):
        load_ensemble(run / "ensemble")
    shutil.rmtree(run / "experts")
    with pytest.warns(UserWarning, match="missing"), pytest.raises(AtollError, match="none of its 3 experts"):
        load_ensemble(run / "ensemble")


@pytest.mark.parametrize("key", ["experts", "router", "codec", "latent_shape", "sampling"])
def test_an_ensemble_json_that_lacks_a_key_is_refused(run, key) -> None:
    file = run / "ensemble" / "ensemble.json"
    card = json.loads(file.read_text())
    del card[key]
    file.write_text(json.dumps(card))
    with pytest.raises(AtollError, match=key):
        load_ensemble(run / "ensemble")


def test_an_ensemble_of_another_format_is_refused(run) -> None:
    edit(run / "ensemble" / "ensemble.json", format=7)
    with pytest.raises(AtollError, match=r"ensemble.json: format 7.*update atoll"):
        load_ensemble(run / "ensemble")


def test_a_card_of_an_unknown_network_is_refused(run) -> None:
    path = run / "experts" / "1-flow-linear"
    card = json.loads((path / CARD).read_text())
    for network in ({"name": "unet"}, {**card["network"], "depth": 2}, {**card["network"], "colour": 1}):
        edit(path / CARD, network=network)
        with pytest.raises(AtollError):
            load_expert(path)


def test_parts_with_different_assignments_are_not_assembled(run, tmp_path) -> None:
    experts = [run / "experts" / name for name in ("0-eps-cosine", "1-flow-linear")]
    edit(experts[1] / CARD, assignment="another")
    with pytest.raises(AtollError, match="assignment"):
        assemble(experts, run / "router", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(AtollError, match="kind 'router'"):
        assemble([run / "router"], None, tmp_path / "out")
    with pytest.raises(AtollError, match="no experts"):
        assemble([], None, tmp_path / "out")


def test_a_single_expert_loads_as_an_ensemble(run) -> None:
    loaded = load_ensemble(run / "monolith")
    x, t = torch.randn(4, 1, 4, 8), torch.full((4,), 0.5)
    u = loaded.ensemble.velocity(x, t, loaded.encoder(["moss"] * 4), guidance_scale=2.0)
    assert torch.isfinite(u).all()
    with pytest.raises(AtollError, match=r"no ensemble\.json"):
        load_ensemble(run)


JUNK = st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2) | st.just({"name": "x"})


@settings(max_examples=120)
@given(data=st.data())
def test_a_fuzzed_card_loads_or_is_refused_in_one_line(trained_run, tmp_path, data) -> None:
    """Fuzz: one value anywhere in the card replaced by junk, the hash of the weights left as it is."""
    source = trained_run / "experts" / "1-flow-linear"
    card = json.loads((source / CARD).read_text())
    place, key = card, data.draw(st.sampled_from(sorted(card)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place, key = place[key], data.draw(st.sampled_from(sorted(place[key])))
    place[key] = data.draw(JUNK)
    (tmp_path / WEIGHTS).unlink(missing_ok=True)
    (tmp_path / WEIGHTS).hardlink_to(source / WEIGHTS)
    (tmp_path / CARD).write_text(json.dumps(card))
    message = ""
    try:
        load_expert(tmp_path)
    except AtollError as error:
        message = str(error)
    assert "\n" not in message


def test_loading_an_uncalibrated_eps_expert_warns(run) -> None:
    path = run / "experts" / "0-eps-cosine"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_ensemble(path)
    edit(path / CARD, calibration=None)
    with pytest.warns(UserWarning, match="0-eps-cosine: an eps-expert without calibration; its x0 is clamped"):
        loaded = load_ensemble(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an option of the same ensemble is no new choice
        replace(loaded.ensemble, routing="top-1")
        load_ensemble(path, alignment="native")
