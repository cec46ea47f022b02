"""The checks on exact experts: each passes what is honest, and each is failed by what it is there for."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atoll.collective.gate.captioned import CaptionedDenoiser, caption_vectors, exchanged
from atoll.collective.gate.check import Check, excess, quantile
from atoll.collective.gate.checks import (
    BANDS,
    CARD_TIMES,
    HONEST_SPREAD,
    IMPRECISION,
    NEAR_DATA,
    card_errors,
    check_captions,
    check_card,
    check_error,
    check_others,
    check_prompt,
    check_single,
    random_velocity,
    tolerance,
)
from atoll.collective.gate.errors import Draws, expert_velocity, linear_velocity
from atoll.collective.gate.linear import LinearDenoiser
from atoll.collective.gate.probe import EDGES, STEPS, diffuse
from atoll.condition import Condition, Tokens
from atoll.encoders.text.hashed import HashEncoder
from atoll.ensemble import Expert
from atoll.objective import Objective
from atoll.schedule import PATH, Cosine, Linear, LinearBeta
from atoll.testing import GaussianMixture

ROWS = 48
OBJECTIVES = [Objective("eps", Cosine()), Objective("flow", Linear()), Objective("x0", LinearBeta())]


@pytest.fixture(scope="module")
def mixture() -> GaussianMixture:
    return GaussianMixture.random(components=6, clusters=2, shape=(1, 3, 4), seed=3)


def rows_of(mixture: GaussianMixture, cluster: int, count: int, seed: int) -> Tensor:
    return mixture.cluster(cluster).sample(count, torch.Generator().manual_seed(seed))[0].float()


def expert_of(mixture: GaussianMixture, objective: Objective, cluster: int = 0) -> Expert:
    """The exact expert, in float64 inside."""
    exact = mixture.network(objective, cluster)
    return Expert(lambda x, time, c: exact(x.double(), time.double(), c).float(), objective, (cluster,))


def condition(count: int) -> Condition:
    return Condition(torch.zeros(count, 1, 1), torch.ones(count, 1, dtype=torch.bool))


class Bench:
    """References and rows of cluster 0 for an expert."""

    def __init__(self, mixture: GaussianMixture):
        self.training = rows_of(mixture, 0, 400, 1)
        self.own = LinearDenoiser.of(self.training)
        self.rows, self.far = rows_of(mixture, 0, ROWS, 2), rows_of(mixture, 1, ROWS, 3)
        self.other = LinearDenoiser.of(rows_of(mixture, 1, 200, 4))

    def error(self, expert: Expert, seed: int = 0) -> Check:
        draws = Draws.of(self.rows, EDGES, self.own, seed)
        errors = draws.errors(expert_velocity(expert, condition(ROWS)))
        return check_error(errors, tolerance(draws, self.own, self.other), EDGES)

    def single(self, expert: Expert) -> Check:
        draws = Draws.of(self.rows, EDGES, self.own, 0)
        errors = draws.errors(expert_velocity(expert, condition(ROWS)))
        return check_single(errors, tolerance(draws, self.own, self.other), EDGES)

    def others(self, expert: Expert) -> Check:
        draws = Draws.of(self.far, BANDS, self.own, 5)
        errors = draws.errors(expert_velocity(expert, condition(ROWS)))
        return check_others(errors, draws.errors(random_velocity(self.training, 5)), BANDS)


@pytest.fixture(scope="module")
def bench(mixture) -> Bench:
    return Bench(mixture)


def spoiled(expert: Expert, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Expert:
    """An expert whose output is changed. change: (output, x, time) -> output."""
    network = expert.network
    return replace(expert, network=lambda x, time, c: change(network(x, time, c), x, time))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_an_exact_expert_passes(mixture, bench, objective) -> None:
    expert = expert_of(mixture, objective)
    assert bench.error(expert).passed
    assert bench.others(expert).passed
    assert bench.single(expert).passed


def test_few_honest_experts_are_refused_by_chance(bench) -> None:
    """The linear denoiser itself is the least that an honest expert knows: its statistic is 0 and stays far below."""
    linear = Expert(lambda x, time, c: bench.own.velocity(x, time / 999.0), OBJECTIVES[1])
    assert max(bench.error(linear, seed).statistic for seed in range(20)) < quantile(19, ROWS) / 2


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_an_expert_of_another_cluster_is_refused(mixture, bench, objective) -> None:
    check = bench.error(expert_of(mixture, objective, cluster=1))
    assert not check.passed
    assert "between a denoiser of this cluster and one of the others" in check.reason


@pytest.mark.parametrize(("low", "high"), [(0.01, 0.05), (0.45, 0.55), (0.63, 0.66), (0.9, 1.0)])
def test_an_expert_that_is_wrong_in_one_band_is_refused(mixture, bench, low, high) -> None:
    """Also in a band between the nodes that the code names: rows have times of their own."""

    def change(output: Tensor, x: Tensor, time: Tensor) -> Tensor:
        inside = (time / 999.0 >= low) & (time / 999.0 <= high)
        return torch.where(inside.view(-1, 1, 1, 1), -output, output)

    expert = spoiled(expert_of(mixture, OBJECTIVES[1]), change)
    assert not (bench.error(expert).passed and bench.single(expert).passed)


def test_where_clusters_are_alike_a_network_may_be_imprecise(bench) -> None:
    """Next to the data, all clusters' denoisers leave x as it is; half-way between them would be no room at all."""
    draws = Draws.of(bench.rows, EDGES, bench.own, 0)
    linear = draws.errors(linear_velocity(bench.own))
    for other in (bench.own, None):
        assert torch.allclose(tolerance(draws, bench.own, other), IMPRECISION * linear)
    ratio = draws.errors(linear_velocity(bench.other)).mean(1) / linear.mean(1)
    border = (tolerance(draws, bench.own, bench.other) / linear).mean(1)
    apart = ratio >= IMPRECISION
    assert apart.sum() > 0
    assert torch.allclose(border[apart], ratio[apart].sqrt().clamp(max=HONEST_SPREAD))


