"""Images of the user's own prompts during training: they cost no bit of the training, and stand on a page."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from atoll.errors import AtollError
from atoll.manifest import ValidationSettings, load_manifest
from atoll.objective import Objective
from atoll.solver import sample
from atoll.storage.artifact import WEIGHTS, read_card
from atoll.storage.cards import ExpertCard
from atoll.train import track
from atoll.train.denoising import Denoising
from atoll.train.expert import train_expert
from atoll.train.router import train_router
from atoll.train.track import read_metrics
from atoll.train.validation_images import ValidationImages, read_prompts, strip_name
from atoll.train.validation_page import ValidationStrips, _spread

NAME = "1-flow-linear"
STATE = f"experts/.train-{NAME}"
PROMPTS = ["moss <& sand>", "rust"]
SETTINGS = {"prompts": PROMPTS, "every": 4, "images": 2, "steps": 2, "guidance_scale": 3.0}


def drawing(run: Path, *, steps: int = 8, **changes: object):
    """The run's manifest with validation images."""
    text = (run / "atoll.yaml").read_text()
    wanted = json.dumps({**SETTINGS, **changes})
    text = text.replace("steps: 8", f"steps: {steps}\n  validation: {wanted}", 1)
    (run / "atoll.yaml").write_text(text)
    return load_manifest(run)


def pixels(file: Path) -> torch.Tensor:
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert("L")))


def strips(run: Path) -> dict[str, list[str]]:
    return {path.name: sorted(file.name for file in path.iterdir()) for path in (run / STATE / "validation").iterdir()}


def test_drawing_changes_no_bit_of_the_training(run, trained_run) -> None:
    train_expert(run, drawing(run), "1")
    mine, other = (load_file(path / "experts" / NAME / WEIGHTS) for path in (run, trained_run))
    assert all(torch.equal(mine[name], other[name]) for name in other)
    cards = [read_card(path / "experts" / NAME, ExpertCard).training for path in (run, trained_run)]
    assert cards[0].mark == cards[1].mark
    assert "validation" not in cards[0].settings  # the prompts are not published with the expert


def test_a_strip_over_time_for_each_prompt(run) -> None:
    train_expert(run, drawing(run), "1")
    names = [f"{step:09d}-{weights}.png" for step in (0, 4, 8) for weights in ("ema", "trained")]
    settings = ValidationSettings(**SETTINGS)
    first, second = (strip_name(number, prompt, settings) for number, prompt in enumerate(PROMPTS))
    assert first.startswith("00-moss-sand-")
    assert strips(run) == {first: names, second: names}
    # Two images of 8 x 4 side by side, from different noise; prompts and weights differ.
    files = {name: pixels(run / STATE / "validation" / first / name) for name in names}
    assert files[names[-1]].shape == (4, 16)
    assert not torch.equal(files[names[-1]][:, :8], files[names[-1]][:, 8:])
    assert not torch.equal(files[names[-1]], files[names[-2]])
    assert not torch.equal(files[names[-1]], pixels(run / STATE / "validation" / second / names[-1]))
    # The log says what it cost.
    lines = [line for line in read_metrics(run / STATE) if "images" in line]
    assert [(line["step"], line["images"]) for line in lines] == [(0, 8), (4, 8), (8, 8)]
    assert all(line["images_seconds"] > 0 for line in lines)


def test_the_page_shows_files_beside_it_without_scripts(run) -> None:
    train_expert(run, drawing(run), "1")
    page = (run / STATE / "validation.html").read_text()
    assert "<script" not in page
    assert "http" not in page
    assert "moss &lt;&amp; sand&gt;" in page
    assert "<& sand" not in page
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(sources) == 2 * 3 * 2
    assert all((run / STATE / source).is_file() for source in sources)


def network(x: torch.Tensor, time: torch.Tensor, condition) -> torch.Tensor:
    """Its output depends on the row alone: text and latent."""
    return x * 0.1 + condition.states.mean((1, 2)).reshape(-1, 1, 1, 1) + time.reshape(-1, 1, 1, 1) / 999


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_what_is_drawn_is_the_guided_sampling_of_the_expert(run, manifest, rows) -> None:
    from atoll.encoders.text import build_encoder
    from atoll.encoders.trust import STRANGER

    seen = []

    class Network(torch.nn.Linear):
        def forward(self, x, time, condition):
            seen.append(len(x))
            return network(x, time, condition)

    encoder = build_encoder(manifest.condition)
    options = {"encoder": encoder, "shape": (1, 4, 8), "codec": {"name": "pixels", "channels": 1}, "trust": STRANGER}
    images = ValidationImages(
        ValidationSettings(**SETTINGS), run, objective=Objective("flow", "linear"), rows=rows, **options
    )
    drawn = images.draw(Network(1, 1), decodes=True)
    assert images.draw(Network(1, 1), decodes=False) is None
    assert max(seen) == {1: 2, 3: 2, 64: 8}[rows]  # of a call: guidance has two rows for an image
    condition, null = encoder([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2), encoder.null(4)

    def velocity(x, t):
        with_text, without = (network(x, 999 * t, c) for c in (condition, null))
        return without + 3.0 * (with_text - without)

    noise = torch.stack([torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)])
    expected = (sample(velocity, noise, steps=2) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)


