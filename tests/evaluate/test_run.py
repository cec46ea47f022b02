"""Variants measured against each other (with an oracle's floor and order), and a run on disk with its report."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atoll.assemble import assemble
from atoll.calibration import Calibration
from atoll.encoders.codec import PixelCodec
from atoll.encoders.text import HashEncoder, PromptEncoder
from atoll.ensemble import Ensemble, Expert
from atoll.errors import AtollError
from atoll.evaluate import EvaluateSettings, Reference, Results, Variant, evaluate, evaluate_run
from atoll.evaluate import run as run_module
from atoll.evaluate.measure import side_by_side
from atoll.evaluate.run import _spread_out
from atoll.evaluate.types import Space
from atoll.evaluate.variants import alone
from atoll.manifest import SweepSettings
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.report.words import count_words, distinctive_words
from atoll.schedule import Cosine, Linear
from atoll.solver import times_of
from atoll.storage.artifact import save_artifact, write_json
from atoll.storage.cards import ExpertCard, RouterCard
from atoll.storage.shards import Shards, ShardWriter
from atoll.testing import GaussianMixture
from tests.cards import clusters_card, encoded_card

SHAPE = (1, 4, 6)
SMALL = EvaluateSettings(
    images=12,
    steps=3,
    held_out=6,
    batch=5,
    components=8,
    levels=(0.2, 0.98),
    prompts=("a dot", "red 3"),
    seeds=2,
    workers=2,
)
CODEC = PixelCodec(1, shift=0.0, scale=1.0)
ENCODER = PromptEncoder([HashEncoder(dim=8, length=4)])


def write_shards(path: Path, x0: Tensor, clusters: Tensor, name: str = "p") -> None:
    captions = [f"{'red' if k == 0 else 'blue'} {i % 5}" for i, k in enumerate(clusters.tolist())]
    splits = ["val" if i % 10 == 0 else "train" for i in range(len(x0))]
    with ShardWriter(path, encoded_card(codec=CODEC.config(), condition=ENCODER.configs()[0])) as writer:
        writer.append([f"{name}{i}" for i in range(len(x0))], captions, splits, {"latent": x0.half()})


class Oracle:
    """A mixture whose samples are the data, with exact experts."""

    def __init__(self, path: Path, count: int = 600):
        base = GaussianMixture.random(4, 2, SHAPE, seed=0)
        # in [-1, 1], where the codec does not clamp
        self.mixture = GaussianMixture(
            base.means.float() * 0.2, base.scales.float() * 0.1, base.weights.float(), base.clusters
        )
        x0, clusters = self.mixture.sample(count, torch.Generator().manual_seed(1))
        write_shards(path / "encoded", x0, clusters)
        self.reference = Reference(Shards(path / "encoded"), ENCODER, CODEC)

    def ensemble(self, wrong: float = 0.0) -> Ensemble:
        """Exact, or with `wrong` added to every velocity."""
        flow = Objective("flow", Linear())
        experts = []
        for k in range(2):
            network = self.mixture.network(flow, k)
            shifted = (lambda n: lambda x, time, c: n(x, time, c) + wrong)(network)
            experts.append(Expert(shifted, flow, (k,), name=f"expert-{k}"))
        return Ensemble(experts, self.mixture.router, "full")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("oracle"))


class TestEvaluate:
    settings = SMALL.model_copy(update={"images": 200, "steps": 20, "batch": 64, "held_out": 50, "components": 24})

    def test_exact_experts_reach_the_floor_and_wrong_ones_do_not(self, oracle: Oracle) -> None:
        results = evaluate(
            [Variant("good", oracle.ensemble()), Variant("bad", oracle.ensemble(1.0))], oracle.reference, self.settings
        )
        good, bad = results.score("good"), results.score("bad")
        assert good.frechet is not None
        assert bad.frechet is not None
        assert good.frechet < 2 * results.floor
        assert bad.frechet > 5 * results.floor
        # velocities off by 1 everywhere, their noise being the same
        assert bad.denoising.mean - good.denoising.mean == pytest.approx(1, abs=0.1)

    def test_the_floor_compares_disjoint_images(self, oracle: Oracle) -> None:
        probe, base = oracle.reference.split(self.settings)
        assert len(probe) == 200
        assert not set(probe.tolist()) & set(base.tolist())
        training = set(oracle.reference.encoded.rows("train").tolist())
        assert set(probe.tolist()) | set(base.tolist()) == training
        assert not training & set(oracle.reference.held_out(self.settings).tolist())

    def test_few_images_are_split_in_halves(self, oracle: Oracle) -> None:
        probe, base = oracle.reference.split(EvaluateSettings(images=100_000))
        assert len(probe) == len(base) == 270

    @pytest.mark.parametrize("change", [{"batch": 7}, {"workers": 1}])
    def test_results_do_not_depend_on_batch_or_workers(self, oracle: Oracle, change: dict[str, int]) -> None:
        variants = [Variant("a", oracle.ensemble())]
        first = evaluate(variants, oracle.reference, SMALL).score("a")
        second = evaluate(variants, oracle.reference, SMALL.model_copy(update=change)).score("a")
        assert first.frechet == pytest.approx(second.frechet, rel=1e-3)
        assert first.denoising.by_level == pytest.approx(second.denoising.by_level, rel=1e-4)

    def test_every_variant_gets_the_same_noise_and_captions(self, oracle: Oracle) -> None:
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {"a": [], "b": []}

        def spy(name: str) -> Ensemble:
            def network(x: Tensor, time: Tensor, condition: Any) -> Tensor:
                seen[name].append((x, condition.pooled))
                return torch.zeros_like(x)

            return Ensemble([Expert(network, Objective("flow", Linear()))], None)

        evaluate(
            [Variant("a", spy("a")), Variant("b", spy("b"))], oracle.reference, SMALL.model_copy(update={"workers": 1})
        )
        assert len(seen["a"]) == len(seen["b"]) > 0
        for (x_a, pooled_a), (x_b, pooled_b) in zip(seen["a"], seen["b"], strict=True):
            assert torch.equal(x_a, x_b)
            assert torch.equal(pooled_a, pooled_b)
        assert not torch.equal(seen["a"][0][0][0], seen["a"][0][0][1])
        # 12 images in 3 batches, 3 steps each; then 6 latents in 2 batches at 2 levels
        probe, _ = oracle.reference.split(SMALL)
        held_out = oracle.reference.held_out(SMALL)
        sampled = torch.cat([seen["a"][call][1] for call in (0, 3, 6)])
        denoised = torch.cat([seen["a"][call][1] for call in (9, 11)])
        assert torch.equal(sampled, ENCODER(oracle.reference.captions(probe))[0].pooled)
        assert torch.equal(denoised, ENCODER(oracle.reference.captions(held_out))[0].pooled)

    def test_a_variant_that_diverges_is_reported(self, oracle: Oracle) -> None:
        def broken(x: Tensor, time: Tensor, condition: Any) -> Tensor:
            return x * torch.inf

        ensemble = Ensemble([Expert(broken, Objective("flow", Linear()))], None)
        score = evaluate([Variant("broken", ensemble)], oracle.reference, SMALL).score("broken")
        assert score.frechet is None
        assert score.diverged == 12

    def test_a_variants_own_times_are_used(self, oracle: Oracle) -> None:
        seen: dict[str | None, list[float]] = {}

        def router_of(grid: str | None) -> Any:
            def router(x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
                seen.setdefault(grid, []).append(float(t[0]))
                return x.new_zeros(len(x), 2)

            return router

        ensemble = oracle.ensemble()
        variants = [
            Variant(str(grid), Ensemble(ensemble.experts, router_of(grid), "full"), steps=4, method="euler", grid=grid)
            for grid in (None, "cosine")
        ]
        settings = SMALL.model_copy(update={"images": 5, "workers": 1})
        scores = evaluate(variants, oracle.reference, settings).scores
        expected = {None: torch.linspace(1, 0, 5)[:-1], "cosine": times_of(Cosine(), 4)[:-1].float()}
        for grid, times in expected.items():
            torch.testing.assert_close(torch.tensor(seen[grid][:4]), times)
        assert scores[0].frechet != scores[1].frechet

    def test_a_variants_own_sampling_is_used(self, oracle: Oracle) -> None:
        calls = []

        def network(x: Tensor, time: Tensor, condition: Any) -> Tensor:
            calls.append(len(x))
            return torch.zeros_like(x)

        ensemble = Ensemble([Expert(network, Objective("flow", Linear()))], None, null=ENCODER.null(1))
        variant = Variant("long", ensemble, steps=9, method="euler", guidance_scale=2.0)
        score = evaluate([variant], oracle.reference, SMALL).score("long")
        assert (score.steps, score.method, score.guidance_scale) == (9, "euler", 2.0)
        # both branches in sampling, one in the denoising error; four more images whose operations are counted
        assert sum(calls) == (12 + 4) * 9 * 2 + 6 * 2

    def test_progress_ends_at_its_total(self, oracle: Oracle) -> None:
        messages: list[tuple[int, int, str]] = []
        variants = [Variant("a", oracle.ensemble()), Variant("b", replace(oracle.ensemble(), routing="top-1"))]
        evaluate(variants, oracle.reference, SMALL, progress=lambda *args: messages.append(args))
        done = [d for d, _, _ in messages]
        assert done == sorted(done)
        assert messages[-1][0] == messages[-1][1]
        assert {note for _, _, note in messages} == {"a", "b"}

    def test_refuses_two_variants_with_one_name(self, oracle: Oracle) -> None:
        with pytest.raises(AtollError, match="two variants are named a"):
            evaluate([Variant("a", oracle.ensemble()), Variant("a", oracle.ensemble())], oracle.reference, SMALL)

    def test_refuses_data_without_held_out_rows(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path / "d", {}) as writer:
            writer.append(list("abcdef"), ["x"] * 6, ["train"] * 6, {"latent": torch.zeros(6, *SHAPE)})
        with pytest.raises(AtollError, match="no held-out rows"):
            evaluate([], Reference(Shards(tmp_path / "d"), ENCODER, CODEC), SMALL)

    def test_threads_are_restored_and_errors_are_raised(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(4)
        try:
            with side_by_side(2) as run:
                assert list(run(lambda _: torch.get_num_threads(), range(3))) == [2, 2, 2]
                with pytest.raises(ZeroDivisionError):
                    list(run(lambda x: 1 // x, [1, 0]))
            assert torch.get_num_threads() == 4
        finally:
            torch.set_num_threads(before)
        assert not torch.is_inference_mode_enabled()


def save_network(
    path: Path, kind: str, config: dict[str, Any], card: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Save a network with random weights (a fresh one would output zeros) as an artifact."""
    torch.manual_seed(len(path.name))
    network = build_network(config)
    weights = {name: value + 0.05 * torch.randn_like(value) for name, value in network.state_dict().items()}
    described = {"expert": ExpertCard, "router": RouterCard}[kind](network=config, **card)
    save_artifact(path, described, {**{f"network.{n}": w for n, w in weights.items()}, **tensors})


