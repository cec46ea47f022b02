"""Experts alone on held-out latents: exact ones are best in their own clusters, chosen ones beat others."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from atoll.condition import Condition, select_rows
from atoll.ensemble import Ensemble, Expert
from atoll.ensemble.replicas import Stacking
from atoll.evaluate.diagnostics.experts import ExpertErrors, by_choice, chosen_of, mean_and_error, measure_experts
from atoll.evaluate.diagnostics.routers import HeldOut
from atoll.evaluate.metrics.frechet import squared_errors
from atoll.objective import Objective
from atoll.schedule import Cosine, Linear
from atoll.testing import GaussianMixture

LEVELS = (0.2, 0.5, 0.8)
FLOW = Objective("flow", Linear())
V = Objective("v", Cosine())


@pytest.fixture(scope="module")
def mixture() -> GaussianMixture:
    return GaussianMixture.random(components=9, clusters=3, shape=(1, 2, 5), seed=2, spread=1.0)


@pytest.fixture(scope="module")
def held_out(mixture) -> HeldOut:
    x0, labels = mixture.sample(60, torch.Generator().manual_seed(0))
    return HeldOut(x0, labels, range(7, 67))


def exact(mixture: GaussianMixture, k: int | None, clusters: tuple[int, ...] = (), objective=FLOW) -> Expert:
    """The exact expert of cluster k (None: of all data)."""
    covers = clusters or (() if k is None else (k,))
    return Expert(mixture.network(objective, k), objective, covers, name=f"expert {k}")


def constant(value: float, clusters: tuple[int, ...] = (0,), name: str = "constant") -> Expert:
    """An expert with constant x0 = value; its squared error is (value - x0)^2 / t^2."""
    return Expert(lambda x, t, c: torch.full_like(x, value), Objective("x0", Linear()), clusters, name=name)


def measured(ensemble: Ensemble, held_out: HeldOut, levels=LEVELS, batch: int = 16) -> ExpertErrors:
    return measure_experts(ensemble, held_out, levels, batch)


@pytest.fixture(scope="module")
def found(mixture, held_out) -> ExpertErrors:
    experts = [exact(mixture, k, objective=[FLOW, V, FLOW][k]) for k in range(3)]
    return measured(Ensemble(experts, mixture.router, "top-1"), held_out)


class TestExactExperts:
    def test_chosen_experts_are_better_than_others(self, found) -> None:
        for chosen, unchosen in zip(found.chosen, found.unchosen, strict=True):
            assert chosen < 0.9 * unchosen

    def test_each_expert_is_best_in_its_own_cluster(self, found) -> None:
        for k, row in enumerate(found.matrix):
            assert min(range(3), key=row.__getitem__) == k
            assert all(level[k][k] == min(level[k]) for level in found.by_level)
        assert max(found.over_other_clusters) < 1
        assert max(found.over_other_experts) < 1

    def test_the_matrix_holds_denoising_errors_by_cluster_and_expert(self, found, mixture, held_out) -> None:
        errors = squared_errors(
            exact(mixture, 1, objective=V).velocity, held_out.x0, None, LEVELS, held_out.seeds
        ).double()
        for k in range(3):
            mine = errors[held_out.labels == k]
            assert found.counts[k] == len(mine)
            assert found.matrix[k][1] == pytest.approx(float(mine.mean()))
            assert found.matrix_error[k][1] == pytest.approx(float(mine.mean(1).std()) / math.sqrt(len(mine)))
            for level in range(3):
                assert found.by_level[level][k][1] == pytest.approx(float(mine[:, level].mean()))
                error = float(mine[:, level].std()) / math.sqrt(len(mine))
                assert found.by_level_error[level][k][1] == pytest.approx(error)

    def test_ratios_in_closed_form(self, found) -> None:
        matrix = torch.tensor(found.matrix)
        for e in range(3):
            others = [k for k in range(3) if k != e]
            assert found.over_other_clusters[e] == pytest.approx(float(matrix[e, e] / matrix[others, e].mean()))
            assert found.over_other_experts[e] == pytest.approx(float(matrix[e, e] / matrix[e, others].mean()))

    def test_fused_error_is_the_ensembles_and_not_above_the_chosen(self, mixture, held_out) -> None:
        ensemble = Ensemble([exact(mixture, k) for k in range(3)], mixture.router, "top-2")
        found = measured(ensemble, held_out)
        errors = squared_errors(ensemble.velocity, held_out.x0, None, LEVELS, held_out.seeds)
        assert found.fused == pytest.approx(errors.mean(0).tolist())
        assert all(f <= c * 1.001 for f, c in zip(found.fused, found.chosen, strict=True))
        assert found.fused[2] < 0.99 * found.chosen[2]

    def test_results_do_not_depend_on_the_batches(self, mixture, held_out) -> None:
        ensemble = Ensemble([exact(mixture, k) for k in range(3)], mixture.router, "top-2")
        parts, together = (measured(ensemble, held_out, batch=b) for b in (7, 100))
        assert parts.chosen == pytest.approx(together.chosen)
        assert parts.matrix[1] == pytest.approx(together.matrix[1])


class TestChoice:
    def test_chosen_experts_have_one_percent_or_the_largest_weight(self) -> None:
        weights = torch.tensor([[0.5, 0.495, 0.005, 0.0], [0.0, 0.0, 1.0, 0.0], [0.01, 0.99, 0.0, 0.0]])
        assert chosen_of(weights).tolist() == [
            [True, True, False, False],
            [False, False, True, False],
            [True] * 2 + [False] * 2,
        ]
        assert chosen_of(torch.full((2, 200), 1 / 200)).all()

    def test_chosen_values_are_weighted_and_others_are_not(self) -> None:
        values = torch.tensor([[[1.0, 3.0, 10.0, 20.0]], [[2.0, 8.0, 4.0, 6.0]]]).double()  # [2, 1, 4]
        weights = torch.tensor([[[0.25, 0.75, 0.0, 0.0]], [[0.0, 1.0, 0.0, 0.0]]])
        chosen, unchosen = by_choice(values, weights)
        assert chosen[:, 0].tolist() == pytest.approx([(2.5 + 8) / 2, 5.5 / math.sqrt(2) / math.sqrt(2)])
        assert unchosen[0, 0] == pytest.approx((15 + 4) / 2)

    def test_an_image_without_others_is_left_out_of_their_mean(self) -> None:
        values = torch.tensor([[[1.0, 3.0]], [[2.0, 8.0]]]).double()
        chosen, unchosen = by_choice(values, torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]]))
        assert (float(chosen[0]), float(unchosen[0])) == (2.0, 8.0)
        assert by_choice(values, torch.full((2, 1, 2), 0.5))[1].isnan().all()

    def test_infinite_values_of_others_do_not_affect_the_chosen(self) -> None:
        values = torch.tensor([[[1.0, torch.inf]], [[2.0, torch.nan]]]).double()
        chosen, unchosen = by_choice(values, torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]))
        assert float(chosen[0]) == 1.5
        assert not unchosen.isfinite().any()
        assert by_choice(values, torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))[0].isnan().all()  # nor is it hidden

    def test_mean_of_one_has_no_error_and_mean_of_none_is_nan(self) -> None:
        mean, error = mean_and_error(torch.tensor([[3.0, 4.0]]))
        assert mean.tolist() == [3, 4]
        assert error.isnan().all()
        assert all(part.isnan().all() for part in mean_and_error(torch.zeros(0, 2)))


class TestKindsOfEnsembles:
    def test_one_expert_alone(self, mixture, held_out) -> None:
        found = measured(Ensemble([exact(mixture, None, (0, 1, 2))], None), held_out)
        assert found.chosen == pytest.approx(found.fused)
        assert all(map(math.isnan, (*found.unchosen, *found.over_other_clusters, *found.over_other_experts)))

    def test_replicas_of_one_cluster_are_both_chosen(self, mixture, held_out) -> None:
        twin = replace(exact(mixture, 0), name="twin")
        experts = [exact(mixture, 0), twin, exact(mixture, 1), exact(mixture, 2)]
        found = measured(Ensemble(experts, mixture.router, "top-1"), held_out)
        assert found.over_other_experts[0] == pytest.approx(found.over_other_experts[1])
        matrix = torch.tensor(found.matrix)
        assert found.over_other_experts[1] == pytest.approx(float(matrix[0, 1] / matrix[0, 2:].mean()))
        single = measured(Ensemble([experts[0], *experts[2:]], mixture.router, "top-1"), held_out)
        assert found.chosen == pytest.approx(single.chosen)

    def test_stacked_replicas_have_the_weights_of_their_stacking(self, mixture, held_out) -> None:
        experts = [constant(0.0, (0, 1, 2), "a"), constant(1.0, (0, 1, 2), "b")]
        nodes = torch.tensor([-9.0, 9.0])
        stacking = Stacking(("a", "b"), torch.zeros(1, 2, 5), nodes, torch.tensor([[0.25, 0.75]] * 2), torch.ones(2))
        found = measured(Ensemble(experts, mixture.router, "top-1", stackings=[stacking]), held_out, levels=(0.5,))
        errors = [float((v - held_out.x0).square().mean()) / 0.25 for v in (0.0, 1.0)]
        assert found.chosen == pytest.approx([0.25 * errors[0] + 0.75 * errors[1]])
        assert found.fused == pytest.approx([float((0.75 - held_out.x0).square().mean()) / 0.25])

    def test_a_generalist_owns_all_clusters_that_it_covers(self, mixture, held_out) -> None:
        experts = [exact(mixture, 0), exact(mixture, None, (1, 2))]
        found = measured(Ensemble(experts, mixture.router, "top-1"), held_out)
        matrix = torch.tensor(found.matrix)
        assert found.over_other_clusters[1] == pytest.approx(float(matrix[1:, 1].mean() / matrix[0, 1]))
        assert found.over_other_experts[1] == pytest.approx(float((matrix[1:, 1] / matrix[1:, 0]).mean()))

    def test_the_oracle_chooses_the_clusters_own(self, mixture, held_out) -> None:
        found = measured(Ensemble([exact(mixture, k) for k in range(3)], None, "oracle"), held_out)
        for level in range(3):
            own = sum(found.counts[k] * found.by_level[level][k][k] for k in range(3)) / found.count
            assert found.chosen[level] == pytest.approx(own)

    def test_a_time_switch_changes_the_chosen_expert(self, held_out) -> None:
        experts = [constant(0.0, (0, 1, 2), "a"), constant(1.0, (0, 1, 2), "b")]
        found = measured(Ensemble(experts, None, "time-switch-0.5:a:b"), held_out)
        errors = [float((v - held_out.x0).square().mean()) for v in (0.0, 1.0)]
        assert found.chosen == pytest.approx([errors[1] / 0.04, errors[0] / 0.25, errors[0] / 0.64])
        assert found.unchosen == pytest.approx([errors[0] / 0.04, errors[1] / 0.25, errors[1] / 0.64])

    def test_each_expert_reads_the_condition_of_its_encoder(self, held_out) -> None:
        def network(width: int):
            def reads(x: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
                assert condition is not None
                assert condition.states.shape == (len(x), 2, width)
                return x + condition.states.mean((1, 2)).reshape(-1, 1, 1, 1)

            return reads

        n = len(held_out.x0)
        parts = [
            Condition(torch.full((n, 2, width), float(width)), torch.ones(n, 2).bool(), torch.zeros(n, 4))
            for width in (3, 5)
        ]
        experts = [Expert(network(w), FLOW, (i,), name=str(i), encoder=i) for i, w in enumerate((3, 5))]

        def router(x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
            assert pooled is not None
            assert pooled.shape == (len(x), 4)
            return torch.zeros(len(x), 3)

        ensemble = Ensemble(experts, router, "top-1")
        given = measured(ensemble, replace(held_out, condition=partial(select_rows, parts)))
        assert given.matrix[0][0] != pytest.approx(given.matrix[0][1])

    def test_a_cluster_without_latents_has_no_row(self, mixture, held_out) -> None:
        mine = held_out.labels != 2
        some = HeldOut(held_out.x0[mine], held_out.labels[mine], range(int(mine.sum())))
        found = measured(Ensemble([exact(mixture, k) for k in range(3)], mixture.router, "top-1"), some)
        assert found.counts[2] == 0
        assert all(map(math.isnan, found.matrix[2]))
        assert math.isfinite(found.over_other_clusters[0])
        assert math.isnan(found.over_other_clusters[2])
        assert math.isnan(found.over_other_experts[2])

    def test_an_expert_that_outputs_nan_is_shown_and_not_dropped(self, mixture, held_out) -> None:
        broken = Expert(lambda x, t, c: x * torch.nan, FLOW, (1,), name="broken")
        ensemble = Ensemble([exact(mixture, 0), broken, exact(mixture, 2)], mixture.router, "top-1")
        found = measured(ensemble, held_out)
        assert all(math.isnan(row[1]) and math.isfinite(row[0]) for row in found.matrix)
        assert all(map(math.isnan, found.chosen))
        assert math.isnan(found.over_other_experts[1])
