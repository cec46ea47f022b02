"""Trajectory diagnostics for fields with known distances, angles and growth; and their page."""

import json
import math
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.condition import Condition, select_rows
from atoll.ensemble import Ensemble, Expert
from atoll.errors import AtollError
from atoll.evaluate.diagnostics.cluster_space import ClusterSpace
from atoll.evaluate.diagnostics.routers import HeldOut
from atoll.evaluate.diagnostics.trajectory import (
    Diagnostics,
    Draw,
    angles_between,
    diagnose,
    diagnose_trajectory,
    mean_of_pairs,
    start_steps,
)
from atoll.evaluate.pages.diagnose_page import diagnostics_html, diagnostics_json
from atoll.objective import Objective
from atoll.randomness import seeded_noise
from atoll.schedule import Linear
from atoll.solver import sample
from atoll.testing import GaussianMixture

SHAPE = (1, 2, 3)
FLOW = Objective("flow", Linear())
EULER = Draw(steps=5, method="euler")


def noise_of(count: int = 4, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return seeded_noise(range(count), shape).double()


def constant(x0: Tensor | float, clusters: tuple[int, ...] = (0,), name: str = "constant") -> Expert:
    """An expert whose x0 is always the same."""
    value = torch.as_tensor(x0, dtype=torch.float64)
    return Expert(lambda x, t, c: value.expand_as(x).to(x), Objective("x0", Linear()), clusters, name=name)


def linear(slope: float, clusters: tuple[int, ...] = (0,)) -> Expert:
    """dx/dt = slope x."""
    return Expert(lambda x, t, c: slope * x, FLOW, clusters, name=f"slope {slope}")


def flat(clusters: int):
    return lambda x, t, pooled=None: x.new_zeros(len(x), clusters).log_softmax(1)


@pytest.fixture(scope="module")
def mixture() -> GaussianMixture:
    return GaussianMixture.random(components=6, clusters=3, shape=SHAPE, seed=3, spread=1.2)


def exact(mixture: GaussianMixture, routing: str = "top-1") -> Ensemble:
    experts = [Expert(mixture.network(FLOW, k), FLOW, (k,), name=f"expert {k}") for k in range(3)]
    return Ensemble(experts, mixture.router, routing)


def points(*rows: float) -> ClusterSpace:
    """One cluster per number: latents with this value everywhere."""
    latents = torch.tensor(rows, dtype=torch.float64).reshape(-1, 1, 1, 1).expand(-1, *SHAPE)
    return ClusterSpace.of([(latents, torch.arange(len(rows)))])


class TestClusterSpace:
    @given(cuts=st.lists(st.integers(0, 20), max_size=4))
    @settings(max_examples=30)
    def test_a_cluster_space_does_not_depend_on_the_batches(self, cuts: list[int]) -> None:
        g = torch.Generator().manual_seed(0)
        latents = torch.randn(20, *SHAPE, generator=g, dtype=torch.float64)
        clusters = torch.randint(3, (20,), generator=g)
        edges = [0, *sorted(cuts), 20]
        parts = [(latents[a:b], clusters[a:b]) for a, b in pairwise(edges)]
        space = ClusterSpace.of(parts, sample_size=4)
        for k in range(3):
            mine = latents[clusters == k].flatten(1)
            torch.testing.assert_close(space.centroids[k], mine.mean(0))
            assert torch.equal(space.samples[k], mine[:4])

    def test_distances_are_root_mean_squares_per_value(self) -> None:
        latents = torch.tensor([0.0, 2.0, 7.0]).reshape(3, 1, 1, 1).expand(-1, *SHAPE)
        space = ClusterSpace.of([(latents, torch.tensor([0, 0, 2]))])
        found = space.distances(torch.full((2, *SHAPE), 3.0))
        assert found["centroid"].tolist() == [[2.0, math.inf, 4.0]] * 2
        assert found["nearest neighbour"].tolist() == [[1.0, math.inf, 4.0]] * 2

    def test_distances_can_be_taken_in_features(self) -> None:
        latents = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1).expand(-1, *SHAPE)
        squares = ClusterSpace.of(
            [(latents, torch.arange(2))], features=lambda x: x.flatten(1)[:, :2] ** 2, name="squares"
        )
        assert squares.distances(torch.full((4, *SHAPE), 2.0))["centroid"].tolist() == [[3.0, 5.0]] * 4

    def test_half_precision_is_summed_in_full(self) -> None:
        latents = torch.full((3000, *SHAPE), 1.001, dtype=torch.float16)
        space = ClusterSpace.of([(latents, torch.zeros(3000).long())])
        assert space.centroids.dtype == torch.float32
        torch.testing.assert_close(space.centroids, latents[:1].flatten(1).float())

    def test_refuses_no_latents_and_experts_without_data(self) -> None:
        with pytest.raises(AtollError, match="got no latents"):
            ClusterSpace.of([])
        ensemble = Ensemble([constant(0.0, (0,)), constant(1.0, (2,), "third")], flat(3), "top-1")
        with pytest.raises(AtollError, match=r"third: the cluster space has no data of its clusters \[2\]"):
            diagnose_trajectory(ensemble, noise_of(), space=points(0.0, 1.0), draw=EULER)