def make_run(path: Path) -> Path:
    """A run with two experts (one eps), a router and a monolith, all with random weights."""
    mixture = GaussianMixture.random(4, 2, SHAPE, seed=0)
    x0, clusters = mixture.sample(60, torch.Generator().manual_seed(1))
    write_shards(path / "encoded", x0, clusters)
    for k in range(2):
        write_shards(path / "clusters" / f"cluster-{k:03d}", x0[clusters == k], clusters[clusters == k], f"k{k}-")
    write_json(
        path / "clusters" / "clusters.json",
        clusters_card(2, feature={"name": "hog", "grid": 8}, method="balanced", largest_over_mean=1.05),
    )
    sizes = {"size": [4, 6], "channels": 1, "patch": 2, "width": 8, "depth": 1, "heads": 2}
    shared = {
        "k": 2,
        "latent_shape": list(SHAPE),
        "codec": CODEC.config(),
        "condition": ENCODER.configs()[0],
        "assignment": "0" * 64,
    }
    dit = {"name": "dit", **sizes, "states_dim": 8}
    log_snr = torch.linspace(-6, 6, 5)
    curve = Calibration(x0.mean(0).float(), log_snr, torch.linspace(0, 1, 5), torch.ones(5), torch.ones(5))
    parts = {
        "experts/0-eps-cosine": (Objective("eps", "cosine"), [0]),
        "experts/1-flow-linear": (Objective("flow", "linear"), [1]),
        "monolith": (Objective("flow", "linear"), [0, 1]),
    }
    for place, (objective, covered) in parts.items():
        name = place.removeprefix("experts/")
        card = {"name": name, "clusters": covered, "objective": objective.config(), "calibration": curve.config()}
        save_network(path / place, "expert", dit, {**card, **shared}, {"calibration.mean": curve.mean})
    routing = {"clusters": shared.pop("k"), **shared}
    save_network(path / "router", "router", {"name": "router", **sizes, "clusters": 2}, routing, {})
    experts = [path / place for place in parts if place != "monolith"]
    sampling = {"steps": 4, "guidance_scale": 2.0, "method": "euler", "routing": "top-2"}
    assemble(experts, path / "router", path / "ensemble", sampling)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("runs") / "<tiny> & run")
    evaluate_run(path, SMALL)
    return path


