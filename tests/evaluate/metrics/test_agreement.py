"""Agreement of prompts and images: CLIP's score against transformers, the ridge regression and its scale."""

import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.condition import Condition
from atoll.data.glyphs import Glyphs
from atoll.encoders.feature import Feature, Hog, build_feature
from atoll.encoders.text import HashEncoder, build_encoder
from atoll.errors import AtollError
from atoll.evaluate.metrics import agreement
from atoll.evaluate.metrics.agreement import CLIPScore, RidgeAgreement, pooled_vectors
from atoll.evaluate.metrics.spaces import FeatureSpace
from tests.encoders.test_feature import save_clip_image
from tests.encoders.text.test_text import save_clip


class Space:
    """A space of `dim` dimensions; the tests bring the features themselves."""

    name, explained, sha256 = "made-up", 1.0, "5" * 64

    def __init__(self, dim: int):
        self.dim = dim

    def __call__(self, images: Tensor, /) -> Tensor:
        return images.flatten(1)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(n: int, noise: float, seed: int = 0, kinds: int = 150) -> tuple[Tensor, list[str], Tensor]:
    """(features [n,24], prompts, vectors [n,8]): images show their prompt's vector through one linear map."""
    which = torch.randint(kinds, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    vectors = gaussian(kinds, 8, seed=100)[which]
    features = F.normalize(vectors) @ gaussian(8, 24, seed=101) + noise * gaussian(n, 24, seed=seed + 1)
    return features, [f"kind {kind}" for kind in which], vectors


class TestRidge:
    def fitted(self, n: int = 40, dim: int = 6, noise: float = 1.0) -> tuple[RidgeAgreement, Tensor, Tensor]:
        x = gaussian(n, dim, seed=0) * torch.logspace(0, -2, dim)
        y = x @ gaussian(dim, 3, seed=1) + noise * gaussian(n, 3, seed=2)
        return RidgeAgreement.fit(Space(dim), zip(x.split(7), y.split(7), strict=True)), x, F.normalize(y)

    def test_ridge_solves_the_normal_equations(self) -> None:
        ridge, x, y = self.fitted()
        centred = x - x.mean(0)
        scaled = torch.eye(6).double() * len(x) * ridge.ridge
        weights = torch.linalg.solve(centred.T @ centred + scaled, centred.T @ (y - y.mean(0)))
        new = gaussian(5, 6, seed=9)
        torch.testing.assert_close(ridge.predict(new), (new - x.mean(0)) @ weights, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize(("n", "dim"), [(40, 6), (12, 30)])
    @pytest.mark.parametrize("noise", [0.05, 1.0, 30.0])
    def test_ridge_minimises_generalised_cross_validation(self, n, dim, noise) -> None:
        """GCV by its definition, with the hat matrix, also where there are more dimensions than images."""
        ridge, x, y = self.fitted(n, dim, noise)
        centred, target = x - x.mean(0), y - y.mean(0)
        variance = float(centred.square().mean(0).mean())
        found = {}
        for relative in agreement.RELATIVE_LAMBDAS:
            inner = centred.T @ centred + n * relative * variance * torch.eye(dim).double()
            hat = centred @ torch.linalg.solve(inner, centred.T) + 1 / n
            if float(hat.trace()) <= agreement.FREEDOM * n:
                residual = target - hat @ target
                found[relative * variance] = float(residual.square().sum() / n / (1 - hat.trace() / n) ** 2)
        assert ridge.ridge == pytest.approx(min(found, key=lambda key: found[key]))

    def test_the_fit_does_not_depend_on_the_batches(self) -> None:
        features, _, vectors = made(60, 0.3)
        whole = RidgeAgreement.fit(Space(24), [(features, vectors)])
        parts = RidgeAgreement.fit(Space(24), zip(features.split(11), vectors.split(11), strict=True))
        torch.testing.assert_close(whole.predict(features), parts.predict(features))

    def test_the_name_contains_the_space_and_the_hash_of_the_fit(self) -> None:
        one, other = ({"noise": noise} for noise in (0.3, 0.4))
        names = []
        for settings in (one, other, one):
            features, _, vectors = made(60, **settings)
            names.append(RidgeAgreement.fit(Space(24), [(features, vectors)]).name)
        assert names[0] == names[2] != names[1]
        assert names[0].startswith("R-precision-made-up [")
        assert len(names[0]) == len("R-precision-made-up [12345678]")

    def test_refusals(self) -> None:
        features, _, vectors = made(9, 0.1)
        with pytest.raises(AtollError, match="a regression on 0 images; expected at least 3"):
            RidgeAgreement.fit(Space(24), [])
        with pytest.raises(AtollError, match="a regression on 2 images"):
            RidgeAgreement.fit(Space(24), [(features[:2], vectors[:2])])
        with pytest.raises(AtollError, match="not finite"):
            RidgeAgreement.fit(Space(24), [(features / 0, vectors)])
        for x, y in ((features.new_ones(9, 24), vectors), (features, vectors.new_ones(9, 8))):
            with pytest.raises(AtollError, match="nothing to tell apart"):
                RidgeAgreement.fit(Space(24), [(x, y)])


class TestRPrecision:
    def test_perfect_features_reach_ceiling_and_floor(self) -> None:
        ridge = RidgeAgreement.fit(Space(24), [made(500, 0.05)[::2]])
        features, prompts, vectors = made(300, 0.05, seed=50)
        ceiling = ridge.score(features, prompts, vectors)
        assert ceiling.r_precision > 0.97
        assert ceiling.cosine > 0.97
        assert (ceiling.images, ceiling.candidates) == (300, 100)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
        floor = ridge.score(features, [prompts[row] for row in order.tolist()], vectors[order])
        assert abs(floor.r_precision - 1 / 100) < 4 * math.sqrt(0.01 * 0.99 / 300)
        assert abs(floor.cosine) < 0.1

    def test_words_of_all_prompts_do_not_count(self) -> None:
        # As of encoders whose pooled vectors all point one way: uncentred, every prompt is near to every image.
        ridge = RidgeAgreement.fit(Space(24), [(x, y + 20) for x, _, y in [made(500, 0.01)]])
        features, prompts, vectors = made(300, 0.01, seed=50)
        assert ridge.score(features, prompts, vectors + 20).cosine > 0.9
        assert ridge.score(features, prompts, vectors + 20).r_precision > 0.9
        order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
        shuffled = [prompts[row] for row in order.tolist()]
        assert abs(ridge.score(features, shuffled, vectors[order] + 20).cosine) < 0.1

    def test_features_without_information_score_at_chance(self) -> None:
        _, prompts, vectors = made(400, 0.05, kinds=20)
        noise = gaussian(400, 24, seed=7)
        ridge = RidgeAgreement.fit(Space(24), [(gaussian(400, 24, seed=8), vectors)])
        found = ridge.score(noise, prompts, vectors)
        assert found.candidates == 20
        assert abs(found.r_precision - 1 / 20) < 5 * math.sqrt(0.05 * 0.95 / 400)

    def test_agreement_falls_with_noise(self) -> None:
        ridge = RidgeAgreement.fit(Space(24), [made(500, 0.3)[::2]])
        scores = [ridge.score(*made(300, noise, seed=50)) for noise in (0.1, 1.0, 3.0)]
        assert scores[0].r_precision > scores[1].r_precision > scores[2].r_precision
        assert scores[0].cosine > scores[1].cosine > scores[2].cosine

    def test_few_prompts_are_all_candidates_checked_by_hand(self) -> None:
        # Predictions as they are given: first and third are nearest to their own, the second to the third's.
        ridge = RidgeAgreement(Space(2), torch.zeros(2), torch.zeros(2), torch.eye(2).double(), 0.0)
        vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        seen = torch.tensor([[2.0, 0.1], [-3.0, 1.0], [-1.0, -1.0]])
        found = ridge.score(seen, ["a", "b", "c"], vectors)
        assert found.r_precision == pytest.approx(2 / 3)
        assert found.candidates == 3
        expected = F.cosine_similarity(seen, vectors).mean()
        assert found.cosine == pytest.approx(float(expected))

    def test_prompts_with_equal_vectors_share_the_hit(self) -> None:
        ridge = RidgeAgreement(Space(2), torch.zeros(2), torch.zeros(2), torch.eye(2).double(), 0.0)
        vectors = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        found = ridge.score(torch.tensor([[1.0, 0.2], [1.0, 0.1], [0.0, 2.0]]), ["a b", "b a", "c"], vectors)
        assert found.r_precision == pytest.approx((0.5 + 0.5 + 1) / 3)
        # Nothing at all is read off these: they lie in no direction, and all prompts tie.
        assert ridge.score(torch.zeros(3, 2), ["a b", "b a", "c"], vectors).r_precision == pytest.approx(1 / 3)

    def test_a_repeated_prompt_is_one_candidate(self) -> None:
        ridge = RidgeAgreement(Space(2), torch.zeros(2), torch.zeros(2), torch.eye(2).double(), 0.0)
        vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        found = ridge.score(torch.tensor([[1.0, 0.2], [1.0, 0.1], [0.0, 2.0]]), ["a", "a", "c"], vectors)
        assert (found.r_precision, found.candidates) == (1, 2)

    def test_the_seed_draws_99_other_candidates(self) -> None:
        seen = [agreement._others(40, 150, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
        assert seen[0] == seen[1] != seen[2]
        assert len(set(seen[0])) == 99
        every = set()
        for seed in range(12):
            every |= set(agreement._others(40, 150, torch.Generator().manual_seed(seed)).tolist())
        assert every == set(range(150)) - {40}
        assert agreement._others(2, 4, torch.Generator()).tolist() == [0, 1, 3]

    def test_refusals(self) -> None:
        ridge = RidgeAgreement.fit(Space(24), [made(60, 0.1)[::2]])
        features, prompts, vectors = made(9, 0.1)
        with pytest.raises(AtollError, match="9 images, 8 prompts and 9 vectors"):
            ridge.score(features, prompts[:8], vectors)
        with pytest.raises(AtollError, match="1 distinct prompts; expected at least 2"):
            ridge.score(features, ["one"] * 9, vectors)
        with pytest.raises(AtollError, match="the sampling diverged"):
            ridge.score(features / 0, prompts, vectors)

    def test_held_out_glyphs_score_far_above_shuffled_prompts(self) -> None:
        """Which letter it is, and in which face, can be read off its gradients."""
        glyphs = Glyphs("demo")
        raws = list(islice(glyphs.read(glyphs.blocks()[0]), 800))
        images = torch.from_numpy(np.stack([raw.image for raw in raws])) / 255  # [800,1,16,16]
        space = FeatureSpace(Hog())
        features, encoder = space(images), HashEncoder(64)
        captions = [raw.caption for raw in raws]
        vectors = pooled_vectors([encoder(captions)])
        held_out = torch.arange(len(raws)) % 5 == 0
        ridge = RidgeAgreement.fit(space, [(features[~held_out], vectors[~held_out])])
        assert ridge.name.startswith("R-precision-HOG [")
        asked = [caption for caption, out in zip(captions, held_out.tolist(), strict=True) if out]
        ceiling = ridge.score(features[held_out], asked, vectors[held_out])
        order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))
        shuffled = [asked[row] for row in order.tolist()]
        floor = ridge.score(features[held_out], shuffled, vectors[held_out][order])
        assert ceiling.r_precision > 0.3
        assert floor.r_precision < 0.06
        assert ceiling.cosine > 0.3 > 0.1 > floor.cosine


class TestPooledVectors:
    def test_without_a_pooled_vector_the_mean_of_valid_states_is_used(self) -> None:
        states = gaussian(2, 5, 3, seed=0).float()
        mask = torch.tensor([[True, True, False, False, False], [True] * 5])
        found = pooled_vectors([Condition(states, mask)])
        torch.testing.assert_close(found, torch.stack([states[0, :2].mean(0), states[1].mean(0)]))

    def test_vectors_of_several_encoders_are_concatenated(self) -> None:
        one, other = (Condition(torch.zeros(2, 1, 3), torch.ones(2, 1).bool(), gaussian(2, d, seed=d)) for d in (4, 6))
        found = pooled_vectors((one, other))
        torch.testing.assert_close(found, torch.cat([F.normalize(one.pooled), F.normalize(other.pooled)], 1))


class TestCLIPScore:
    def test_clip_score_equals_transformers(self, tmp_path, monkeypatch) -> None:
        import transformers

        monkeypatch.delenv("ATOLL_WEIGHTS", raising=False)
        score = CLIPScore.load(str(save_clip(tmp_path, "whole")))
        images = torch.rand(8, 3, 14, 14, generator=torch.Generator().manual_seed(1))
        prompts = ["red moss", "moss", "", "a red thing", "red", "sea", "moss red", "no"]
        found = score(images, prompts)
        network = transformers.CLIPModel.from_pretrained(tmp_path).eval()
        mean, std = (
            torch.tensor(values).reshape(1, 3, 1, 1)
            for values in (transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD)
        )
        tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=11, return_tensors="pt")
        with torch.no_grad():
            output = network(input_ids=tokens.input_ids, pixel_values=(images - mean) / std)
        expected = 100 * (output.image_embeds * output.text_embeds).sum(1).clamp(min=0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert (found > 1).all()
        assert score.name == CLIPScore.load(str(tmp_path)).name
        assert score.name.startswith("CLIPScore [")
        images[2, 1, 3, 3] = torch.inf
        assert score(images, prompts).isnan().tolist() == [False, False, True, False, False, False, False, False]
        with pytest.raises(AtollError, match="8 images and 7 prompts"):
            score(images, prompts[:7])

    def test_a_negative_cosine_scores_zero(self, tmp_path) -> None:
        weights = str(save_clip(tmp_path, "whole"))
        feature, texts = build_feature({"name": "clip-image", "weights": weights}), CLIPScore.load(weights)

        class Turned(Feature):
            name, dim = "turned", feature.dim

            def __call__(self, drawn: Tensor) -> Tensor:
                return -feature(drawn)

            def config(self) -> dict:
                return feature.config()

            def to(self, device=None, dtype=None) -> "Turned":
                return self

        images = torch.rand(3, 3, 14, 14, generator=torch.Generator().manual_seed(1))
        prompts = ["moss", "red", ""]
        assert (texts(images, prompts) > 1).all()
        assert CLIPScore(Turned(), texts._texts)(images, prompts).tolist() == [0, 0, 0]

    def test_image_and_text_towers_must_share_their_space(self, tmp_path) -> None:
        images = build_feature({"name": "clip-image", "weights": str(save_clip_image(Path(tmp_path / "a")))})
        text = str(save_clip(tmp_path / "b"))
        with pytest.raises(AtollError, match="10 dimensions, its texts 16; name two halves"):
            CLIPScore(images, build_encoder({"name": "clip", "weights": text}))
