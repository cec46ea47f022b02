"""Paris's directory, of random weights at a small width, into an ensemble: by the function and by the command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.condition import Condition
from atoll.convert.paris import CODEC, CONDITION, convert_paris, is_paris
from atoll.ensemble.loading import load_ensemble, load_expert, load_router
from atoll.errors import AtollError
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard, RouterCard
from tests.nn.test_paris import layout, released_expert, released_router, router_layout

B, C, SIDE, L, STATES, K, HEADS = 3, 3, 8, 5, 10, 4, 3
HASH = {"name": "hash", "dim": STATES, "length": L}
PIXELS = {"name": "pixels", "channels": C}


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("released") / "paris"
    for number in range(K):
        place = directory / f"expert_{number}"
        place.mkdir(parents=True)
        save_file(random_weights(layout(), number), place / "diffusion_pytorch_model.safetensors")
        (place / "config.json").write_text(json.dumps({"hidden_size": 24, "use_flow": True}))
    (directory / "router").mkdir()
    save_file(random_weights(router_layout(), 9), directory / "router" / "pytorch_model.safetensors")
    (directory / "vae").mkdir()
    return directory


@pytest.fixture
def paris(released, tmp_path) -> Path:
    return shutil.copytree(released, tmp_path / "paris")


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, C, SIDE, SIDE, generator=g, dtype=dtype)
    condition = Condition(torch.randn(B, L, STATES, generator=g, dtype=dtype), torch.ones(B, L, dtype=torch.bool))
    return x, torch.tensor([0.1, 0.5, 1.0], dtype=dtype), condition


def tensors(file: Path) -> dict[str, Tensor]:
    return {name: value.double() for name, value in load_file(file).items()}


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def edit(file: Path, **changes: Tensor | None) -> None:
    changed = load_file(file) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value.contiguous() for name, value in changed.items() if value is not None}, file)


def test_experts_and_router_compute_what_the_release_does(paris, tmp_path) -> None:
    experts, router = convert_paris(paris, tmp_path / "out", heads=HEADS)
    assert [path.relative_to(tmp_path).as_posix() for path in experts] == [f"out/experts/{k}" for k in range(K)]
    x, t, condition = inputs(torch.float64)
    for number, path in enumerate(experts):
        loaded = load_expert(path)
        loaded.expert.network.double()
        weights = tensors(paris / f"expert_{number}" / "diffusion_pytorch_model.safetensors")
        expected = released_expert(weights, x, 1000 * t, condition.states, HEADS)
        # The output is the velocity on Atoll's own path: nothing is turned round, and the time fed is 0..1000.
        assert relative_error(loaded.expert.velocity(x, t, condition), expected) < 1e-9
        assert loaded.expert.clusters == (number,)
    weights = tensors(paris / "router" / "pytorch_model.safetensors")
    assert relative_error(load_router(router).double()(x, t).exp(), released_router(weights, x, 1000 * t, HEADS)) < 1e-9


def test_the_scheduler_of_diffusers_walks_the_same_path(paris, tmp_path) -> None:
    """FlowMatchEulerDiscreteScheduler over the released forward, and Atoll's Euler over the converted expert."""
    diffusers = pytest.importorskip("diffusers")
    from atoll.solver import sample

    experts, _ = convert_paris(paris, tmp_path / "out", heads=HEADS)
    expert = load_expert(experts[1]).expert
    weights = load_file(paris / "expert_1" / "diffusion_pytorch_model.safetensors")
    x, _, condition = inputs()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    sigmas = torch.linspace(1, 0, 6)[:-1].tolist()  # Atoll's steps; its own default is the same but for the last 0.001
    scheduler.set_timesteps(sigmas=sigmas)
    theirs = x
    for time in scheduler.timesteps:
        output = released_expert(weights, theirs, time.expand(B), condition.states, HEADS)
        theirs = scheduler.step(output, time, theirs).prev_sample
    ours = sample(lambda y, t: expert.velocity(y, t, condition), x, 5, "euler")
    assert relative_error(ours, theirs) < 1e-3