@cache
def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


class TestEvaluateRun:
    def test_scores_all_variants(self, run: Path) -> None:
        report = report_of(run)
        assert report["groups"] == {
            "ensemble": ["top-1", "top-2", "full"],
            "expert": ["0-eps-cosine", "1-flow-linear"],
            "monolith": ["monolith"],
        }
        scores = {score["name"]: score for score in report["results"]["scores"]}
        assert list(report["alignment"]) == ["native", "snr + calibration", "snr + x0 clamp", "snr alone"]
        assert set(scores) == {name for names in report["groups"].values() for name in names} | set(
            report["alignment"].values()
        )
        assert all(score["frechet"] > 0 and len(score["denoising"]["by_level"]) == 2 for score in scores.values())
        assert scores["top-2"] == {
            **scores["full"],
            **{k: scores["top-2"][k] for k in ("name", "description", "images_per_second", "key", "errors_key")},
        }
        assert report["results"]["frechet_name"] == "FD-pca8"
        # each way of alignment is another model; the calibration acts on both experts
        assert len({scores[name]["denoising"]["mean"] for name in report["alignment"].values()}) == 4

    def test_hashes_cover_every_file_that_was_read(self, run: Path) -> None:
        from atoll.storage.artifact import sha256_file

        hashes = report_of(run)["hashes"]
        assert hashes["monolith/card.json"] == sha256_file(run / "monolith" / "card.json")
        assert hashes["0-eps-cosine/card.json"] == sha256_file(run / "experts" / "0-eps-cosine" / "card.json")
        assert hashes["ensemble/ensemble.json"] == sha256_file(run / "ensemble" / "ensemble.json")
        assert {"encoded/index.json", "clusters/clusters.json", "router/card.json", "feature space pca8"} < set(hashes)

    def test_routing_traces_hold_the_weights_by_step(self, run: Path) -> None:
        usage = {one["routing"]: one for one in report_of(run)["usage"]}
        assert set(usage) == {"top-1", "full"}
        weights = torch.tensor(usage["top-1"]["weights"])
        assert weights.shape == (2, 4, 2)  # prompts, steps, experts
        assert torch.equal(weights.sum(2), torch.ones(2, 4))
        assert set(weights.flatten().tolist()) == {0.0, 1.0}
        assert usage["full"]["times"] == [1.0, 0.75, 0.5, 0.25]
        assert ((torch.tensor(usage["full"]["weights"]) * (1 - weights)).sum() > 0).item()

    def test_clusters_are_described_by_distinctive_words(self, run: Path) -> None:
        first, second = report_of(run)["clusters"]
        assert first["words"][0][0] == "red"
        assert second["words"][0][0] == "blue"
        assert first["count"] + second["count"] == 60
        by = "Clustered by hog (grid 8), balanced: the largest holds 1.05 times the mean."
        assert report_of(run)["clustered_by"] == by
        assert first["words"][0][1] == 1.0
        assert first["words"][0][2] == pytest.approx(first["fraction"])

    def test_the_page_is_self_contained(self, run: Path) -> None:
        page = (run / "report.html").read_text()
        assert "http" not in page.replace("http-equiv", "")
        assert "<script" not in page
        assert "&lt;tiny&gt; &amp; run" in page
        assert (
            page.count("<img ") == page.count('alt="') == 2 * 4 + 1 + 2
        )  # 2 prompts x 4 rows, one in the data, 2 clusters
        assert not [p for p in run.iterdir() if p.name.startswith(".")]

    def test_diagnostics_are_measured_only_on_request(self, run: Path, tmp_path: Path) -> None:
        import shutil

        assert report_of(run)["diagnostics"] is None
        path = tmp_path / "diagnostic_samples"
        shutil.copytree(run, path)
        settings = SMALL.model_copy(update={"diagnostic_samples": 3})
        page = evaluate_run(path, settings).read_text()
        assert "Experts and their data" in page
        diagnostics = report_of(path)["diagnostics"]
        assert diagnostics["trajectory"]["images"] == 3
        assert diagnostics["router"]["count"] == diagnostics["experts"]["count"] == 7  # all that the clusters hold out
        shutil.rmtree(path / "clusters")
        with pytest.raises(AtollError, match=r"evaluate.diagnostic_samples needs the clusters' shards"):
            evaluate_run(path, settings)

    def test_a_sweep_shows_every_variant(self, run: Path, tmp_path: Path) -> None:
        import shutil

        path = tmp_path / "swept"
        shutil.copytree(run, path)
        sweep = SweepSettings(monolith=True, routing=("top-1", "full"), guidance_scale=(1.0, 1.5, 2.0), steps=(2, 3))
        page = evaluate_run(path, SMALL.model_copy(update={"sweep": (sweep,)})).read_text()
        report = report_of(path)
        names = [score["name"] for score in report["results"]["scores"]]
        assert len(names) == 3 * 3 * 2
        assert set(report["groups"]) == {"sweep", "monolith"}
        assert len(report["grid"]["keys"]) == 12
        assert set(report["grid"]["keys"]) <= set(names)
        assert "The first 12 of 18 rows." in page
        assert "Calibration and alignment" not in page
        assert len({score["key"] for score in report["results"]["scores"]}) == 18

    def test_monolith_and_clusters_may_be_missing(self, tmp_path: Path) -> None:
        import shutil

        path = make_run(tmp_path / "bare")
        shutil.rmtree(path / "monolith")
        shutil.rmtree(path / "clusters")
        page = evaluate_run(path, SMALL.model_copy(update={"prompts": ()})).read_text()
        assert "The run has no clusters." in page
        assert "monolith" not in report_of(path)["hashes"]
        assert report_of(path)["usage"][0]["prompts"] == ["red 0", "blue 0"]  # held-out captions if none are set

    def test_other_data_is_refused_and_the_report_is_unchanged(self, tmp_path: Path) -> None:
        path = make_run(tmp_path / "other")
        (path / "report.html").write_text("the last one")
        with ShardWriter(path / "encoded", {}) as writer:
            writer.append(list("abcdef"), ["x"] * 6, ["train"] * 6, {"latent": torch.zeros(6, 1, 8, 6)})
        with pytest.raises(AtollError, match=r"shape \[1, 4, 6\], encoded/ holds \[1, 8, 6\]"):
            evaluate_run(path, SMALL)
        assert (path / "report.html").read_text() == "the last one"

    def test_a_monolith_with_another_encoder_is_refused(self, tmp_path: Path) -> None:
        path = make_run(tmp_path / "mono")
        card = json.loads((path / "monolith" / "card.json").read_text())
        write_json(path / "monolith" / "card.json", {**card, "condition": HashEncoder(8, 4, seed=1).config()})
        with pytest.raises(AtollError, match="one condition encoder"):
            run_module.open_run(path)