class TestDistances:
    def test_distances_of_experts_that_predict_their_clusters_mean(self) -> None:
        # The estimate is the chosen expert's: its own cluster is 0 away, the others as far as the means are apart.
        experts = [constant(0.0, (0,), "0"), constant(1.0, (1,), "1"), constant(3.0, (2,), "2")]
        ensemble = Ensemble(experts, None, "oracle-1")
        trajectory = diagnose_trajectory(ensemble, noise_of(), space=points(0.0, 1.0, 3.0), draw=EULER)
        assert [found.kind for found in trajectory.distances] == ["centroid", "nearest neighbour"]
        for found in trajectory.distances:
            assert found.chosen == pytest.approx([0.0] * 5, abs=1e-9)
            assert found.unchosen == pytest.approx([1.5] * 5)
            assert found.nearest == pytest.approx([0.0] * 5, abs=1e-9)
            assert found.aligned == (1.0,) * 5
        assert trajectory.times == (1.0, 0.8, 0.6, 0.4, 0.2)

    def test_distances_of_experts_with_the_wrong_data(self) -> None:
        experts = [constant(0.0, (0,), "0"), constant(1.0, (1,), "1")]
        trajectory = diagnose_trajectory(
            Ensemble(experts, None, "oracle-1"), noise_of(), space=points(1.0, 0.0), draw=EULER
        )
        assert trajectory.distances[0].chosen == pytest.approx([1.0] * 5)
        assert trajectory.distances[0].unchosen == pytest.approx([0.0] * 5, abs=1e-9)
        assert trajectory.distances[0].aligned == (0.0,) * 5

    def test_a_generalist_is_as_near_as_its_nearest_cluster(self) -> None:
        experts = [constant(0.0, (0,), "0"), constant(2.5, (1, 2), "1, 2")]
        trajectory = diagnose_trajectory(
            Ensemble(experts, None, "oracle-2"), noise_of(), space=points(0.0, 1.0, 3.0), draw=EULER
        )
        assert trajectory.distances[0].chosen == pytest.approx([0.5] * 5)
        assert trajectory.distances[0].aligned == (1.0,) * 5

    def test_without_other_experts_their_distance_is_nan(self) -> None:
        ensemble = Ensemble([constant(0.0, (0,), "0"), constant(1.0, (1,), "1")], flat(2), "full")
        trajectory = diagnose_trajectory(ensemble, noise_of(), space=points(0.0, 1.0), draw=EULER)
        assert all(map(math.isnan, trajectory.distances[0].unchosen))
        assert trajectory.distances[0].chosen == pytest.approx([0.5] * 5)
        assert trajectory.distances[0].aligned == pytest.approx([0.5] * 5)

    def test_chosen_exact_experts_have_the_nearest_data(self, mixture) -> None:
        space = ClusterSpace.of([mixture.sample(300, torch.Generator().manual_seed(0))])
        found = diagnose_trajectory(exact(mixture), noise_of(40), space=space, draw=Draw(steps=8)).distances[1]
        late = slice(5, 8)
        assert all(a < 0.7 * b for a, b in zip(found.chosen[late], found.unchosen[late], strict=True))
        assert min(found.aligned[late]) > 0.9

    def test_the_callers_clusters_reach_the_oracle(self) -> None:
        # Expert 1 is 2 off its data; three of the four images are its own.
        ensemble = Ensemble([constant(0.0, (0,), "0"), constant(1.0, (1,), "1")], None, "oracle")
        own = torch.tensor([0, 1, 1, 1])
        trajectory = diagnose_trajectory(
            ensemble, noise_of(), space=points(0.0, 3.0), draw=EULER, clusters=own, batch=3
        )
        assert trajectory.distances[0].chosen == pytest.approx([1.5] * 5)


