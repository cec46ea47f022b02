"""Cached results: a killed evaluation resumes, and its results equal those of an uninterrupted one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.ensemble import Ensemble, Expert
from atoll.errors import AtollError
from atoll.evaluate import Reference, Variant, evaluate
from atoll.evaluate import bench as bench_module
from atoll.evaluate.reference import ReferenceData
from atoll.evaluate.store import ResultCache, load_parts
from atoll.manifest import DiversitySettings, SpaceSettings
from atoll.objective import Objective
from atoll.schedule import Linear
from tests.evaluate.test_run import SMALL, Oracle

HOG = SpaceSettings(feature={"name": "hog", "bins": 2, "grid": 2}, components=3)
SETTINGS = SMALL.model_copy(update={"spaces": (HOG,), "workers": 1})


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("oracle"))


class Counted:
    """A variant whose network counts its evaluations."""

    def __init__(self, identity: str = "one", slope: float = 0.5):
        self.calls = 0
        ensemble = Ensemble([Expert(self, Objective("flow", Linear()))], None)
        self.slope, self.variant = slope, Variant("a", ensemble, identity=identity)

    def __call__(self, x: Tensor, time: Tensor, condition: Any) -> Tensor:
        self.calls += 1
        return self.slope * x


class Killed(Exception):
    pass


def numbers(score: Any) -> Any:
    """Sums may differ in the last digit, by the memory layout of their terms."""
    return pytest.approx({**score.metrics, "error": score.denoising.mean}, rel=1e-6, abs=1e-6)


def test_a_killed_evaluation_resumes_with_the_same_results(oracle: Oracle, tmp_path: Path) -> None:
    unbroken = Counted()
    expected = evaluate([unbroken.variant], oracle.reference, SETTINGS, store=tmp_path / "whole")

    def kill(done: int, total: int, what: str) -> None:
        if done > 20:
            raise Killed

    broken = Counted()
    with pytest.raises(Killed):
        evaluate([broken.variant], oracle.reference, SETTINGS, progress=kill, store=tmp_path / "killed")
    first = broken.calls
    result = evaluate([broken.variant], oracle.reference, SETTINGS, store=tmp_path / "killed")
    assert 0 < first < unbroken.calls
    assert broken.calls < unbroken.calls + first  # it did not start from the beginning
    score = result.scores[0]
    assert {**score.metrics, "error": score.denoising.mean} == numbers(expected.scores[0])
    assert result.real == pytest.approx(expected.real, rel=1e-6, abs=1e-6)
    again = evaluate([broken.variant], oracle.reference, SETTINGS, store=tmp_path / "killed")
    assert again.scores == result.scores


def test_cached_results_are_not_measured_again(oracle: Oracle, tmp_path: Path) -> None:
    one, other = Counted(), Counted("other", slope=1.0)
    first = evaluate([one.variant], oracle.reference, SETTINGS, store=tmp_path).score("a")
    calls = one.calls
    assert evaluate([one.variant], oracle.reference, SETTINGS, store=tmp_path).score("a") == first
    assert one.calls == calls
    assert evaluate([other.variant], oracle.reference, SETTINGS, store=tmp_path).score("a").frechet != first.frechet
    for change in ({"seed": 1}, {"images": 11}, {"steps": 2}, {"levels": (0.3, 0.9)}, {"guidance_scale": 2.0}):
        before = one.calls
        null = oracle.reference.encoder.null(1)
        changed = replace(one.variant, ensemble=Ensemble(one.variant.ensemble.experts, None, null=null))
        evaluate([changed], oracle.reference, SETTINGS.model_copy(update=change), store=tmp_path)
        assert one.calls > before, change


def test_errors_are_measured_once_for_all_ways_of_sampling(oracle: Oracle, tmp_path: Path) -> None:
    one = Counted()
    null = oracle.reference.encoder.null(1)
    ensemble = Ensemble(one.variant.ensemble.experts, None, null=null)
    variants = [replace(one.variant, ensemble=ensemble, name=str(g), guidance_scale=g) for g in (1.0, 2.0)]
    first, second = evaluate(variants, oracle.reference, SETTINGS, store=tmp_path).scores
    assert first.key != second.key
    assert first.errors_key == second.errors_key
    assert first.denoising == second.denoising
    one.calls = 0
    evaluate([replace(variants[0], name="more", guidance_scale=3.0)], oracle.reference, SETTINGS, store=tmp_path)
    batches = 3 + 1  # for images, and for those whose operations are counted
    assert one.calls == batches * SETTINGS.steps


def test_all_spaces_are_fitted_in_one_pass_and_cached(oracle: Oracle, tmp_path: Path, monkeypatch) -> None:
    decoded: list[int] = []
    images = Reference.images
    monkeypatch.setattr(Reference, "images", lambda self, rows: decoded.append(len(rows)) or images(self, rows))
    two = SETTINGS.model_copy(update={"spaces": (HOG, HOG.model_copy(update={"components": 5}))})
    base = len(oracle.reference.split(two)[1])
    first = ReferenceData(oracle.reference, two, tmp_path)
    assert sum(decoded) == base
    again = ReferenceData(oracle.reference, two, tmp_path)
    assert sum(decoded) == base
    assert [space.sha256 for space in again.spaces] == [space.sha256 for space in first.spaces]
    assert [space.dim for space in again.spaces] == [8, 3, 5]


def test_a_variant_without_an_identity_is_not_cached(oracle: Oracle, tmp_path: Path) -> None:
    one = Counted("")
    score = evaluate([one.variant], oracle.reference, SETTINGS, store=tmp_path).score("a")
    assert score.key == ""
    assert len(list(tmp_path.iterdir())) == 1  # the real images


def test_every_space_has_its_metrics_under_its_own_name(oracle: Oracle, tmp_path: Path) -> None:
    results = evaluate([Counted().variant], oracle.reference, SETTINGS, store=tmp_path)
    names = list(results.scores[0].metrics)
    assert [space.name for space in results.spaces] == ["pca8", "HOG-pca3"]
    for space in results.spaces:
        own = [name for name in names if f"-{space.name} [{space.sha256[:8]}]" in name]
        assert [name.split("-")[0] for name in own][:6] == ["FD", "KD", "precision", "recall", "density", "coverage"]
    assert names[-1].startswith("R-precision-HOG-pca3 [")
    assert list(results.real) == names
    assert results.frechet_name == "FD-pca8"
    assert any("biased upwards" in note and note.startswith("pca8") for note in results.notes)


def test_diversity_compares_one_prompts_images_clip_its_own_prompt(oracle, tmp_path, monkeypatch) -> None:
    """With stand-ins for both networks: their inputs, and the use of their outputs."""

    class Distance:
        name = "SqueezeDist [0123abcd]"

        def pairwise(self, images: Tensor) -> Tensor:
            seen.append(images)
            return torch.pdist(images.flatten(1))

    class Clip:
        name = "CLIPScore [0123abcd]"

        @classmethod
        def load(cls, weights: str) -> "Clip":
            assert weights == "a clip"
            return cls()

        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            prompts_seen.extend(prompts)
            return torch.tensor([10.0 * prompt.startswith("red") for prompt in prompts])

    seen: list[Tensor] = []
    prompts_seen: list[str] = []
    monkeypatch.setattr(bench_module, "build_distance", lambda config: Distance())
    monkeypatch.setattr(bench_module, "CLIPScore", Clip)
    diversity = DiversitySettings(feature={"name": "squeezenet"}, prompts=3, images=4)
    settings = SMALL.model_copy(update={"workers": 1, "diversity": diversity, "clip": {"weights": "a clip"}})
    messages: list[tuple[int, int, str]] = []
    score = evaluate(
        [Counted().variant], oracle.reference, settings, progress=lambda *x: messages.append(x), store=tmp_path
    ).scores[0]
    assert messages[-1][0] == messages[-1][1]
    assert [len(images) for images in seen] == [4, 4, 4]
    assert torch.equal(seen[0], seen[1])  # this variant ignores its prompt, and the noise is the same
    means = [float(torch.pdist(images.flatten(1)).mean()) for images in seen]
    assert score.metrics["SqueezeDist [0123abcd]"] == pytest.approx(means[0], rel=1e-5)
    assert score.metrics["std of SqueezeDist [0123abcd]"] == pytest.approx(0, abs=1e-6)
    captions = oracle.reference.captions(oracle.reference.split(settings)[0])
    assert prompts_seen == captions
    red = sum(caption.startswith("red") for caption in captions)
    assert score.metrics["CLIPScore [0123abcd]"] == pytest.approx(10 * red / len(captions))
    seen.clear(), prompts_seen.clear()
    again = evaluate([Counted().variant], oracle.reference, settings, store=tmp_path).scores[0]
    assert again.metrics == pytest.approx(score.metrics)
    assert not seen
    assert not prompts_seen


def test_four_images_are_enough_to_evaluate(tmp_path: Path) -> None:
    tiny = Oracle(tmp_path, 5)
    result = evaluate(
        [Counted().variant], tiny.reference, SMALL.model_copy(update={"workers": 1}), store=tmp_path / "s"
    )
    assert result.images == 2
    assert [name.split("-")[0] for name in result.scores[0].metrics] == ["FD", "KD"]


def test_a_damaged_part_raises_its_file_name(tmp_path: Path) -> None:
    store = ResultCache(tmp_path, {"what": "this"})
    assert store.part("a-1", lambda: {"x": torch.ones(3)})["x"].tolist() == [1, 1, 1]
    (store.path / "a-1.safetensors").write_bytes(b"nonsense")
    with pytest.raises(AtollError, match=r"a-1.safetensors: cannot be read .*; remove it"):
        store.part("a-1", lambda: {"x": torch.ones(3)})
    with pytest.raises(AtollError, match="remove it"):
        load_parts(store.path, "a")


def test_parts_load_in_order_and_other_values_have_other_parts(tmp_path: Path) -> None:
    store, other = ResultCache(tmp_path, {"what": "this"}), ResultCache(tmp_path, {"what": "that"})
    for number in (2, 0, 1):
        store.part(f"a-{number:05d}", lambda number=number: {"x": torch.tensor([number])})
    store.part("b", lambda: {"x": torch.tensor([9])})
    assert [int(part["x"]) for part in load_parts(store.path, "a")] == [0, 1, 2]
    assert store.part("a-00002", lambda: pytest.fail("measured again"))["x"].tolist() == [2]
    assert other.key != store.key
    assert load_parts(other.path, "a") == []