def test_an_expert_alone_covers_all_clusters() -> None:
    flow = Objective("flow", Linear())
    experts = [Expert(lambda x, time, c, k=k: x * 0 + k, flow, (k,), name=f"e{k}") for k in range(3)]
    ensemble = Ensemble(experts, lambda x, t, pooled: x.new_zeros(len(x), 3), "full")
    one = alone(experts[2], ensemble)
    x = torch.randn(5, *SHAPE)
    torch.testing.assert_close(one.velocity(x, torch.full((5,), 0.5)), torch.full_like(x, 2.0))


@given(sources=st.integers(1, 8), each=st.integers(1, 40))
def test_the_grid_shows_every_source(sources: int, each: int) -> None:
    captions = [f"{source} {i % each}" for source in range(sources) for i in range(2 * each)]
    shown = _spread_out(captions)
    assert len(set(shown)) == len(shown) == min(8, sources * each)
    assert {prompt.split()[0] for prompt in shown} == {str(source) for source in range(sources)}


def test_words_that_are_everywhere_are_not_distinctive() -> None:
    counts = count_words(["A red dot", "red, red line"])
    assert counts == {"a": 1, "red": 2, "dot": 1, "line": 1}
    overall = count_words(["A red dot", "red, red line", "a red sea", "red"])
    words = distinctive_words(counts, 2, overall, 4)
    assert [word for word, _, _ in words] == ["dot", "line"]


def test_results_are_looked_up_by_name() -> None:
    results = Results((Space("pca1", 1, "0", 1.0),), 1, 1, 1, {"FD-pca1 [0]": 0.25, "KD-pca1 [0]": 0.5}, 1, "")
    with pytest.raises(KeyError):
        results.score("nobody")
    assert (results.frechet_name, results.floor) == ("FD-pca1", 0.25)


@pytest.mark.parametrize(
    ("routing", "calls"),
    [("top-1", 1), ("top-9", 3), ("full", 3), ("sample-2", 2), ("nucleus-0.9", 3), ("oracle-1", 3)],
)
def test_calls_per_velocity_by_routing(routing, calls) -> None:
    experts = [Expert(lambda x, time, condition: x, Objective("flow", "linear"), (k,)) for k in range(3)]
    ensemble = Ensemble(experts, lambda x, t, pooled=None: x.new_zeros(len(x), 3), routing)
    assert Variant("one", ensemble).calls == calls
