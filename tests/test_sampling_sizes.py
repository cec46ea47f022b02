"""Sampling at any size, on a shifted grid: the pipeline, files, the engine of the server, diffusers, the command."""

import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import atoll
from atoll.assemble import assemble_run
from atoll.cli import app
from atoll.diffusers import AtollPipeline
from atoll.errors import AtollError
from atoll.image_settings import read_settings
from atoll.image_size import ImageSize
from atoll.manifest import load_manifest
from atoll.pipeline import Pipeline
from atoll.serve.engine import Engine
from atoll.serve.types import Failed, Finished, ImageRequest
from atoll.solver import shifted_times
from atoll.train.expert import train_expert
from atoll.train.router import train_router
from tests.conftest import RUN
from tests.train.sized import write_sized_run

SHIFTS = (2.0, {"rule": "sd3", "base_tokens": 2}, None)  # of the experts; the main size has 8 tokens
MEAN = (2.0 * 2.0 * 1.0) ** (1 / 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    experts = [
        {**expert, "objective": {**expert["objective"], "shift": shift}}
        for expert, shift in zip(RUN["experts"], SHIFTS, strict=True)
    ]
    path = write_sized_run(tmp_path_factory.mktemp("sized") / "run", experts=experts)
    manifest = load_manifest(path)
    for k in range(3):
        train_expert(path, manifest, str(k))
    train_router(path, manifest)
    assemble_run(path, manifest)
    return path


@pytest.fixture(scope="module")
def pipe(run) -> Pipeline:
    return Pipeline.from_pretrained(run / "ensemble")


def test_every_trained_size_is_sampled_without_a_word(pipe, recwarn) -> None:
    sizes = pipe.loaded.sizes
    assert list(map(str, sizes.trained)) == ["8x4", "12x2", "4x8"]
    assert (sizes.main, sizes.step) == (ImageSize(4, 8), 2)
    for size in sizes.trained:
        out = pipe(["moss", "rain"], seeds=[1, 2], num_inference_steps=3, height=size.height, width=size.width)
        assert [image.size for image in out.images] == [(size.width, size.height)] * 2
        assert out.latents.isfinite().all()
    assert [str(one.message) for one in recwarn] == []
    # A side that is not named is the main size's.
    plain = pipe("moss", seeds=[1]).latents
    assert torch.equal(pipe("moss", seeds=[1], height=4).latents, plain)
    assert torch.equal(pipe("moss", seeds=[1], width=8).latents, plain)


def test_another_size_is_sampled_with_a_warning(pipe) -> None:
    with pytest.warns(UserWarning, match=r"no expert was trained for images of 10x2; the nearest .* is 12x2") as warned:
        assert pipe("moss", seeds=[0], num_inference_steps=2, height=2, width=10).images[0].size == (10, 2)
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"height": 3}, r"size: 8x3, expected sides that are multiples of 2; the nearest is 8x"),
        ({"width": 0}, "size: height 4, width 0; expected whole numbers of pixels"),
        ({"width": 8.0}, "width 8.0; expected whole numbers"),
        ({"height": 2**20}, "size: 8x1048576, expected sides of at most 16,384 pixels"),
    ],
)
def test_a_size_that_cannot_be_is_refused(pipe, size, said) -> None:
    with pytest.raises(AtollError, match=said):
        pipe("moss", num_inference_steps=1, **size)


def times_of(out) -> list[float]:
    return [float(t[0]) for t in out.traces[0].times]


def test_the_default_shift_is_that_of_the_experts(pipe) -> None:
    options = {"seeds": [0], "num_inference_steps": 4}
    # At the main size, 8 tokens: 2, sqrt(8/2) and none.
    expected = shifted_times(4, MEAN)
    assert expected is not None
    assert times_of(pipe("moss", **options)) == pytest.approx(expected[:-1].tolist(), abs=1e-6)
    # 6 tokens at 12x2: the second expert's rule gives another one.
    other = (2.0 * math.sqrt(3)) ** (1 / 3)
    assert pipe.loaded.shift(ImageSize(2, 12)) == pytest.approx(other)
    assert times_of(pipe("moss", **options, shift=1.0)) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert times_of(pipe("moss", **options, shift=3)) == pytest.approx([1, 0.9, 0.75, 0.5])
    with pytest.raises(AtollError, match="shift is 0; expected a number"):
        pipe("moss", **options, shift=0)


def test_the_ensembles_own_shift_comes_first(run, tmp_path) -> None:
    manifest = load_manifest(run)
    chosen = manifest.model_copy(update={"sampling": manifest.sampling.model_copy(update={"shift": 5.0})})
    assert '"shift"' not in (run / "ensemble" / "ensemble.json").read_text()
    try:
        assemble_run(run, chosen)
        assert Pipeline.from_pretrained(run / "ensemble").loaded.shift(ImageSize(4, 8)) == 5.0
    finally:
        assemble_run(run, manifest)


def test_the_command_writes_files_of_a_size(run, tmp_path) -> None:
    arguments = ["sample", str(run / "ensemble"), "moss", "--steps", "2", "-o", f"{tmp_path}/out/", "--quiet"]
    done = CliRunner().invoke(app, [*arguments, "--size", "4x8", "--shift", "3"])
    assert done.exit_code == 0, done.output
    (file,) = (tmp_path / "out").glob("*.png")
    settings = read_settings(file, whole=True)
    assert (settings.size, settings.shift) == ((4, 8), 3.0)
    assert Image.open(file).size == (4, 8)
    # It resumes under the same settings alone.
    assert (
        "0 images written, 1 were there"
        in CliRunner().invoke(app, [*arguments, "--size", "4x8", "--shift", "3"]).output
    )
    for other in (["--size", "8x4", "--shift", "3"], ["--size", "4x8"]):
        done = CliRunner().invoke(app, [*arguments, *other])
        assert isinstance(done.exception, AtollError)
        assert "is an image of other settings" in str(done.exception)
    sheet = CliRunner().invoke(app, [*arguments[:5], "-o", str(tmp_path / "a.png"), "--size", "12x2"])
    assert sheet.exit_code == 0, sheet.output
    done = CliRunner().invoke(app, [*arguments, "--size", "wide"])
    assert "--size: got 'wide', expected width and height in pixels" in str(done.exception)


