"""SiT and REPA in DiT's layout: their velocity in our convention of time, and which of the three a checkpoint is."""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.convert import convert
from atoll.convert.dit import from_dit
from atoll.convert.modulation import TIMES as TIMES_FITTED
from atoll.convert.modulation import activations
from atoll.convert.read import Checkpoint
from atoll.convert.sit import reversed_columns, reversed_time
from atoll.encoders.text import HashEncoder
from atoll.ensemble.loading import load_expert
from atoll.errors import AtollError
from atoll.nn.dit import TIME_PERIOD, time_features
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard
from tests.convert.conftest import random_weights
from tests.convert.test_dit import CHANNELS, CLASSES, HASH, HEADS, published

B = 3
TIMES = torch.tensor([0.0, 0.371, 1.0])
SIT = argparse.Namespace(model="SiT-XL/2", path_type="Linear", prediction="velocity", num_classes=CLASSES, lr=1e-4)
REPA = argparse.Namespace(model="SiT-XL/2", path_type="linear", prediction="v", enc_type="dinov2-vit-b")
DIT = argparse.Namespace(model="DiT-XL/2", image_size=256, num_classes=CLASSES)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {name: value / 2 for name, value in random_weights().items()}


def without_variance(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = {name: weights[name] for name in ("final_layer.linear.weight", "final_layer.linear.bias")}
    return weights | {name: value.unflatten(0, (4, -1))[:, :CHANNELS].flatten(0, 1) for name, value in rows.items()}


def saved(tmp_path: Path, weights: dict[str, Tensor], args: object = None, name: str = "0400000.pt") -> Path:
    torch.save({"model": {k: v + 1 for k, v in weights.items()}, "ema": weights, "args": args}, tmp_path / name)
    return tmp_path / name


def latents() -> Tensor:
    return torch.randn(B, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(1))


def velocity(out: Path, x: Tensor, t: Tensor) -> Tensor:
    """The expert's network at times t of ours, in float64."""
    expert = load_expert(out).expert
    condition = HashEncoder(dim=10, length=4).null(len(x))
    return expert.network.double()(x.double(), t.double() * expert.objective.time_scale, condition)


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def converted(source: Path, tmp_path: Path, **options: object) -> Path:
    return convert(source, tmp_path / "e", **{"condition": HASH, "heads": HEADS, "modulation": "per-block"} | options)


@pytest.mark.parametrize("kind", ["sit", "auto"])
def test_sit_is_its_velocity_with_time_and_sign_reversed(weights, tmp_path, kind) -> None:
    out = converted(saved(tmp_path, weights, SIT if kind == "auto" else None), tmp_path, kind=kind)
    x = latents()
    expected = -published(weights, x, 1 - TIMES, CLASSES)[:, :CHANNELS]
    assert error(velocity(out, x, TIMES), expected) < 1e-6
    card = read_card(out, ExpertCard).plain()
    assert (card["conversion"]["kind"], card["conversion"]["weights"]) == ("sit", "ema")
    objective = card["objective"]
    assert (objective["prediction"], objective["schedule"], objective["time_scale"]) == ("flow", {"name": "linear"}, 1)


def test_repa_is_its_velocity_as_it_is(weights, tmp_path) -> None:
    projectors = {"projectors.0.0.weight": torch.ones(5, 24), "projectors.0.0.bias": torch.ones(5)}
    x, plain = latents(), without_variance(weights)
    expected = published(plain, x, TIMES, CLASSES)
    for number, (source, options) in enumerate(
        (
            (saved(tmp_path, plain | projectors), {}),
            (saved(tmp_path, plain, REPA, "a.pt"), {}),
            (saved(tmp_path, plain, None, "b.pt"), {"kind": "repa"}),
            (
                saved(tmp_path, plain, None, "c.pt"),
                {"objective": {"prediction": "flow", "schedule": "linear", "time_scale": 1.0}},
            ),
        )
    ):
        out = convert(source, tmp_path / str(number), condition=HASH, heads=HEADS, modulation="per-block", **options)
        assert error(velocity(out, x, TIMES), expected) < 1e-6
        assert read_card(out, ExpertCard).plain()["conversion"]["kind"] == "repa"


def test_gvp_and_noise_are_other_objectives(weights, tmp_path) -> None:
    """GVP's alpha is sin(pi s / 2), so cos(pi t / 2) here; a noise prediction has no direction in time."""
    args = argparse.Namespace(path_type="GVP", prediction="velocity")
    expert = load_expert(converted(saved(tmp_path, weights, args), tmp_path)).expert
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    torch.testing.assert_close(expert.objective.schedule.alpha(t), torch.cos(torch.pi * t / 2), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(expert.objective.schedule.sigma(t), torch.sin(torch.pi * t / 2), rtol=1e-6, atol=1e-7)
    args = argparse.Namespace(path_type="Linear", prediction="noise")
    out = convert(saved(tmp_path, weights, args), tmp_path / "n", condition=HASH, heads=HEADS, modulation="per-block")
    assert read_card(out, ExpertCard).objective["prediction"] == "eps"
    x = latents()
    assert error(velocity(out, x, TIMES), published(weights, x, 1 - TIMES, CLASSES)[:, :CHANNELS]) < 1e-6


@pytest.mark.parametrize(
    ("args", "kind"), [(SIT, "sit"), (REPA, "repa"), (DIT, "dit"), (argparse.Namespace(path_type="VP"), "sit")]
)
def test_the_training_arguments_decide(weights, tmp_path, args, kind) -> None:
    source = saved(tmp_path, weights, args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left to guess
        out = converted(source, tmp_path, objective={"prediction": "flow", "schedule": "linear"})
    assert read_card(out, ExpertCard).plain()["conversion"]["kind"] == kind


@pytest.mark.parametrize(
    "args", [argparse.Namespace(path_type="VP"), argparse.Namespace(**vars(SIT) | {"prediction": "score"})]
)
def test_a_path_or_prediction_without_an_objective_is_named(weights, tmp_path, args) -> None:
    with pytest.raises(
        AtollError, match=r"trained with path '(VP|Linear)' and prediction '(velocity|score)'; expected"
    ):
        converted(saved(tmp_path, weights, args), tmp_path)


def test_what_could_be_either_is_said_and_the_kind_asked_for(weights, tmp_path) -> None:
    # With variance outputs it is what DiT is by default, and a warning says what it could be as well.
    with pytest.warns(UserWarning, match=r"read as a DiT; a SiT has the same tensors.*--kind sit"):
        out = converted(saved(tmp_path, weights), tmp_path)
    assert read_card(out, ExpertCard).plain()["conversion"]["kind"] == "dit"
    # Nothing looks like a DiT here.
    never = {name: value.clone() for name, value in weights.items()}
    for part in ("weight", "bias"):
        never[f"final_layer.linear.{part}"].unflatten(0, (4, 2, CHANNELS))[:, 1] = 0
    for number, (changed, name, reason) in enumerate(
        (
            (without_variance(weights), "x.pt", "could be a DiT, a SiT or REPA's .*no variance outputs"),
            (never, "x.pt", "could be a DiT, a SiT or REPA's .*never trained"),
            (weights, "SiT-XL-2-256x256.pt", "its name says 'sit'"),
            (weights, "repa_last.pt", "its name says 'repa'"),
        )
    ):
        with pytest.raises(AtollError, match=rf"{reason}.*say which it is: --kind dit, sit or repa"):
            convert(saved(tmp_path, changed, None, name), tmp_path / str(number), condition=HASH, heads=HEADS)


def test_a_checkpoint_of_pixels_is_a_dit_even_without_variance_outputs(tmp_path) -> None:
    pixels = random_weights(channels=3)
    for part in ("weight", "bias"):
        rows = pixels[f"final_layer.linear.{part}"].unflatten(0, (4, -1))
        pixels[f"final_layer.linear.{part}"] = rows[:, :3].flatten(0, 1).clone()
    with pytest.warns(UserWarning, match="read as a DiT"):
        out = converted(saved(tmp_path, pixels), tmp_path)
    assert load_expert(out).expert.network.config.channels == 3


def test_a_name_that_says_dit_needs_no_warning(weights, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted(saved(tmp_path, weights, None, "DiT-XL-2-256x256.pt"), tmp_path)


def test_a_kind_against_the_training_arguments_is_a_warning(weights, tmp_path) -> None:
    with pytest.warns(UserWarning, match="read as a 'dit', as requested; its training arguments are those of a 'sit'"):
        converted(saved(tmp_path, weights, SIT), tmp_path, kind="dit")


@pytest.mark.parametrize(("kind", "scale", "range_"), [("sit", 999.0, "0..1"), ("dit", 1.0, "0..999")])
def test_times_of_another_range_are_refused(weights, tmp_path, kind, scale, range_) -> None:
    objective = {"prediction": "flow", "schedule": "linear", "time_scale": scale}
    with pytest.raises(AtollError, match=rf"time_scale: got {scale}; a '{kind}' reads time as {range_}"):
        converted(saved(tmp_path, weights), tmp_path, kind=kind, objective=objective)


def test_the_fit_looks_at_sits_own_times(weights) -> None:
    native = reversed_time(from_dit(Checkpoint(weights, None, {}, "here"), heads=HEADS, classes=CLASSES), negate=True)
    w = {name: value.double() for name, value in weights.items()}
    hidden = time_features(1 - torch.linspace(0, 1, TIMES_FITTED, dtype=torch.float64)) @ w["t_embedder.mlp.0.weight"].T
    hidden = F.silu(hidden + w["t_embedder.mlp.0.bias"]) @ w["t_embedder.mlp.2.weight"].T + w["t_embedder.mlp.2.bias"]
    expected = F.silu(hidden + w["y_embedder.embedding_table.weight"][-1])
    torch.testing.assert_close(activations(native), expected, rtol=1e-5, atol=1e-5)


def test_a_fit_of_proportional_blocks_is_exact(weights, tmp_path) -> None:
    first = {part: weights[f"blocks.0.adaLN_modulation.1.{part}"] for part in ("weight", "bias")}
    for i in range(3):
        weights |= {f"blocks.{i}.adaLN_modulation.1.{part}": value for part, value in first.items()}
    out = converted(saved(tmp_path, weights), tmp_path, kind="sit", modulation="fit")
    assert max(read_card(out, ExpertCard).plain()["conversion"]["residual"]) < 1e-6
    x = latents()
    assert error(velocity(out, x, TIMES), -published(weights, x, 1 - TIMES, CLASSES)[:, :CHANNELS]) < 1e-5


@given(st.floats(0, 1), st.integers(0, 9))
def test_reversed_columns_read_the_reversed_time(t, seed) -> None:
    weight = torch.randn(5, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    time = torch.tensor([t], dtype=torch.float64)
    got = time_features(time) @ reversed_columns(weight, TIME_PERIOD).T
    torch.testing.assert_close(got, time_features(1 - time) @ weight.T)


# Without label dropout a DiT has no null class.


def table(rows: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    values = torch.randn(rows, 24, generator=torch.Generator().manual_seed(2)) / 4
    return lambda weights: weights | {"y_embedder.embedding_table.weight": values}


@pytest.mark.parametrize("told", ["arguments", "classes"])
def test_without_a_null_class_the_mean_of_the_classes_takes_its_place(weights, tmp_path, told) -> None:
    weights = table(10)(weights)
    args = argparse.Namespace(model="DiT-S/8", num_classes=10) if told == "arguments" else None
    options = {"classes": 10} if told == "classes" else {}
    with pytest.warns(UserWarning, match="has no null class; the mean of 10 classes takes its place"):
        out = converted(saved(tmp_path, weights, args), tmp_path, kind="dit", **options)
    mean = weights["y_embedder.embedding_table.weight"].mean(0, keepdim=True)
    x = latents()
    expected = published(weights | {"y_embedder.embedding_table.weight": mean}, x, 999 * TIMES, 0)[:, :CHANNELS]
    assert error(velocity(out, x, TIMES), expected) < 1e-6
    conversion = read_card(out, ExpertCard).plain()["conversion"]
    assert (conversion["classes"], conversion["null"]) == (10, "the mean of 10 classes")


def test_as_many_embeddings_as_usual_classes_are_asked_about(weights, tmp_path) -> None:
    weights = table(10)(weights)
    with pytest.raises(
        AtollError, match=r"10 class embeddings: 10 classes and no null class, or 9 and one\? Say --class"
    ):
        converted(saved(tmp_path, weights), tmp_path, kind="dit")
    out = converted(saved(tmp_path, weights), tmp_path, kind="dit", classes=9)
    assert "null" not in read_card(out, ExpertCard).plain()["conversion"]
    x = latents()
    assert error(velocity(out, x, TIMES), published(weights, x, 999 * TIMES, 9)[:, :CHANNELS]) < 1e-6


@settings(max_examples=20)
@given(st.integers(2, 60), st.integers(1, 60))
def test_other_numbers_of_classes_are_refused(weights, tmp_path, rows, classes) -> None:
    source = saved(tmp_path, table(rows)(weights), argparse.Namespace(model="DiT-S/8", num_classes=classes))
    if classes in (rows, rows - 1):
        return
    with pytest.raises(AtollError, match=f"{rows} class embeddings, {classes} classes; expected {rows - 1} and a null"):
        converted(source, tmp_path)


def test_the_command_says_what_it_read(atoll, weights, tmp_path) -> None:
    saved(tmp_path, weights, SIT)
    flags = ("--condition", "hash,dim=10,length=4", "--heads", HEADS, "--modulation", "per-block")
    code, text, error_ = atoll("convert", "0400000.pt", "-o", "e", *flags)
    assert (code, text, error_) == (0, "e written: from sit (ema), flow on linear, per-block (exact)\n", "")
    saved(tmp_path, weights)
    code, text, error_ = atoll("convert", "0400000.pt", "-o", "f", *flags)
    assert code == 0
    assert "atoll: warning: 0400000.pt: read as a DiT" in error_