def test_cards_say_what_the_release_was_trained_with(paris, tmp_path) -> None:
    """Neither CLIP nor the autoencoder is loaded: their names go into the cards."""
    experts, router = convert_paris(paris, tmp_path / "out", heads=HEADS)
    card, routing = read_card(experts[3], ExpertCard).plain(), read_card(router, RouterCard).plain()
    assert (card["name"], card["clusters"], card["k"], routing["clusters"]) == ("paris-3", [3], K, K)
    objective = card["objective"]
    assert (objective["prediction"], objective["schedule"], objective["time_scale"]) == (
        "flow",
        {"name": "linear"},
        1000.0,
    )
    assert card["condition"] == CONDITION == {"name": "clip", "weights": "openai/clip-vit-large-patch14"}
    assert card["codec"] == CODEC
    assert CODEC["scale"] == 0.18215
    assert card["latent_shape"] == routing["latent_shape"] == [C, SIDE, SIDE]
    assert card["assignment"] == routing["assignment"]
    assert list(card["conversion"]["source"]) == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("words", [["paris", "DIR"], ["DIR"], ["DIR", "--kind", "paris"]], ids=" ".join)
def test_the_command_makes_an_ensemble_that_samples(atoll, paris, words) -> None:
    flags = ("--heads", HEADS, "--condition", "hash,dim=10,length=5", "--codec", "pixels,channels=3")
    code, text, error = atoll("convert", *(paris if w == "DIR" else w for w in words), "-o", "out", *flags)
    assert (code, error) == (0, "")
    assert text == "out written: an ensemble of Paris's 4 experts and its router\n"
    assert sorted(path.name for path in Path("out").iterdir()) == ["ensemble.json", "experts", "router"]
    loaded = load_ensemble("out", strict=True)
    assert loaded.card.plain()["sampling"]["guidance_scale"] == 7.5
    assert loaded.ensemble.routing == "top-2"
    x, t, _ = inputs()
    u = loaded.ensemble.velocity(x, t, loaded.encoder(["", "moss", "rain"]), guidance_scale=7.5)
    assert u.isfinite().all()


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        ("pixels,channels=4", "codec 'pixels': channels: Input should be 1 or 3"),
        ("pixels,channels=1", "codec: 'pixels' has latents of 1 channels, Paris's have 3; name sd-vae-ft-mse"),
        ("vq", "unknown codec 'vq'"),
    ],
)
def test_a_codec_that_no_loader_takes_is_refused(atoll, paris, codec, words) -> None:
    code, _, error = atoll("convert", paris, "-o", "out", "--heads", HEADS, "--codec", codec)
    assert code == 2
    assert words in error
    assert not Path("out").exists()


def test_top_1_is_the_likeliest_experts_velocity(paris, tmp_path) -> None:
    from atoll.assemble import assemble

    experts, router = convert_paris(paris, tmp_path / "out", HASH, PIXELS, HEADS)
    ensemble = load_ensemble(assemble(experts, router, tmp_path / "out"), routing="top-1").ensemble
    for network in (ensemble.router, *(expert.network for expert in ensemble.experts)):
        network.double()
    x, t, condition = inputs(torch.float64)
    probable = released_router(tensors(paris / "router" / "pytorch_model.safetensors"), x, 1000 * t, HEADS)
    u = ensemble.velocity(x, t, condition)
    for row, number in enumerate(probable.argmax(1).tolist()):
        weights = tensors(paris / f"expert_{number}" / "diffusion_pytorch_model.safetensors")
        one = slice(row, row + 1)
        expected = released_expert(weights, x[one], 1000 * t[one], condition.states[one], HEADS)
        assert relative_error(u[one], expected) < 1e-9