def test_files_without_a_shift_are_those_of_before(pipe, run, tmp_path) -> None:
    arguments = [
        "sample",
        str(run / "ensemble"),
        "moss",
        "--steps",
        "1",
        "-o",
        f"{tmp_path}/",
        "--shift",
        "1",
        "--quiet",
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (file,) = tmp_path.glob("*.png")
    assert b"hift" not in file.read_bytes()
    assert read_settings(file).shift == 1.0


def test_the_engine_serves_several_sizes_at_once(run) -> None:
    pipe = Pipeline.from_pretrained(run / "ensemble")
    requests = [
        ImageRequest("moss", seeds=(1, 2), steps=4),
        ImageRequest("rain", seeds=(3,), steps=3, size=ImageSize(8, 4)),
        ImageRequest("rain", seeds=(3,), steps=5, size=ImageSize(8, 4), shift=3.0),
        ImageRequest("sand", seeds=(4,), steps=4, size=ImageSize(2, 12), method="heun"),
    ]
    events: list[list] = [[] for _ in requests]
    with Engine(pipe) as engine:
        jobs = [engine.submit(request, own.append) for request, own in zip(requests, events, strict=True)]
        for job in jobs:
            job.done.wait()
        with pytest.raises(AtollError, match="multiples of 2"):
            engine.submit(ImageRequest("moss", size=ImageSize(3, 8)), events[0].append)
    for request, own in zip(requests, events, strict=True):
        finished = own[-1]
        assert isinstance(finished, Finished), finished
        size = request.size or ImageSize(4, 8)
        alone = pipe(
            request.prompt,
            seeds=list(request.seeds),
            images_per_prompt=len(request.seeds),
            num_inference_steps=request.steps,
            height=size.height,
            width=size.width,
            shift=request.shift,
            method=request.method,
        )
        torch.testing.assert_close(finished.latents, alone.latents, atol=1e-4, rtol=1e-4)
        assert [image.size for image in finished.images] == [(size.width, size.height)] * len(request.seeds)
    assert not any(isinstance(event, Failed) for own in events for event in own)
    assert threading.active_count() < 20


def test_diffusers_pipeline_samples_sizes_too(run, pipe) -> None:
    other = AtollPipeline.from_pretrained(run / "ensemble")
    assert other.scheduler.config.shift == pytest.approx(MEAN)
    options = {"num_inference_steps": 5, "height": 8, "width": 4, "guidance_scale": 2.0}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    latents = other(["moss", "rain"], generator=generators, output_type="latent", **options).images
    own = pipe(["moss", "rain"], seeds=[0, 1], method="euler", shift=MEAN, **options).latents
    torch.testing.assert_close(latents, own, atol=1e-5, rtol=1e-5)
    image = other("moss", num_inference_steps=1, height=np.int64(2), width=12.0).images[0]
    assert image.size == (12, 2)
    with pytest.warns(UserWarning, match="no expert was trained for images of 10x2"):
        other("moss", num_inference_steps=1, height=2, width=10)


def test_an_expert_alone_has_its_own_sizes_and_shift(run) -> None:
    alone = atoll.Pipeline.from_pretrained(run / "experts" / "1-flow-linear")
    assert alone.loaded.shift(ImageSize(4, 8)) == pytest.approx(2.0)
    assert alone("moss", seeds=[0], num_inference_steps=2, height=8, width=4).images[0].size == (4, 8)


def grid_of(run: Path, **settings):
    """The images of the report's grid by row."""
    from atoll.evaluate.run import _choose_variants, draw_grid, open_run
    from atoll.manifest import EvaluateSettings

    chosen = EvaluateSettings(prompts=("moss", "rain sand"), seeds=2, workers=1, **settings)
    opened = open_run(run)
    variants, groups, _ = _choose_variants(opened, chosen)
    store = run / "evaluation"
    grid, usages = draw_grid(opened, groups=groups, variants=variants, settings=chosen, store=store)
    assert [usage.routing for usage in usages] == ["top-1", "full"]
    return dict(grid.rows)


def test_the_report_shows_what_the_pipeline_samples_at_each_size(run, pipe) -> None:
    alone, rows = grid_of(run), grid_of(run, sizes=("4x8", "12x2"))
    assert list(rows) == [*alone, "top-2, 4x8", "top-2, 12x2"]
    for label, height, width in (("top-2", 4, 8), ("top-2, 4x8", 8, 4), ("top-2, 12x2", 2, 12)):
        out = pipe(["moss", "rain sand"], images_per_prompt=2, seeds=[0, 1] * 2, height=height, width=width)
        images = pipe.loaded.codec.decode(out.latents).unflatten(0, (2, 2))
        torch.testing.assert_close(rows[label], images, rtol=0, atol=1e-5)
    assert all(torch.equal(rows[name], alone[name]) for name in alone)


def test_sizes_of_the_report_that_cannot_be_are_refused(run) -> None:
    from atoll.manifest import EvaluateSettings

    with pytest.raises(ValueError, match=r"evaluate.sizes: got 'wide', expected width and height"):
        EvaluateSettings(sizes=("wide",))
    with pytest.raises(AtollError, match=r"size: 7x8, expected sides that are multiples of 2"):
        grid_of(run, sizes=("7x8",))