class TestDisagreement:
    def test_identical_experts_do_not_disagree(self, mixture) -> None:
        network = mixture.network(FLOW, 1)
        experts = [Expert(network, FLOW, (k,), name=str(k)) for k in range(2)]
        ensemble = Ensemble(experts, flat(2), "full")
        for noise in (noise_of(), noise_of().float()):
            trajectory = diagnose_trajectory(ensemble, noise, draw=EULER)
            assert trajectory.disagreement.every == (0.0,) * 5
            assert trajectory.disagreement.chosen == (0.0,) * 5

    def test_opposite_experts_disagree_by_180_degrees(self) -> None:
        trajectory = diagnose_trajectory(
            Ensemble([linear(0.5), linear(-2, (1,))], flat(2), "full"), noise_of(), draw=EULER
        )
        assert trajectory.disagreement.every == pytest.approx([180.0] * 5)

    def test_only_pairs_of_chosen_experts_count_as_chosen(self) -> None:
        experts = [linear(1.0, (0,)), linear(2.0, (1,)), linear(-1.0, (2,))]
        log_p = torch.tensor([0.5, 0.5, 0.0]).log()
        two = Ensemble(experts, lambda x, t, pooled=None: log_p.expand(len(x), -1), "full")
        trajectory = diagnose_trajectory(two, noise_of(), draw=EULER)
        assert trajectory.disagreement.chosen == pytest.approx([0.0] * 5)
        assert trajectory.disagreement.every == pytest.approx([120.0] * 5)  # 0, 180 and 180
        one = diagnose_trajectory(replace(two, routing="top-1"), noise_of(), draw=EULER)
        assert all(map(math.isnan, one.disagreement.chosen))

    def test_an_image_with_one_chosen_expert_is_left_out(self) -> None:
        def router(x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
            return torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]).log()

        trajectory = diagnose_trajectory(
            Ensemble([linear(0.5), linear(-2, (1,))], router, "full"), noise_of(), draw=EULER
        )
        assert trajectory.disagreement.chosen == pytest.approx([180.0] * 5)

    @given(st.integers(0, 1000))
    @settings(max_examples=25)
    def test_angles_are_arc_cosines(self, seed: int) -> None:
        v = torch.randn(5, 3, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        cosines = torch.nn.functional.cosine_similarity(v[:, :, None].flatten(3), v[:, None].flatten(3), dim=3)
        torch.testing.assert_close(angles_between(v), torch.rad2deg(torch.arccos(cosines.clamp(-1, 1))).triu(1))

    def test_small_angles_are_accurate_in_single_precision(self) -> None:
        v = torch.tensor([[[1.0, 0.0], [1.0, 1e-5]]])
        assert float(angles_between(v)[0, 0, 1]) == pytest.approx(math.degrees(1e-5), rel=1e-3)  # arc cosine: 0

    def test_mean_of_pairs(self) -> None:
        angles = torch.tensor([[[0.0, 10.0, 20.0], [0.0, 0.0, 60.0], [0.0, 0.0, 0.0]]]).repeat(2, 1, 1)
        those = torch.tensor([[True, True, True], [True, False, True]])
        assert mean_of_pairs(angles, those).tolist() == [30.0, 20.0]


class TestSensitivity:
    @pytest.mark.parametrize("slope", [-1.5, 0.0, 2.0])
    def test_growth_in_a_linear_field_under_euler(self, slope: float) -> None:
        trajectory = diagnose_trajectory(
            Ensemble([linear(slope)], None), noise_of(), draw=replace(EULER, starts=(1.0, 0.4))
        )
        assert trajectory.sensitivity.times == (1.0, 0.4)
        assert trajectory.sensitivity.growth == pytest.approx([(1 - slope / 5) ** 5, (1 - slope / 5) ** 2], rel=1e-6)
        assert trajectory.sensitivity.standard_error == pytest.approx([0, 0], abs=1e-6)

    def test_growth_in_a_linear_field_is_near_the_exponential(self) -> None:
        # dx/dt = x from t to 0: x0 = e^-t x.
        draw = Draw(steps=60, method="heun", starts=(0.9, 0.3))
        growth = diagnose_trajectory(Ensemble([linear(1.0)], None), noise_of(2), draw=draw).sensitivity.growth
        assert growth == pytest.approx([math.exp(-0.9), math.exp(-0.3)], rel=0.01)

    def test_growth_is_accurate_in_single_precision(self) -> None:
        trajectory = diagnose_trajectory(Ensemble([linear(1.0)], None), noise_of().float(), draw=EULER)
        assert trajectory.sensitivity.growth[0] == pytest.approx(0.8**5, rel=1e-3)

    def test_a_constant_x0_removes_the_perturbation(self) -> None:
        trajectory = diagnose_trajectory(Ensemble([constant(1.0)], None), noise_of(), draw=EULER)
        assert trajectory.sensitivity.growth == pytest.approx([0.0] * 5, abs=1e-9)

    def test_directions_depend_only_on_seed_and_row(self, mixture) -> None:
        def growth(noise: Tensor, seed: int = 0, batch: int = 64):
            trajectory = diagnose_trajectory(exact(mixture, "full"), noise, draw=EULER, seed=seed, batch=batch)
            return pytest.approx(trajectory.sensitivity.growth, rel=1e-9)

        assert growth(noise_of(), batch=3).expected == growth(noise_of())
        assert growth(noise_of(), seed=1).expected != growth(noise_of())

    def test_starts_are_steps_of_the_grid(self) -> None:
        assert start_steps(Draw(steps=10)) == [0, 2, 4, 6, 8]
        assert start_steps(Draw(steps=4, starts=(0.0, 0.01, 0.9, 1.0))) == [0, 3]
        assert start_steps(Draw(starts=())) == []


class TestRefinement:
    def test_differences_in_a_linear_field_under_euler(self) -> None:
        noise = noise_of()
        found = diagnose_trajectory(Ensemble([linear(1.0)], None), noise, draw=EULER).refinement
        rms = float(noise.flatten(1).square().mean(1).sqrt().mean())
        ends = {n: (1 - 1 / n) ** n for n in (5, 10, 20)}
        assert found.steps == (5, 10, 20)
        assert [(a, b) for a, b, _ in found.distances] == [(5, 10), (10, 20), (5, 20)]
        for a, b, distance in found.distances:
            assert distance == pytest.approx(rms * abs(ends[a] - ends[b]))

    @pytest.mark.parametrize("method", ["euler", "heun", "dpm++2m"])
    def test_refinement_compares_the_solvers_images(self, mixture, method) -> None:
        ensemble, noise = exact(mixture, "full"), noise_of()
        found = diagnose_trajectory(ensemble, noise, draw=Draw(3, method, starts=()), batch=3)
        ends = [sample(ensemble.velocity, noise, steps, method) for steps in (3, 6, 12)]
        expected = [(ends[a] - ends[b]).flatten(1).square().mean(1).sqrt().mean() for a, b in ((0, 1), (1, 2), (0, 2))]
        assert [d for _, _, d in found.refinement.distances] == pytest.approx([float(e) for e in expected])
        assert found.sensitivity.growth == ()


class TestTrajectory:
    def test_trajectories_do_not_depend_on_the_batches(self, mixture) -> None:
        space = ClusterSpace.of([mixture.sample(50, torch.Generator().manual_seed(0))])
        parts, together = (
            diagnose_trajectory(exact(mixture, "top-2"), noise_of(7), space=space, draw=EULER, batch=b) for b in (3, 7)
        )
        assert parts.images == together.images == 7
        assert parts.distances[0].unchosen == pytest.approx(together.distances[0].unchosen)
        assert parts.disagreement.every == pytest.approx(together.disagreement.every)

    def test_one_expert_alone(self) -> None:
        trajectory = diagnose_trajectory(Ensemble([constant(1.0)], None), noise_of(), space=points(1.0), draw=EULER)
        assert all(map(math.isnan, (*trajectory.distances[0].unchosen, *trajectory.disagreement.every)))
        assert trajectory.distances[0].aligned == (1.0,) * 5

    def test_guidance_reaches_the_ensemble_and_each_expert(self) -> None:
        def expert(k: int) -> Expert:
            """x0 = k + 1 with the prompt, 0 without: guidance 3 makes it 3 (k + 1)."""

            def network(x: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
                assert condition is not None
                return (k + 1) * condition.states.mean((1, 2)).reshape(-1, 1, 1, 1).expand_as(x).to(x)

            return Expert(network, Objective("x0", Linear()), (k,), name=str(k))

        def prompt(value: float, n: int) -> Condition:
            return Condition(torch.full((n, 2, 3), value), torch.ones(n, 2).bool())

        ensemble = Ensemble([expert(0), expert(1)], None, "oracle-0", null=(prompt(0.0, 1),))
        draw, x = replace(EULER, guidance_scale=3.0), noise_of()
        angles = angles_between(torch.stack([x - 3, x - 6], dim=1))[:, 0, 1]  # at t = 1, u = x - x0
        condition = partial(select_rows, (prompt(1.0, 4),))
        trajectory = diagnose_trajectory(ensemble, x, condition, space=points(3.0, 0.0), draw=draw, batch=3)
        assert trajectory.distances[0].chosen == pytest.approx([0.0] * 5, abs=1e-6)
        assert trajectory.disagreement.every[0] == pytest.approx(float(angles.mean()))

    def test_an_expert_that_outputs_nan_is_shown_and_not_dropped(self) -> None:
        broken = Expert(lambda x, t, c: x * torch.nan, FLOW, (1,), name="broken")
        ensemble = Ensemble([constant(0.0), broken], None, "oracle-0")
        trajectory = diagnose_trajectory(ensemble, noise_of(), space=points(0.0, 1.0), draw=EULER)
        assert all(map(math.isnan, trajectory.disagreement.every))
        assert trajectory.distances[0].chosen == pytest.approx([0.0] * 5, abs=1e-9)
        broken_alone = diagnose_trajectory(replace(ensemble, routing="oracle-1"), noise_of(), draw=EULER)
        assert math.isnan(broken_alone.refinement.distances[0][2])

    def test_refuses_no_noise(self) -> None:
        with pytest.raises(AtollError, match="no noise"):
            diagnose_trajectory(Ensemble([constant(1.0)], None), noise_of(1)[:0])


class Checked(HTMLParser):
    """Every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(html: str) -> list[str]:
    parser = Checked()
    parser.feed(html)
    assert not parser.open
    for missing in (">nan", " nan", "inf ", "None"):
        assert missing not in html
    return parser.tags


@pytest.fixture(scope="module")
def found(mixture) -> Diagnostics:
    x0, labels = mixture.sample(40, torch.Generator().manual_seed(1))
    space = ClusterSpace.of([(x0, labels)], name="latents & <more>")
    ensemble = exact(mixture, "top-2")
    named = replace(ensemble, experts=[replace(e, name=f"<b>{e.name}") for e in ensemble.experts])
    held_out = HeldOut(x0, labels, range(40))
    return diagnose(named, noise_of(), space=space, held_out=held_out, draw=EULER, levels=(0.2, 0.45, 0.9))


class TestPage:
    def test_the_page_shows_all_measurements(self, found) -> None:
        html = diagnostics_html(found)
        tags = checked(html)
        assert tags.count("svg") - tags.count("li") == 3 + 2 + 1 + 3  # the charts; a legend's entry has a small one
        assert tags.count("table") == 3
        assert "4 images, 5 euler steps, guidance 1, routing top-2" in html
        assert "&lt;b&gt;expert 0" in html
        assert "<b>" not in html
        assert "latents &amp; &lt;more&gt;" in html
        assert "At t = 0.45, " in html
        lower = sum(a < b for a, b in zip(found.experts.chosen, found.experts.unchosen, strict=True))
        assert f"The chosen experts are more accurate than the others at {lower} of 3 times" in html
        assert "3 of 3 experts are more accurate in their own clusters" in html

    def test_the_best_of_each_row_is_darkest(self, found) -> None:
        table = diagnostics_html(found).split("<h3>Specialisation</h3>")[1].split("</table>")[0]
        for k, row in enumerate(table.split("<tr>")[2:5]):
            cells = row.split("<td")[1:]
            assert [k == i for i in range(3)] == ["var(--c0) 45%" in cell for cell in cells]
            assert [k == i for i in range(3)] == ["font-weight:700" in cell for cell in cells]

    def test_a_page_without_router_clusters_or_held_out_latents(self) -> None:
        ensemble = Ensemble([constant(1.0, (0, 1))], None)
        alone = diagnose(ensemble, noise_of(), draw=replace(EULER, starts=()))
        assert (alone.experts, alone.router) == (None, None)
        html = diagnostics_html(alone)
        checked(html)
        assert "There are no two experts to compare." in html
        held_out = HeldOut(noise_of(3), torch.tensor([0, 2, 2]), range(3))
        more = diagnose(ensemble, noise_of(), held_out=held_out, space=points(0.0, 1.0), draw=EULER)
        assert more.router is None
        html = diagnostics_html(more)
        checked(html)
        assert "Every expert is chosen" in html

    def test_a_page_of_diverged_images_is_valid(self) -> None:
        broken = Expert(lambda x, t, c: x * torch.nan, FLOW, (0, 1), name="broken")
        held_out = HeldOut(noise_of(3), torch.tensor([0, 1, 1]), range(3))
        found = diagnose(Ensemble([broken], None), noise_of(), held_out=held_out, space=points(0.0, 1.0), draw=EULER)
        checked(diagnostics_html(found))
        json.dumps(diagnostics_json(found), allow_nan=False)

    def test_json_holds_every_number(self, found) -> None:
        value = json.loads(json.dumps(diagnostics_json(found), allow_nan=False))
        assert value["trajectory"]["times"] == [1.0, 0.8, 0.6, 0.4, 0.2]
        assert value["trajectory"]["distances"][1]["kind"] == "nearest neighbour"
        assert value["trajectory"]["refinement"]["steps"] == [5, 10, 20]
        assert value["experts"]["matrix"] == [list(row) for row in found.experts.matrix]
        assert value["router"]["confusion"][0] == [list(row) for row in found.router.confusion[0]]
        assert set(diagnostics_json(Diagnostics(found.trajectory))) == {"trajectory"}
