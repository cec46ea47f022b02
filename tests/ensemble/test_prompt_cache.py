"""Prompts that each network reads once: the same images, fewer operations, within a limit."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from atoll.calibration import Calibration
from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert
from atoll.ensemble.prompt_cache import PromptCache
from atoll.errors import AtollError
from atoll.nn import DiT, DiTConfig, MMDiT, MMDiTConfig, Paris, ParisConfig
from atoll.nn.attention import TextKV
from atoll.objective import Objective
from atoll.pipeline import Pipeline
from atoll.solver import sample

C, SIDE, L, STATES, POOLED, K = 2, 8, 5, 10, 7, 3
Network = DiT | MMDiT | Paris


def condition_of(rows: int, seed: int = 0, length: int = L, states: int = STATES) -> Condition:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=g) < 0.7
    mask[:, 0] = True
    states_ = torch.randn(rows, length, states, generator=g, dtype=torch.float64)
    return Condition(states_, mask, torch.randn(rows, POOLED, generator=g, dtype=torch.float64))


def random(network: Network, seed: int) -> Network:
    g = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=g)
    return network.double().eval().requires_grad_(False)


def dit(seed: int = 0, **changes: object) -> DiT:
    base = {"size": (SIDE, SIDE), "channels": C, "patch": 2, "width": 32, "depth": 2, "heads": 4, "states_dim": STATES}
    return random(DiT(DiTConfig.model_validate(base | changes)), seed)


def paris(seed: int = 0) -> Paris:
    sizes = {"size": (SIDE, SIDE), "channels": C, "patch": 2, "width": 32, "depth": 2, "heads": 4}
    return random(Paris(ParisConfig.model_validate({**sizes, "states_dim": STATES})), seed)


def mmdit(seed: int = 0, **changes: object) -> MMDiT:
    sizes = {"size": (SIDE, SIDE), "channels": C, "patch": 2, "width": 32, "depth": 2, "heads": 4}
    return random(MMDiT(MMDiTConfig.model_validate({**sizes, "states_dim": STATES, **changes})), seed)


NETWORKS = {
    "single": lambda: dit(pooled_dim=POOLED),
    "per-block": lambda: dit(modulation="per-block"),
    "two text layers": lambda: dit(text_layers=2),
    "paris": paris,
    "mmdit": lambda: mmdit(pooled_dim=POOLED),
    "dual": lambda: mmdit(dual_blocks=1),
}


class Counted:
    """A network that records the number of prompts in each call of `read_prompt`."""

    def __init__(self, network: Network):
        self.network, self.read = network, []

    def __call__(self, x: Tensor, time: Tensor, condition: Condition | TextKV | None) -> Tensor:
        self.saw = condition
        return self.network(x, time, condition)

    def read_prompt(self, condition: Condition) -> TextKV:
        self.read.append(len(condition))
        return self.network.read_prompt(condition)


def ensemble_of(networks: list, routing: str = "top-1", null: bool = True) -> Ensemble:
    objectives = [Objective("flow", "linear"), Objective("eps", "cosine"), Objective("x0", "linear-beta")]
    calibration = Calibration.identity(torch.zeros(C, SIDE, SIDE))
    experts = [Expert(n, objectives[k % 3], (k,), calibration, str(k)) for k, n in enumerate(networks)]

    def router(x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        scores = torch.stack([x.flatten(1)[:, k] for k in range(len(networks))], 1)
        return torch.log_softmax(4 * scores, 1)

    return Ensemble(experts, router, routing, null=(condition_of(1, seed=9),) if null else None)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_the_same_from_cached_text(name: str) -> None:
    network, condition = NETWORKS[name](), condition_of(4)
    x, time = torch.randn(4, C, SIDE, SIDE, dtype=torch.float64), torch.tensor([1.0, 40.0, 500.0, 999.0]).double()
    read = network.read_prompt(condition)
    numbers = 32 if name == "dual" else 2 * 64  # the projected text alone, or keys and values of two blocks
    assert (len(read), read.nbytes) == (4, 4 * L * numbers * 8)
    torch.testing.assert_close(network(x, time, read), network(x, time, condition))
    rows = torch.tensor([2, 0, 2])
    torch.testing.assert_close(network(x[rows], time[rows], read.index(rows)), network(x, time, condition)[rows])
    joined = TextKV.cat([read.index(torch.tensor([3])), read.index(rows)])
    order = torch.tensor([3, 2, 0, 2])
    torch.testing.assert_close(network(x[order], time[order], joined), network(x, time, condition)[order])
    assert not torch.allclose(network(x, time, network.read_prompt(condition_of(4, seed=1))), network(x, time, read))


def test_cached_text_with_the_wrong_number_of_rows_is_refused() -> None:
    x, time = torch.randn(3, C, SIDE, SIDE, dtype=torch.float64), torch.ones(3).double()
    with pytest.raises(AtollError, match="got 2 rows, expected 3 rows"):
        dit()(x, time, dit().read_prompt(condition_of(2)))


@settings(max_examples=30)
@given(
    routing=st.sampled_from(["top-1", "top-2", "full", "threshold-0.2", "nucleus-0.8"]),
    guidance=st.sampled_from([1.0, 2.5]),
    guided=st.sampled_from([(0.0, 1.0), (0.3, 0.7)]),
    rows=st.integers(1, 5),
    seed=st.integers(0, 999),
    limit=st.sampled_from([0, 20_000, 60_000, 2**31]),
)
def test_images_are_the_same_with_and_without_a_cache(routing, guidance, guided, rows, seed, limit) -> None:
    ensemble = ensemble_of([dit(0), paris(1), mmdit(2, dual_blocks=seed % 2)], routing)
    condition = condition_of(rows, seed)
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, C, SIDE, SIDE, generator=g, dtype=torch.float64)

    def images(**prompts: object) -> Tensor:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return ensemble.velocity(x, t, guidance_scale=guidance, guidance_range=guided, **prompts)

        return sample(velocity, noise, 4, "heun")

    cache = ensemble.prompt_cache((condition,), limit=limit)
    torch.testing.assert_close(images(prompt_cache=cache), images(condition=condition), rtol=1e-6, atol=1e-8)
    assert cache.nbytes <= limit


def test_each_active_expert_reads_a_prompt_once() -> None:
    networks = [Counted(dit(k)) for k in range(K)]
    ensemble = ensemble_of(networks, "top-1")
    prompts = ensemble.prompt_cache((condition_of(6),))
    x = torch.randn(6, C, SIDE, SIDE, dtype=torch.float64)
    x.flatten(1)[:, :K] = torch.eye(K).repeat(2, 1).double()  # two prompts for each expert
    for guidance in (1.0, 3.0, 3.0, 1.0):
        ensemble.velocity(x, torch.full((6,), 0.5).double(), None, guidance, prompt_cache=prompts)
    assert [network.read for network in networks] == [[2, 1]] * K  # its two prompts, then the null condition
    x.flatten(1)[:, :K] = torch.eye(K).repeat(2, 1).roll(1, 0).double()
    ensemble.velocity(x, torch.full((6,), 0.4).double(), None, 3.0, prompt_cache=prompts)
    assert [network.read for network in networks] == [[2, 1, 2]] * K
    assert all(isinstance(network.saw, TextKV) for network in networks)


def test_without_a_cache_the_network_gets_the_condition() -> None:
    network = Counted(dit())
    ensemble_of([network]).velocity(torch.zeros(2, C, SIDE, SIDE).double(), torch.ones(2).double() / 2, condition_of(2))
    assert network.read == []
    assert isinstance(network.saw, Condition)


def test_networks_without_read_prompt_get_the_condition() -> None:
    seen = []

    def plain(x: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
        seen.append(condition)
        return x

    ensemble = ensemble_of([plain])
    x, t = torch.zeros(2, C, SIDE, SIDE).double(), torch.ones(2).double() / 2
    ensemble.velocity(x, t, None, 2.0, prompt_cache=ensemble.prompt_cache((condition_of(2),)))
    assert isinstance(seen[0], Condition)
    assert len(seen[0]) == 4


def test_each_expert_caches_the_condition_of_its_own_encoder() -> None:
    wide = condition_of(2, 5, length=3, states=12)
    experts = [
        Expert(dit(0), Objective("flow", "linear"), (0,), name="a"),
        Expert(dit(1, states_dim=12), Objective("flow", "linear"), (1,), name="b", encoder=1),
    ]
    null = (condition_of(1), condition_of(1, length=3, states=12))
    ensemble = Ensemble(experts, lambda x, t, pooled=None: x.new_zeros(len(x), 2), "full", null=null)
    both = (condition_of(2), wide)
    x, t = torch.randn(2, C, SIDE, SIDE, dtype=torch.float64), torch.ones(2).double() / 2
    prompts = ensemble.prompt_cache(both)
    torch.testing.assert_close(
        ensemble.velocity(x, t, None, 2.0, prompt_cache=prompts), ensemble.velocity(x, t, both, 2.0)
    )
    assert prompts.nbytes == 3 * 2 * (L + 3) * 64 * 8


def test_guidance_with_a_cache_without_null_condition_is_refused() -> None:
    ensemble, other = ensemble_of([dit()]), ensemble_of([dit()], null=False)
    x, t = torch.zeros(2, C, SIDE, SIDE).double(), torch.ones(2).double() / 2
    with pytest.raises(AtollError, match="there is no null condition"):
        ensemble.velocity(x, t, None, 2.0, prompt_cache=other.prompt_cache((condition_of(2),)))


def test_a_condition_together_with_a_cache_is_refused() -> None:
    ensemble, condition = ensemble_of([dit()]), condition_of(2)
    x, t = torch.zeros(2, C, SIDE, SIDE).double(), torch.ones(2).double() / 2
    with pytest.raises(AtollError, match="both passed; expected one of them"):
        ensemble.velocity(x, t, condition, prompt_cache=ensemble.prompt_cache((condition,)))


def test_a_cache_can_have_another_null_condition() -> None:
    network, condition, other = dit(), condition_of(2), condition_of(1, seed=4)
    ensemble = ensemble_of([network])
    x, t = torch.randn(2, C, SIDE, SIDE).double(), torch.ones(2).double() / 2
    guided = ensemble.velocity(x, t, None, 2.0, prompt_cache=ensemble.prompt_cache((condition,), null=(other,)))
    torch.testing.assert_close(guided, replace(ensemble, null=(other,)).velocity(x, t, condition, 2.0))
    assert not torch.allclose(guided, ensemble.velocity(x, t, condition, 2.0))


def test_each_prompt_can_have_its_own_null_condition() -> None:
    network, condition, own = Counted(dit()), condition_of(3), condition_of(3, seed=4)
    ensemble = ensemble_of([network])
    x, t = torch.randn(3, C, SIDE, SIDE).double(), torch.full((3,), 0.4).double()
    cache = ensemble.prompt_cache((condition,), (own,))
    u = ensemble.velocity(x, t, None, 2.0, prompt_cache=cache)
    for row in range(3):
        one, null = (c.index(torch.tensor([row])) for c in (condition, own))
        alone = replace(ensemble, null=(null,)).velocity(x[row][None], t[:1], one, 2.0)
        torch.testing.assert_close(u[row], alone[0])


@pytest.mark.parametrize("limit", [0, 2**31])
def test_images_share_the_rows_of_their_prompts(limit: int) -> None:
    network, condition, negatives = Counted(dit(pooled_dim=POOLED)), condition_of(2), condition_of(2, seed=4)
    ensemble = ensemble_of([network])
    prompt_of, null_of = [0, 0, 1, 1, 1], [1, 1, 0, 1, 0]
    x, t = torch.randn(5, C, SIDE, SIDE).double(), torch.full((5,), 0.4).double()
    cache = ensemble.prompt_cache((condition,), (negatives,), limit, prompt_of=prompt_of, null_of=null_of)
    each = [c.index(torch.tensor(rows)) for c, rows in ((condition, prompt_of), (negatives, null_of))]
    expected = ensemble.velocity(x, t, None, 2.0, prompt_cache=ensemble.prompt_cache((each[0],), (each[1],), 0))
    assert network.read == []
    for _ in range(2):
        torch.testing.assert_close(ensemble.velocity(x, t, None, 2.0, prompt_cache=cache), expected)
    assert network.read == ([4] if limit else [])  # two prompts, two negative prompts
    assert len(cache) == 5
    assert torch.equal(cache.pooled(0), each[0].pooled)


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (2, {}, "null condition of 2 rows for 3 prompts; expected one row, or one for each"),
        (1, {"prompt_of": [0, 3]}, "2 images' rows of 3; expected one from 0 to 2 per image"),
        (1, {"prompt_of": [0, -1]}, "expected one from 0 to 2 per image"),
        (2, {"null_of": [0, 1]}, "2 images' rows of 2; expected one from 0 to 1 per image"),
        (2, {"null_of": [0, 1, 2]}, "expected one from 0 to 1 per image"),
    ],
)
def test_rows_that_do_not_fit_the_images_are_refused(rows, arguments, message) -> None:
    with pytest.raises(AtollError, match=message):
        ensemble_of([dit()]).prompt_cache((condition_of(3),), (condition_of(rows),), **arguments)


class TestBlockCache:
    @pytest.mark.parametrize("network", [dit(0, depth=3), paris(0), dit(1, depth=1)])
    @pytest.mark.parametrize("guidance", [1.0, 2.0])
    def test_a_tiny_threshold_skips_nothing(self, network, guidance) -> None:
        ensemble, condition = ensemble_of([network]), condition_of(3)
        g = torch.Generator().manual_seed(0)
        noise = torch.randn(3, C, SIDE, SIDE, generator=g, dtype=torch.float64)
        prompts = ensemble.prompt_cache((condition,), block_cache=1e-12)
        images = [
            sample(lambda x, t, c=c: ensemble.velocity(x, t, guidance_scale=guidance, **c), noise, 4)
            for c in ({"prompt_cache": prompts}, {"condition": condition})
        ]
        torch.testing.assert_close(*images)
        assert prompts.skip_rate == 0

    def test_a_huge_threshold_evaluates_only_the_first_block(self) -> None:
        network = dit(0, depth=3)
        calls = []
        for number, block in enumerate(network.blocks):
            block.register_forward_hook(lambda _, inputs, __, number=number: calls.append((number, len(inputs[0]))))
        ensemble = ensemble_of([network])
        prompts = ensemble.prompt_cache((condition_of(3),), block_cache=1e9)
        x, t = torch.randn(3, C, SIDE, SIDE).double(), torch.full((3,), 0.9).double()
        first = ensemble.velocity(x, t, None, 2.0, prompt_cache=prompts)
        assert calls == [(0, 6), (1, 6), (2, 6)]
        torch.testing.assert_close(
            ensemble.velocity(x, t, None, 2.0, prompt_cache=prompts), first
        )  # nothing changed: the same answer
        assert calls[3:] == [(0, 6)]
        another = ensemble.prompt_cache((condition_of(2),), block_cache=1e9)
        ensemble.velocity(x[:2], t[:2], prompt_cache=another)
        assert calls[4:] == [(0, 2), (1, 2), (2, 2)]
        assert prompts.skip_rate == 0.5

    def test_each_sample_is_skipped_by_itself(self) -> None:
        network, condition = dit(0, depth=3), condition_of(3)
        sizes = []
        network.blocks[1].register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
        ensemble = ensemble_of([network])
        prompts = ensemble.prompt_cache((condition,), block_cache=0.1)
        x, t = torch.randn(3, C, SIDE, SIDE).double(), torch.full((3,), 0.5).double()
        first = ensemble.velocity(x, t, prompt_cache=prompts)
        moved = x.clone()
        moved[1] *= -3
        second = ensemble.velocity(moved, t, prompt_cache=prompts)
        assert sizes == [3, 1]
        torch.testing.assert_close(second[[0, 2]], first[[0, 2]])
        torch.testing.assert_close(second[1], ensemble.velocity(moved, t, condition)[1])
        slightly = moved + 1e-4 * torch.randn_like(moved)
        third = ensemble.velocity(slightly, t, prompt_cache=prompts)
        exact = ensemble.velocity(slightly, t, condition)
        assert sizes == [3, 1, 3, 3]  # of the condition itself, twice
        assert 0 < (third - exact).abs().max() < 0.01 * exact.abs().max()

    def test_guidance_branches_are_cached_separately(self) -> None:
        ensemble = ensemble_of([dit(0, depth=3)])
        x, t = torch.randn(2, C, SIDE, SIDE).double(), torch.full((2,), 0.5).double()
        prompts = ensemble.prompt_cache((condition_of(2),), block_cache=1e9)
        plain = ensemble.velocity(x, t, prompt_cache=prompts)
        guided = ensemble.velocity(
            x, t, None, 2.0, prompt_cache=prompts
        )  # the null condition's branch is new, the other is known
        torch.testing.assert_close(guided, ensemble.velocity(x, t, condition_of(2), 2.0))
        torch.testing.assert_close(plain, ensemble.velocity(x, t, condition_of(2)))
        assert prompts.skip_rate == 2 / 6

    def test_networks_without_block_cache_are_refused(self, trained_run) -> None:
        def plain(x: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
            return x

        ensemble = ensemble_of([plain])
        x, t = torch.randn(2, C, SIDE, SIDE).double(), torch.full((2,), 0.5).double()
        with pytest.raises(AtollError, match="function has no block cache: only DiT, MMDiT and Paris"):
            ensemble.velocity(x, t, prompt_cache=ensemble.prompt_cache((condition_of(2),), block_cache=0.1))
        for threshold in (-0.1, math.nan, math.inf):
            with pytest.raises(AtollError, match="expected a threshold from 0"):
                ensemble.prompt_cache((condition_of(2),), block_cache=threshold)
        pipe = Pipeline.from_pretrained(trained_run / "ensemble")
        with pytest.raises(AtollError, match="compiled experts evaluate all blocks"):
            pipe.compile(backend="eager")("moss", num_inference_steps=2, block_cache=0.1)

    def test_the_pipeline_uses_the_block_cache(self, trained_run, monkeypatch: pytest.MonkeyPatch) -> None:
        caches, prompt_cache = [], Ensemble.prompt_cache

        def spy(self, *arguments, **options) -> PromptCache:
            caches.append(prompt_cache(self, *arguments, **options))
            return caches[-1]

        monkeypatch.setattr(Ensemble, "prompt_cache", spy)
        pipe = Pipeline.from_pretrained(trained_run / "ensemble")
        pipe(["moss", "rain", "moss"], seeds=[0, 1, 2], num_inference_steps=6, batch_size=2, block_cache=5.0)
        assert [(len(one), one.block_cache) for one in caches] == [(2, 5.0), (1, 5.0)]
        assert all(one.skip_rate > 0.5 for one in caches)


def test_a_cache_saves_the_operations_of_the_text_layers() -> None:
    """Of a B/2 with 256 image and 77 text tokens: what its text layers cost, counted by hand."""
    config = DiTConfig(size=(32, 32), channels=4, patch=2, width=768, depth=2, heads=12, states_dim=768)
    network = DiT(config)
    x, time = torch.zeros(1, 4, 32, 32), torch.zeros(1)
    condition = Condition(torch.zeros(1, 77, 768), torch.ones(1, 77).bool())

    def flops(prompt: Condition | TextKV) -> int:
        with FlopCounterMode(display=False) as counter:
            network(x, time, prompt)
        return counter.get_total_flops()

    read = network.read_prompt(condition)
    assert flops(condition) - flops(read) == 2 * 77 * 768 * (768 + 2 * 2 * 768)