class Stop(Exception):
    pass


def test_a_resumed_training_has_one_strip(run, tmp_path) -> None:
    def stop(line):
        if line["step"] == 8:
            raise Stop

    whole = shutil.copytree(run, tmp_path / "whole")
    train_expert(whole, drawing(whole, every=2), "1")
    manifest = drawing(run, every=2)
    with pytest.raises(Stop):
        train_expert(run, manifest, "1", progress=stop)
    late = next((run / STATE / "validation").iterdir()) / "000000007-ema.png"
    shutil.copy(late.with_name("000000006-ema.png"), late)  # of a step after the checkpoint
    train_expert(run, manifest, "1", resume=True)
    assert strips(run) == strips(whole)
    for strip, names in strips(run).items():
        for name in names:
            mine, other = (path / STATE / "validation" / strip / name for path in (run, whole))
            assert mine.read_bytes() == other.read_bytes()


def test_a_router_draws_nothing(run) -> None:
    train_router(run, drawing(run))
    assert not (run / ".train-router" / "validation").exists()


def test_prompts_come_from_a_file_of_the_run(run) -> None:
    (run / "prompts.txt").write_text("moss\n\n  a sandy rain \n")
    assert read_prompts("prompts.txt", run) == ("moss", "a sandy rain")
    assert read_prompts(("x",), run) == ("x",)


@pytest.mark.parametrize(
    ("prompts", "content", "message"),
    [
        ("nowhere.txt", None, r"nowhere.txt cannot be read .*one prompt per line"),
        ("blank.txt", b"\n \n", r"blank.txt has no prompt"),
        ("bytes.txt", b"\xff\xfe\x00", r"bytes.txt cannot be read"),
        ([], None, r"train.validation.prompts"),
    ],
)
def test_bad_prompts_are_refused_before_the_training(run, prompts, content, message) -> None:
    if content is not None:
        (run / prompts).write_bytes(content)
    with pytest.raises(AtollError, match=message) as error:
        train_expert(run, drawing(run, prompts=prompts), "1")
    assert "\n" not in str(error.value)


def test_what_the_encoder_cuts_off_is_said(run) -> None:
    with pytest.warns(UserWarning, match="the text encoder does not read the end 'moss rust'"):
        train_expert(run, drawing(run, prompts=["moss sand rain moss rust"], every=8), "1")


def test_a_tracker_gets_each_prompts_strip(run, monkeypatch) -> None:
    images = []

    class Writer:
        def add(self, numbers, step) -> None:
            pass

        def add_image(self, *image) -> None:
            images.append(image)

        def close(self) -> None:
            pass

    monkeypatch.setattr(track, "_writer", lambda *_: Writer())
    train_expert(run, drawing(run), "1")
    assert [(name, tuple(image.shape), prompt, step) for name, image, prompt, step in images[-2:]] == [
        ("validation/00", (1, 8, 16), PROMPTS[0], 8),  # EMA above weights, two images each
        ("validation/01", (1, 8, 16), PROMPTS[1], 8),
    ]


def test_wandb_gets_pixels_last(monkeypatch) -> None:
    logged = {}

    class Wandb:
        Image = staticmethod(lambda pixels, caption: (pixels.shape, caption))

    class Run:
        log = staticmethod(lambda values, step: logged.update({step: values}))

    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
    writer = track._Wandb.__new__(track._Wandb)
    writer._run = Run
    writer.add_image("validation/00", torch.zeros(3, 4, 6), "moss", 5)
    assert logged == {5: {"validation/00": ((4, 6, 3), "moss")}}


def test_the_page_keeps_first_and_last_of_many_steps(tmp_path) -> None:
    assert _spread([1, 2, 3], 24) == [1, 2, 3]
    spread = _spread(list(range(0, 100_000, 1000)), 24)
    assert (spread[0], spread[-1], len(set(spread))) == (0, 99_000, 24)
    strip = ValidationStrips(tmp_path, ["moss"], ValidationSettings(prompts=("moss",)))
    for step in range(30):
        strip.add(step, {"ema": torch.zeros(1, 3, 2, 2)})
    page = (tmp_path / "validation.html").read_text()
    assert page.count("<img") == 24
    assert page.count("<td></td>") == 24  # no image of the weights


@pytest.mark.parametrize("accumulate", [1, 2, 6])
def test_validation_in_parts_gives_the_same_losses(run, monkeypatch, accumulate) -> None:
    text = (run / "atoll.yaml").read_text()
    (run / "atoll.yaml").write_text(text.replace("batch: 6", f"batch: 6\n  accumulate: {accumulate}"))
    largest = []
    validate = Denoising.validate

    def watched(self, module):
        def call(x, *rest):
            largest.append(len(x))
            return module(x, *rest)

        parts = validate(self, call)
        self.rows = 10_000
        whole = validate(self, module)
        assert parts == pytest.approx(whole, rel=1e-5, abs=2e-6)
        assert parts.keys() == whole.keys()
        return parts

    monkeypatch.setattr(Denoising, "validate", watched)
    train_expert(run, load_manifest(run), "1")
    assert max(largest) == 6 // accumulate
