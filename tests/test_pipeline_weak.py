"""Images guided away from a weak ensemble: the pipeline, the command, the settings in the files, what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atoll.encoders.text import PromptEncoder, build_encoder
from atoll.ensemble.loading import load_ensemble
from atoll.errors import AtollError
from atoll.evaluate.metrics.cost import count_flops
from atoll.image_settings import ImageSettings, read_settings
from atoll.pipeline import Pipeline

OPTIONS = {"num_inference_steps": 3, "seeds": [0, 1]}
PROMPTS = ["moss sand", "rain"]


@pytest.fixture(scope="module")
def pipe(trained_run) -> Pipeline:
    return Pipeline.from_pretrained(trained_run / "ensemble", weak=trained_run / "monolith")


@pytest.fixture(scope="module")
def plain(trained_run) -> Pipeline:
    return Pipeline.from_pretrained(trained_run / "ensemble")


def changed_monolith(trained_run: Path, tmp_path: Path, **changes: object) -> Path:
    """A copy of the monolith with another card."""
    copy = shutil.copytree(trained_run / "monolith", tmp_path / "weak")
    card = json.loads((copy / "card.json").read_text())
    (copy / "card.json").write_text(json.dumps({**card, **changes}))
    return copy


def test_guidance_leads_away_from_the_weak_ensemble(trained_run, pipe, plain) -> None:
    unguided = plain(PROMPTS, guidance_scale=1.0, **OPTIONS).latents
    assert torch.equal(pipe(PROMPTS, guidance_scale=1.0, **OPTIONS).latents, unguided)
    guided = pipe(PROMPTS, guidance_scale=3.0, **OPTIONS).latents
    assert not torch.allclose(guided, unguided, atol=1e-3)
    assert not torch.allclose(guided, plain(PROMPTS, guidance_scale=3.0, **OPTIONS).latents, atol=1e-3)
    # The ensemble itself has nothing to lead away from.
    itself = Pipeline.from_pretrained(trained_run / "ensemble", weak=trained_run / "ensemble")
    assert torch.equal(itself(PROMPTS, guidance_scale=3.0, **OPTIONS).latents, unguided)


@pytest.mark.parametrize("routing", ["top-1", "full"])
def test_a_shared_memory_budget_and_another_routing_change_no_image(trained_run, pipe, routing) -> None:
    arguments = {"guidance_scale": 3.0, "routing": routing, **OPTIONS}
    small = Pipeline.from_pretrained(trained_run / "ensemble", weak=trained_run / "monolith", memory_budget="120KB")
    torch.testing.assert_close(small(PROMPTS, **arguments).latents, pipe(PROMPTS, **arguments).latents)
    main, weak = (one.experts[0].network.cache for one in (small.loaded.ensemble, small.loaded.ensemble.weak))
    assert main is weak
    assert main.peak_bytes <= 120_000
    assert main.loads > 4


def test_the_operations_of_both_are_counted(trained_run, pipe, plain) -> None:
    """The weak expert of all clusters costs one evaluation per step where guidance by the null condition costs two."""
    arguments = {"routing": "top-1", "batch_size": 1, "num_inference_steps": 3, "seeds": [0]}

    def flops(one: Pipeline, scale: float) -> float:
        return count_flops(lambda: one("moss", guidance_scale=scale, **arguments), 1).flops

    assert flops(pipe, 1.0) == flops(plain, 1.0)
    # Each network reads its prompt once; the null condition is a second prompt of the same network.
    assert flops(pipe, 2.0) == pytest.approx(flops(plain, 2.0), rel=0.05)
    assert flops(pipe, 2.0) > 1.5 * flops(plain, 1.0)


def test_a_negative_prompt_is_refused(pipe) -> None:
    with pytest.raises(AtollError, match="negative_prompt has no effect with a weak ensemble"):
        pipe("moss", negative_prompt="sand", guidance_scale=2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 4}, "its number of clusters is 4, the ensemble's is 3; expected a weaker ensemble of the same clusters"),
        ({"latent_shape": [1, 4, 4]}, r"its latent_shape is \[1, 4, 4\], the ensemble's is "),
        ({"codec": {"name": "pixels", "channels": 3}}, "its codec is .*3.*, the ensemble's is "),
        (
            {"condition": {"name": "hash", "dim": 16, "length": 9}},
            "read prompts by the condition .*; expected the same",
        ),
    ],
)
def test_a_weak_expert_that_does_not_fit_is_refused(trained_run, tmp_path, changes, message) -> None:
    if "latent_shape" in changes:  # which would not load by itself: its calibration has the old shape
        changes = {**changes, "calibration": None}
    weak = changed_monolith(trained_run, tmp_path, **changes)
    with pytest.raises(AtollError, match=message) as error:
        Pipeline.from_pretrained(trained_run / "ensemble", weak=weak)
    assert "\n" not in str(error.value)
    assert str(weak) in str(error.value)


def test_an_expert_of_one_cluster_is_refused(trained_run) -> None:
    with pytest.raises(AtollError, match="the weak ensemble has no expert of cluster 1, 2"):
        Pipeline.from_pretrained(trained_run / "ensemble", weak=trained_run / "experts" / "0-eps-cosine")


def test_clusters_of_another_assignment_are_refused(plain) -> None:
    loaded = plain.loaded
    other = replace(loaded, card=loaded.card.model_copy(update={"assignment": "another"}))
    with pytest.raises(AtollError, match="its assignment is another, the ensemble's is "):
        loaded.with_weak(other, Path("weak"))


def test_weak_experts_read_the_prompt_by_their_own_text_encoder(trained_run, plain) -> None:
    weak = load_ensemble(trained_run / "monolith")
    (mine,) = weak.encoder.encoders
    longer = build_encoder({**mine.config(), "length": 9})
    loaded = replace(plain.loaded, encoder=PromptEncoder([longer, mine]))
    assert loaded.with_weak(weak, Path("weak")).ensemble.weak.experts[0].encoder == 1


def test_the_command_writes_the_weak_ensemble_into_the_settings(trained_run, atoll, tmp_path) -> None:
    ensemble, weak = trained_run / "ensemble", trained_run / "monolith"
    arguments = ["sample", ensemble, "moss", "--guidance", 2, "--steps", 2, "--quiet", "-o"]
    assert atoll(*arguments, "images/", "--weak", weak)[0] == 0
    settings = read_settings(tmp_path / "images" / "000001-0.png")
    assert (settings.weak, len(settings.weak_sha256)) == ("monolith", 64)
    # Run again, it resumes; without the weak ensemble, the image is another.
    assert "1 were there" in atoll(*arguments, "images/", "--weak", weak)[1]
    code, _, error = atoll(*arguments, "images/")
    assert code == 2
    assert "other settings (weak_sha256)" in " ".join(error.split())
    assert atoll(*arguments, "sheet.png", "--weak", weak)[0] == 0
    code, _, error = atoll(*arguments, "new/", "--weak", weak, "--negative", "sand")
    assert (code, (tmp_path / "new").exists()) == (2, False)
    assert "its negative prompt has no effect with --weak" in " ".join(error.split())
    code, _, error = atoll(*arguments, "new/", "--weak", tmp_path)
    assert (code, (tmp_path / "new").exists()) == (2, False)


def test_settings_without_a_weak_ensemble_are_written_as_before(trained_run, atoll, tmp_path) -> None:
    assert atoll("sample", trained_run / "ensemble", "moss", "--steps", 2, "--quiet", "-o", "images/")[0] == 0
    text: ImageSettings = read_settings(tmp_path / "images" / "000001-0.png")
    assert not any("weak" in chunk.lower() for chunk in text.text().values())