def test_a_release_that_is_not_all_there(paris, tmp_path) -> None:
    shutil.rmtree(paris / "expert_2")
    with pytest.warns(UserWarning, match="expert_2 not there; the others take their weight"):
        experts, _ = convert_paris(paris, tmp_path / "out", heads=HEADS)
    assert [path.name for path in experts] == ["0", "1", "3"]
    (paris / "expert_7").mkdir()
    with pytest.raises(AtollError, match="expert_7, and the router knows 4 clusters, 0 to 3"):
        convert_paris(paris, tmp_path / "b", heads=HEADS)
    for number in (0, 1, 3, 7):
        shutil.rmtree(paris / f"expert_{number}")
    with pytest.raises(AtollError, match="no expert_0, expert_1"):
        convert_paris(paris, tmp_path / "b", heads=HEADS)
    assert not is_paris(paris)
    shutil.rmtree(paris / "router")
    with pytest.raises(AtollError, match=r"no router/pytorch_model\.safetensors; expected Paris's directory"):
        convert_paris(paris, tmp_path / "b", heads=HEADS)
    with pytest.raises(AtollError, match="exists already"):
        convert_paris(paris, tmp_path / "out", heads=HEADS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers__1__attn__in_proj_bias": None}, r"layers\.1\.attn\.in_proj_bias: missing, expected \[72\]"),
        ({"layers__0__mlp__2__weight": torch.zeros(24, 95)}, r"float32 \[24, 95\], expected \[24, 96\]"),
        ({"text_proj__bias": torch.zeros(24, dtype=torch.int64)}, r"text_proj\.bias: int64 \[24\], expected \[24\]"),
        ({"y_embedder__weight": torch.zeros(3)}, r"y_embedder\.weight: unknown"),
        ({"pos_embed": torch.zeros(1, 15, 24)}, r"pos_embed has 15 positions; expected a square's"),
        ({"pos_embed": torch.zeros(1, 4, 24)}, r"its latents are \[3, 4, 4\], the router's \[3, 8, 8\]"),
        ({"pos_embed": None}, r"pos_embed is missing"),
        ({"final_layer__linear__weight": torch.zeros(16, 24)}, r"float32 \[16, 24\], expected \[12, 24\]"),
        ({"text_proj__weight": torch.zeros(24, 9)}, r"its states are 10 wide, those of .*expert_3 9"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_written(paris, tmp_path, changes, message) -> None:
    edit(paris / "expert_3" / "diffusion_pytorch_model.safetensors", **changes)
    with pytest.raises(AtollError, match=message) as raised:
        convert_paris(paris, tmp_path / "out", HASH, heads=HEADS)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["paris"]


def test_a_router_that_does_not_fit_is_named(paris, tmp_path) -> None:
    file = paris / "router" / "pytorch_model.safetensors"
    edit(file, head__2__weight=torch.zeros(23))
    with pytest.raises(AtollError, match=r"head\.2\.weight: float32 \[23\], expected \[24\]"):
        convert_paris(paris, tmp_path / "out", heads=HEADS)
    edit(file, head__4__weight=None)
    with pytest.raises(AtollError, match=r"head\.4\.weight is missing"):
        convert_paris(paris, tmp_path / "out", heads=HEADS)


def test_heads_are_asked_for_where_no_tensor_tells_them(paris, tmp_path) -> None:
    with pytest.raises(AtollError, match=r"width 24 and depth 2 are none of DiT's sizes.*say how many"):
        convert_paris(paris, tmp_path / "out")
    with pytest.raises(AtollError, match="width 24, heads 5"):
        convert_paris(paris, tmp_path / "out", heads=5)


@pytest.mark.parametrize(
    "flags",
    [["--objective", "flow"], ["--run", "r", "--expert", "0"], ["--cluster", "1"], ["--size", "8"], ["--keep"]],
    ids=" ".join,
)
def test_what_the_release_tells_is_not_to_be_told(atoll, paris, flags) -> None:
    code, text, error = atoll("convert", paris, "-o", "out", *flags)
    assert (code, text) == (2, "")
    assert "Paris needs only --condition, --codec and --heads" in error
    assert not Path("out").exists()


@settings(max_examples=25)
@given(data=st.data())
def test_any_tensor_of_any_shape_is_taken_or_refused_in_one_line(released, tmp_path_factory, data) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    directory = shutil.copytree(released, root / "paris")
    part = data.draw(st.sampled_from(["expert_0/diffusion_pytorch_model", "router/pytorch_model"]))
    file = directory / f"{part}.safetensors"
    name = data.draw(st.sampled_from(sorted(load_file(file))))
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    assume(tuple(shape) != load_file(file)[name].shape)
    save_file(load_file(file) | {name: torch.zeros(shape)}, file)
    try:
        convert_paris(directory, root / "out", heads=HEADS)
    except AtollError as error:
        assert "\n" not in str(error)  # noqa: PT017 - the other outcome is as good
    else:
        raise AssertionError(f"{name} of shape {shape} was taken")