def test_an_expert_that_is_wrong_at_the_steps_of_a_sampler_alone_is_refused(mixture, bench) -> None:
    """Narrower than any time that is drawn would meet."""
    times = torch.linspace(1, 0, 26)

    def change(output: Tensor, x: Tensor, time: Tensor) -> Tensor:
        wrong = ((time / 999.0)[:, None] - times).abs().min(1).values < 1e-6
        return torch.where(wrong.view(-1, 1, 1, 1), -output, output)

    honest = expert_of(mixture, OBJECTIVES[1])
    assert bench.single(honest).passed
    assert not bench.single(spoiled(honest, change)).passed


def test_a_network_that_predicts_x0_may_have_a_rest_of_error_near_the_data(mixture, bench) -> None:
    """Its velocity error grows like 1/t^2; the same error of another prediction, or at higher noise, is refused."""
    rest = float(bench.own.error(torch.tensor([NEAR_DATA]))) ** 0.5 * NEAR_DATA

    def change(output: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return output + rest * torch.ones_like(output)

    draws = Draws.of(bench.rows, EDGES, bench.own, 0)
    errors = draws.errors(expert_velocity(spoiled(expert_of(mixture, OBJECTIVES[2]), change), condition(ROWS)))
    assert check_error(errors, tolerance(draws, bench.own, bench.other, "x0"), EDGES).passed
    assert not check_error(errors, tolerance(draws, bench.own, bench.other), EDGES).passed
    # Three times the rest is too much for it, too.
    errors = errors * 9
    assert not check_error(errors, tolerance(draws, bench.own, bench.other, "x0"), EDGES).passed


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_expert_that_is_not_finite_for_one_row_is_refused(mixture, bench, bad) -> None:
    def change(output: Tensor, x: Tensor, time: Tensor) -> Tensor:
        output[3] = bad
        return output

    assert not bench.error(spoiled(expert_of(mixture, OBJECTIVES[1]), change)).passed


def test_an_expert_that_explodes_on_other_clusters_is_refused(mixture, bench) -> None:
    middle = (rows_of(mixture, 0, 200, 7).mean(0), rows_of(mixture, 1, 200, 7).mean(0))

    def change(output: Tensor, x: Tensor, time: Tensor) -> Tensor:
        t = (time / 999.0).view(-1, 1, 1, 1)
        far, near = ((x - (1 - t) * m).square().flatten(1).sum(1) for m in (middle[1], middle[0]))
        return torch.where((far < near).view(-1, 1, 1, 1), -3 * output, output)

    expert = spoiled(expert_of(mixture, OBJECTIVES[1]), change)
    assert not bench.others(expert).passed


def test_one_wrong_caption_stands_out(mixture, bench) -> None:
    draws = Draws.of(bench.rows, EDGES, bench.own, 0)
    errors = draws.errors(expert_velocity(expert_of(mixture, OBJECTIVES[1]), condition(ROWS)))
    allowed = tolerance(draws, bench.own, bench.other)
    assert check_captions(errors, allowed).passed
    errors = errors.clone()
    errors[:, 5] *= 60
    check = check_captions(errors, allowed)
    assert (check.passed, check.where) == (False, "row 5")


@pytest.mark.parametrize(
    ("share", "passed"),
    # As good as the linear denoiser, about as good as the border, no gain, and captions of others are better.
    [(1.0, True), (0.24, True), (0.0, False), (-0.5, False)],
)
def test_captions_that_say_nothing_or_something_else_are_refused(share, passed) -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.rand(2, ROWS, generator=g) + 0.5
    spread, other = ((0.2 * torch.randn(2, ROWS, generator=g)).exp() for _ in range(2))
    check = check_prompt(base * 0.4**share * spread, base, base * 0.4 * other, base)
    assert check.passed == passed
    assert "with exchanged ones; the best linear denoiser's is 0.4" in check.reason


def test_an_expert_that_ignores_captions_is_not_hidden_by_the_spread_of_the_denoiser() -> None:
    g = torch.Generator().manual_seed(0)
    base, spread = torch.rand(2, ROWS, generator=g) + 0.5, (3 * torch.randn(2, ROWS, generator=g)).exp()
    assert not check_prompt(base, base, base * 0.4 * spread, base).passed


def test_captions_that_mean_nothing_to_anybody_are_no_reason_to_refuse() -> None:
    same = torch.rand(2, ROWS, generator=torch.Generator().manual_seed(0)) + 0.5
    assert check_prompt(same, same, same, same).passed


def test_the_captioned_denoiser_gains_what_captions_say() -> None:
    """The latent is a word's mean and noise: with its caption a row is denoised as a Gaussian of that mean."""
    g, encoder = torch.Generator().manual_seed(0), HashEncoder(dim=16, length=4)
    words, means = [f"word{number}" for number in range(8)], torch.randn(8, 1, 3, 4, generator=g)

    def draw(count: int) -> tuple[Tensor, list[str]]:
        chosen = torch.randint(8, (count,), generator=g)
        latents = means[chosen] + 0.3 * torch.randn(count, 1, 3, 4, generator=g)
        return latents, [words[number] for number in chosen.tolist()]

    captioned, (rows, captions) = CaptionedDenoiser.of(*draw(400), encoder), draw(200)
    noisy = diffuse(rows, 0.7, 0.8, 0, 0)

    def error(captions: list[str]) -> float:
        return float((captioned.velocity(captions)(noisy) - (noisy.eps - rows)).square().mean())

    assert captioned.worse < -quantile(1, captioned.rows)
    exact = LinearDenoiser.of(0.3 * torch.randn(2000, 1, 3, 4, generator=g)).error(noisy.t).mean()
    assert error(captions) < 1.1 * float(exact)
    assert error(exchanged(captions)) > 3 * error(captions)


def test_captions_that_say_nothing_cost_the_captioned_denoiser_little() -> None:
    g = torch.Generator().manual_seed(0)
    latents, names = torch.randn(200, 1, 3, 4, generator=g), [f"a{number}" for number in range(200)]
    captioned = CaptionedDenoiser.of(latents[:100], names[:100], HashEncoder(dim=64, length=4))
    assert captioned.worse > -quantile(1, captioned.rows)
    noisy = diffuse(latents[100:], 0.4, 0.6, 0, 0)
    error = (captioned.velocity(names[100:])(noisy) - (noisy.eps - latents[100:])).square().mean()
    assert float(error) < 1.1 * float(LinearDenoiser.of(latents[:100]).error(noisy.t).mean())


def test_a_caption_vector_without_a_pooled_one_is_the_mean_of_its_tokens() -> None:
    class Words(HashEncoder):
        def encode(self, tokens: Tokens) -> Condition:
            condition = super().encode(tokens)
            return Condition(condition.states, condition.mask)

    vectors = caption_vectors(["one two", "three", "one two"], encoder := Words(dim=16, length=4))
    condition = encoder(["three"])
    assert torch.allclose(vectors[1], condition.states[0][condition.mask[0]].double().mean(0))
    assert torch.equal(vectors[0], vectors[2])


def test_exchanged_captions_differ_wherever_they_can() -> None:
    captions = ["b", "a", "a", "c", "b", "c"]
    other = exchanged(captions)
    assert sorted(other) == sorted(captions)
    assert all(one != two for one, two in zip(captions, other, strict=True))


def test_a_card_of_other_weights_is_refused(mixture, bench) -> None:
    velocity = expert_velocity(expert_of(mixture, OBJECTIVES[1]), condition(2 * ROWS))
    linear = linear_velocity(bench.own)
    # The claim is what other draws on the same rows show.
    claimed = torch.stack([card_errors(velocity, bench.rows, seed).mean((1, 2)) for seed in range(20)]).mean(0)
    errors, same, every = (
        card_errors(one, bench.rows, seed) for one, seed in ((velocity, 99), (linear, 99), (linear, 7))
    )
    assert check_card(errors, same, every, claimed, 256).passed
    assert not check_card(errors, same, every, claimed / 3, 256).passed
    # Better than claimed is no lie.
    assert check_card(errors, same, every, claimed * 3, 256).passed
    assert errors.shape == (len(CARD_TIMES), 2, ROWS)


def test_rows_of_unequal_difficulty_hide_no_other_weights() -> None:
    """24 of 240 rows, some twenty times harder than others: 60 % more than the card says is seen."""
    g = torch.Generator().manual_seed(0)
    hard = (0.8 * torch.randn(240, generator=g)).exp().double()
    every = hard * (1 + 0.1 * torch.randn(3, 2, 240, generator=g))
    for seed in range(20):
        some = torch.randperm(240, generator=torch.Generator().manual_seed(seed))[:24]
        linear = every[:, :, some]
        errors = 0.9 * hard[some] * (1 + 0.1 * torch.randn(3, 2, 24, generator=g))
        claimed = 0.9 * hard.mean().expand(3)
        assert check_card(errors, linear, every, claimed, 256).passed
        assert not check_card(errors, linear, every, claimed / 1.6, 256).passed


def test_the_linear_denoiser_is_exact_for_a_gaussian() -> None:
    one = GaussianMixture.random(components=1, clusters=1, shape=(1, 3, 4), seed=5)
    linear = LinearDenoiser.of(rows_of(one, 0, 20_000, 1)[:2048])
    noisy = diffuse(rows_of(one, 0, 64, 2), 0.1, 0.9, 0, 0)
    exact = one.velocity(noisy.x.double(), noisy.t.double()).float()
    assert (linear.velocity(noisy.x, noisy.t) - exact).abs().max() < 0.15
    # Its predicted error is the measured one.
    x0 = rows_of(one, 0, 4000, 3)
    many = diffuse(x0, 0.5, 0.5001, 0, 1)
    measured = (linear.velocity(many.x, many.t) - (many.eps - x0)).square().mean()
    assert abs(float(measured / linear.error(many.t).mean()) - 1) < 0.05


def test_fewer_rows_than_numbers_give_a_finite_denoiser() -> None:
    g = torch.Generator().manual_seed(0)
    few, many = torch.randn(12, 1, 5, 6, generator=g), torch.randn(2048, 1, 5, 6, generator=g)
    for latents in (few, many):
        linear = LinearDenoiser.of(latents)
        noisy = diffuse(torch.randn(64, 1, 5, 6, generator=g), 0.01, 0.02, 0, 0)
        u = linear.velocity(noisy.x, noisy.t)
        x0 = noisy.x - noisy.t.view(-1, 1, 1, 1) * u
        assert u.isfinite().all()
        # Near the data it leaves x as it is, about.
        assert (x0 - noisy.x).square().mean() < 0.05


def test_every_row_has_its_own_time_and_seeds_differ() -> None:
    latents = torch.zeros(40, 1, 2, 2)
    one, again, other = (diffuse(latents, 0.2, 0.3, seed, 0) for seed in (1, 1, 2))
    assert ((one.t >= 0.2) & (one.t <= 0.3)).all()
    # Spread evenly: one at most in each fortieth, but for the times of a sampler's steps.
    sampled = torch.arange(40) % 8 == 0
    places = ((one.t[~sampled] - 0.2) / 0.0025).floor().long()
    assert len(places.unique()) == 35
    steps = torch.cat([torch.linspace(1, 0, count + 1) for count in STEPS])
    assert torch.isin(one.t, steps).tolist() == sampled.tolist()
    assert torch.equal(one.x, again.x)
    assert not torch.equal(one.x, other.x)
    assert torch.allclose(one.x, PATH.diffuse(latents, one.eps, one.t))


def test_quantiles_are_those_of_student() -> None:
    from scipy.stats import t

    for rows in (20, 64, 400):
        exact = t.ppf(1 - 1e-3 / 7 / 19, rows - 1)
        assert abs(quantile(19, rows) / exact - 1) < 0.015


def test_excess_is_paired() -> None:
    g = torch.Generator().manual_seed(0)
    bounds = torch.rand(50, generator=g) + 0.1
    # Rows differ by more than this; each is 2 % worse than its own bound.
    assert float(excess(bounds * 1.02, bounds)) > 5
    assert float(excess(bounds, bounds)) == 0
