"""One file per image: its settings inside, resumable, never over another image."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atoll.errors import AtollError
from atoll.image_settings import read_settings
from atoll.pipeline import Pipeline
from atoll.sample.files import image_name, sample_to_files
from atoll.sample.options import ImageOptions, PromptImages
from atoll.sample.prompts import prompt_lines
from atoll.sample.source import ModelSource
from atoll.storage.lock import hold

PROMPTS = ["moss", "rain", "sand"]


def sample(run: Path, out: Path, prompts: list[str] = PROMPTS, options: ImageOptions | None = None, **settings):
    lines, options = prompt_lines(prompts), options or ImageOptions(n=2)
    source = ModelSource(path=run / "ensemble", weights=settings.pop("weights", None))
    return sample_to_files(source, lambda: options.images(lines), out, **{"steps": 2, **settings})


def files(directory: Path) -> dict[str, int]:
    """The visible files and when they were written."""
    return {file.name: file.stat().st_mtime_ns for file in directory.iterdir() if file.name != ".lock"}


def test_each_image_is_a_file_with_its_settings(trained_run, tmp_path) -> None:
    options = ImageOptions("rust", seeds=(5, 3))
    # The tiny networks barely read their prompts.
    strong = {"guidance": 1000.0, "guidance_range": (0.3, 0.7), "steps": 3}
    done = sample(trained_run, tmp_path / "a" / "b", options=options, batch_size=4, method="heun", **strong)
    assert (done.written, done.skipped, done.dropped) == (6, 0, {})
    names = {image_name(number, seed) for number in (1, 2, 3) for seed in (5, 3)}
    assert set(files(tmp_path / "a" / "b")) == names
    assert "000002-5.png" in names
    pipe = Pipeline.from_pretrained(trained_run / "ensemble")
    for number, prompt in enumerate(PROMPTS, start=1):
        for seed in (5, 3):
            file = tmp_path / "a" / "b" / image_name(number, seed)
            settings = read_settings(file, whole=True)
            # The settings are enough to sample the image again.
            again = pipe(
                settings.prompt,
                settings.steps,
                settings.guidance_scale,
                seeds=[settings.seed],
                negative_prompt=settings.negative_prompt,
                method=settings.method,
                routing=settings.routing,
                guidance_range=settings.guidance_range,
            )
            pixels = np.asarray(Image.open(file), int)
            assert np.abs(pixels - np.asarray(again.images[0], int)).max() <= 1
            assert (settings.prompt, settings.seed, settings.size) == (prompt, seed, pixels.shape[::-1])
            assert settings.ensemble == "run"


def test_a_second_call_skips_and_more_seeds_add_images(trained_run, tmp_path) -> None:
    sample(trained_run, tmp_path, options=ImageOptions(seeds=(0, 1)))
    before = files(tmp_path)
    done = sample(trained_run, tmp_path, options=ImageOptions(seeds=(0, 1, 2)))
    assert (done.written, done.skipped) == (3, 6)
    after = files(tmp_path)
    assert len(after) == 9
    assert {name: after[name] for name in before} == before


def test_an_interrupted_call_leaves_whole_files_and_is_resumed(trained_run, tmp_path, monkeypatch) -> None:
    replace, calls = os.replace, []

    def killed(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 4:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            sample(trained_run, tmp_path, batch_size=2)
    visible = [file for file in tmp_path.iterdir() if not file.name.startswith(".")]
    assert len(visible) == 3
    (leftover,) = tmp_path.glob(".0*.tmp")
    leftover.rename(tmp_path / f"{leftover.name.rpartition('png.')[0]}png.1-1.tmp")  # of another process
    assert all(read_settings(file, whole=True) for file in visible)
    done = sample(trained_run, tmp_path, batch_size=2)
    assert (done.written, done.skipped) == (3, 3)
    assert len(files(tmp_path)) == 6  # the leftover is gone


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"steps": 3}, "steps"),
        ({"guidance": 2.5, "guidance_range": (0.1, 0.9)}, "guidance_scale, guidance_range"),
        ({"method": "heun"}, "method"),
        ({"weights": "bf16"}, "weights"),
        ({"prompts": ["rust", *PROMPTS[1:]]}, "prompt"),
        ({"options": ImageOptions("rust", n=2)}, "negative_prompt"),
    ],
)
def test_images_of_other_settings_are_never_replaced(trained_run, tmp_path, changes, names) -> None:
    settings = {"guidance": 2.0}
    sample(trained_run, tmp_path, **settings)
    before = files(tmp_path)
    with pytest.raises(AtollError, match=rf"000001-0\.png: is an image of other settings \({names}\); name another"):
        sample(trained_run, tmp_path, **settings | changes)
    assert files(tmp_path) == before


def test_an_ensemble_without_an_expert_makes_other_images(trained_run, tmp_path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    sample(run, tmp_path / "out")
    shutil.rmtree(run / "experts" / "1-flow-linear")
    with (
        pytest.warns(UserWarning, match="is missing"),
        pytest.raises(AtollError, match=r"other settings \(missing_experts\)"),
    ):
        sample(run, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"mine", "cut"])
def test_a_file_that_is_no_whole_image_is_named(trained_run, tmp_path, content) -> None:
    if content == "cut":
        sample(trained_run, tmp_path)
        content = (tmp_path / "000002-2.png").read_bytes()[:-20]
    (tmp_path / "000002-2.png").write_bytes(content)
    with pytest.raises(AtollError, match=r"000002-2\.png: cannot be read .*; name another directory, or remove it"):
        sample(trained_run, tmp_path)
    assert (tmp_path / "000002-2.png").read_bytes() == content


def test_prompts_stream_and_each_batch_is_written_at_once(trained_run, tmp_path, monkeypatch) -> None:
    calls, call = [], Pipeline.__call__
    pending: list[int] = []  # prompts that were read while sampling, before each batch

    def counted(self, prompts, *arguments, **options):
        calls.append((len(options["seeds"]), len(list(tmp_path.glob("*.png"))), len(pending)))
        return call(self, prompts, *arguments, **options)

    def requests() -> Iterator[PromptImages]:
        pending.clear()
        for number in range(1, 9):
            pending.append(number)
            yield PromptImages(number, "moss", "", range(3))

    monkeypatch.setattr(Pipeline, "__call__", counted)
    progress = []
    source = ModelSource(path=trained_run / "ensemble")
    sample_to_files(source, requests, tmp_path, steps=1, batch_size=5, progress=lambda *a: progress.append(a))
    assert calls == [(5, 0, 2), (5, 5, 4), (5, 10, 5), (5, 15, 7), (4, 20, 8)]
    assert progress[:3] == [(0, 24, ""), (0, 24, "step 1/1"), (5, 24, "")]
    assert progress[-1] == (24, 24, "")


def test_a_directory_that_cannot_be_written_is_refused_before_sampling(trained_run, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AtollError, match="is no directory"):
        sample(trained_run, tmp_path / "file" / "out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(AtollError, match="is not writable; name another directory"):
        sample(trained_run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (ImageOptions("rust"), {"guidance": 1.0}, "prompt 1: its negative prompt changes nothing at guidance_scale 1"),
        (ImageOptions(n=2, seed=2**63 - 1), {}, "prompt 1: seed"),
        (ImageOptions(), {"steps": 0}, "steps: got 0"),
        (ImageOptions(), {"method": "rk4"}, "method: got 'rk4'"),
        (ImageOptions(), {"batch_size": 0}, "--batch is 0"),
    ],
)
def test_settings_that_cannot_work_leave_no_directory(trained_run, tmp_path, options, settings, message) -> None:
    with pytest.raises(AtollError, match=message):
        sample(trained_run, tmp_path / "out", options=options, **settings)
    assert not (tmp_path / "out").exists()


def test_atoll_sample_writes_files_and_sheets(trained_run, tmp_path, atoll) -> None:
    (tmp_path / "p.txt").write_text("moss\nrain\n")
    command = ("sample", trained_run / "ensemble", "--steps", 1)
    files_of = (*command, "--prompts", "p.txt", "-o", "out/", "--n", 2)
    guided = ("--guidance", 2, "--negative", "rust", "--guidance-range", "0.2,0.8")
    assert atoll(*files_of, *guided)[:2] == (0, "out/: 4 images written\n")
    assert atoll(*files_of, *guided)[:2] == (0, "out/: 0 images written, 4 were there\n")
    settings = read_settings(tmp_path / "out" / "000002-3.png")
    assert (settings.negative_prompt, settings.guidance_range) == ("rust", (0.2, 0.8))
    code, _, error = atoll(*files_of)
    assert (code, len(error.splitlines())) == (2, 1)
    assert "other settings" in error
    assert atoll(*command, "moss", "rain", "-o", "out", "--seeds", "7")[:2] == (0, "out: 2 images written\n")
    sheet = (*command, "moss", "rain", "-o", "a.png", "--seeds", "4-6", "--trace", "t.json", *guided)
    assert atoll(*sheet)[:2] == (0, "a.png written\n")
    assert Image.open(tmp_path / "a.png").size == (3 * 136 - 8, 2 * 72 - 8)
    code, _, error = atoll(*command, "moss", "-o", "b.png", "--negative", "rust", "--guidance", 1)
    assert (code, "changes nothing at guidance_scale 1" in error) == (2, True)
    assert not (tmp_path / "b.png").exists()


def test_two_processes_do_not_fill_one_directory(trained_run, tmp_path) -> None:
    with hold(tmp_path, "sampling"), pytest.raises(AtollError, match="another process is sampling here"):
        sample(trained_run, tmp_path)
    assert files(tmp_path) == {}
