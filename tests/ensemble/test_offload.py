"""A memory budget changes where weights are, and no image."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from atoll.assemble import assemble
from atoll.cli.app import app
from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert, Sampler
from atoll.ensemble.loading import load_ensemble, load_expert
from atoll.ensemble.offload import (
    ExpertCache,
    Offloaded,
    _moved,
    _parts,
    _tensors,
    bytes_of,
    cast_weights,
    check_weights,
    parse_budget,
    read_weights,
    selection_probs,
)
from atoll.errors import AtollError
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.pipeline import Pipeline
from atoll.storage.artifact import WEIGHTS, save_artifact
from atoll.storage.cards import ExpertCard, RouterCard

K, LATENT = 8, [1, 4, 6]
FLOW = Objective("flow", "linear", time_scale=1.0)
PROMPTS = ["moss", "sand rain", "rust", "moss sand", "rain"]


def write_ensemble(path: Path, width: int, depth: int) -> Path:
    """Eight experts and a router of random weights, as artifacts."""
    shared = {
        "latent_shape": LATENT,
        "codec": {"name": "pixels", "channels": 1},
        "condition": {"name": "hash", "dim": 8, "length": 4},
        "assignment": "none",
    }
    size = {"size": LATENT[1:], "channels": 1, "patch": 2, "width": width, "depth": depth, "heads": 2}
    g = torch.Generator().manual_seed(0)

    def write(part: Path, kind: str, network: dict, **more) -> Path:
        state = build_network(network).state_dict()
        weights = {f"network.{k}": 0.1 * torch.randn(v.shape, generator=g) for k, v in state.items()}
        card = {"expert": ExpertCard, "router": RouterCard}[kind](network=network, **shared, **more)
        save_artifact(part, card, weights)
        return part

    experts = []
    for k in range(K):
        objective = {"prediction": ("flow", "x0")[k % 2], "schedule": "linear", "time_scale": 999.0}
        network = {"name": "dit", "states_dim": 8, **size}
        experts.append(write(path / str(k), "expert", network, name=f"e{k}", objective=objective, clusters=[k], k=K))
    router = {"name": "router", **size, "width": 16, "depth": 1, "clusters": K}
    (path / "atoll.yaml").touch()  # a run: its ensemble may name its experts
    sampling = {"steps": 4, "guidance_scale": 2.0, "routing": "top-2"}
    return assemble(experts, write(path / "router", "router", router, clusters=K), path / "ensemble", sampling)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_ensemble(tmp_path_factory.mktemp("small"), 32, 1)


def cache_of(pipe: Pipeline) -> ExpertCache:
    return pipe.loaded.ensemble.experts[0].network.cache


def budget_of(path: Path, experts: float) -> int:
    """The bytes of the router and of so many experts."""
    plain = load_ensemble(path).ensemble
    return bytes_of(plain.router) + int(experts * bytes_of(plain.experts[0].network))


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_images_are_the_same_with_a_memory_budget(small, experts) -> None:
    plain = Pipeline.from_pretrained(small)
    pipe = Pipeline.from_pretrained(small, memory_budget=budget_of(small, experts))
    for routing in ("top-1", "top-2", "full", "sample-2"):
        expected = plain(PROMPTS, seeds=range(5), routing=routing)
        output = pipe(PROMPTS, seeds=range(5), routing=routing)
        assert torch.equal(output.latents, expected.latents)
        for mine, theirs in zip(output.traces[0].weights, expected.traces[0].weights, strict=True):
            assert torch.equal(mine, theirs)
    assert len(cache_of(pipe).resident) == experts
    assert cache_of(pipe).peak_bytes == budget_of(small, experts) - budget_of(small, 0)


def test_resident_experts_are_evaluated_first(small) -> None:
    """All eight in each of four steps: the last ones of a step are the first ones of the next."""
    pipe = Pipeline.from_pretrained(small, memory_budget=budget_of(small, 3))
    pipe(PROMPTS, seeds=range(5), routing="full")
    assert cache_of(pipe).loads == 8 + 3 * (8 - 3)
    enough = Pipeline.from_pretrained(small, memory_budget=budget_of(small, 8))
    enough(PROMPTS, seeds=range(5), routing="full")
    assert cache_of(enough).loads == 8


def test_a_single_expert_can_have_a_memory_budget(small) -> None:
    plain = load_ensemble(small.parent / "3").ensemble
    size = bytes_of(plain.experts[0].network)
    held = load_ensemble(small.parent / "3", memory_budget=size).ensemble
    x, t = torch.randn(5, *LATENT), torch.full((5,), 0.4)
    condition = load_ensemble(small).encoder(PROMPTS)
    assert torch.equal(held.velocity(x, t, condition), plain.velocity(x, t, condition))


PEAKS = """
import re, sys
from pathlib import Path
from atoll.pipeline import Pipeline

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

path, budget, *prompts = sys.argv[1:]
arguments = dict(seeds=range(len(prompts)), num_inference_steps=2)
Pipeline.from_pretrained(f"{path}/0")(prompts, **arguments)  # what torch itself takes on its first use
for given in (budget, None):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    before = status("VmRSS")
    pipe = Pipeline.from_pretrained(f"{path}/ensemble", memory_budget=given)
    pipe(prompts, routing="full", **arguments)
    print(status("VmHWM") - before)
    del pipe
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc")
def test_peak_memory_with_a_budget_of_two_experts_is_below_three(tmp_path) -> None:
    """Resident memory, mapped files included, that loading and sampling add; in a process of its own."""
    path = write_ensemble(tmp_path, 512, 2)
    command = [sys.executable, "-c", PEAKS, str(tmp_path), str(budget_of(path, 2)), *PROMPTS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    bounded, unbounded = map(int, done.stdout.split())
    expert = (tmp_path / "0" / WEIGHTS).stat().st_size
    assert expert > 25e6
    assert bounded < 3 * expert
    assert unbounded > 7 * expert  # the measure sees what is mapped


def test_the_file_of_a_resident_expert_is_mapped_and_not_copied(small) -> None:
    pipe = Pipeline.from_pretrained(small, memory_budget=budget_of(small, 2))
    with cache_of(pipe).using(0):
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("maps are read from Linux's /proc")
        assert str(small.parent / "0" / WEIGHTS) in maps.read_text()
    for key in (1, 2):
        with cache_of(pipe).using(key):
            pass
    assert str(small.parent / "0" / WEIGHTS) not in maps.read_text()


class Fake(nn.Module):
    """A network of 4 bytes that knows its number."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number
        self.register_buffer("weight", torch.tensor([float(number)]))

    def forward(self, x, time, condition):
        return self.weight.expand_as(x)


def fakes(count: int, budget: int, prefetch: bool = False) -> tuple[ExpertCache, list[Offloaded], list[int]]:
    """A cache of `count` networks with room for `budget`, the networks, and the keys it loads, in order."""
    cache, fetched = ExpertCache(4 * budget, prefetch=prefetch), []

    def fetch(number: int) -> Fake:
        fetched.append(number)
        return Fake(number)

    networks = [cache.add(str(n), 4, lambda n=n: fetch(n)) for n in range(count)]
    cache.reserve(0)
    return cache, networks, fetched


def ask(*networks: Offloaded) -> None:
    for network in networks:
        x = torch.zeros(2, 3)
        assert (network(x, torch.zeros(2), None) == network.key).all()


def test_the_least_recently_used_network_is_evicted_first() -> None:
    cache, n, fetched = fakes(4, 2)
    ask(n[0], n[1], n[0], n[2])
    assert cache.resident == (0, 2)
    ask(n[0], n[3])
    assert cache.resident == (0, 3)
    assert fetched == [0, 1, 2, 3]
    assert cache.peak_bytes == 8


def test_a_step_starts_with_resident_networks_and_keeps_pending_ones() -> None:
    cache, n, fetched = fakes(5, 2)
    ask(n[3], n[1])
    order = cache.plan(n, [0, 1, 2, 3])
    assert order == [1, 3, 0, 2]
    ask(n[1], n[0])  # 3, the least recently used, is pending: 1 is evicted
    assert cache.resident == (3, 0)
    ask(n[3], n[2])
    assert fetched == [3, 1, 0, 2]


def test_a_likely_network_is_not_evicted() -> None:
    cache, n, _ = fakes(4, 3)
    ask(n[0], n[1], n[2])
    cache.plan(n, [3], [0.3, 0.01, 0.2, 0.9])
    ask(n[3])
    assert cache.resident == (0, 2, 3)  # 1 is evicted, though 0 was used before it


def test_the_next_network_is_loaded_while_one_computes() -> None:
    cache, n, fetched = fakes(5, 2, prefetch=True)
    cache.plan(n, [0, 1, 2])
    with cache.using(0):
        assert cache.resident == (0, 1)
    with cache.using(1):
        assert cache.resident == (1, 2)
    with cache.using(2):
        assert cache.resident == (1, 2)  # the step needs nothing else
    assert fetched == [0, 1, 2]


def test_likely_networks_replace_idle_ones_between_steps() -> None:
    cache, n, fetched = fakes(5, 2, prefetch=True)
    ask(n[4])
    cache.plan(n, [0], [0.9, 0.02, 0.3, 0.6, 0.0])
    ask(n[0])
    assert cache.resident == (0, 3)  # the most probable one outside the step replaces 4
    cache.plan(n, [0, 3], [0.5, 0.9, 0.9, 0.5, 0.9])
    ask(n[0], n[3])
    assert cache.resident == (0, 3)  # an active network is not evicted for a likely one
    assert fetched == [4, 0, 3]
    cache.plan(n, [3], [0.03, 0.04, 0.04, 0.9, 0.0])
    ask(n[3])
    assert fetched == [4, 0, 3]  # too unlikely to be worth a copy


def test_a_network_in_use_is_never_evicted() -> None:
    cache, n, _ = fakes(3, 2, prefetch=True)
    with cache.using(0) as network:
        cache.plan(n, [1, 2], [0.0, 1.0, 1.0])
        ask(n[1], n[2], n[1])
        assert 0 in cache.resident
        with cache.using(1), pytest.raises(AtollError, match="no room for 2 beside 0, 1 in use"):
            ask(n[2])
        assert network.number == 0
    ask(n[1], n[2])
    assert cache.resident == (1, 2)


@given(
    budget=st.integers(2, 5),
    prefetch=st.booleans(),
    steps=st.lists(st.tuples(st.sets(st.integers(0, 5)), st.lists(st.floats(0, 1), min_size=6, max_size=6))),
)
def test_any_sequence_of_steps_stays_within_the_budget(budget, prefetch, steps) -> None:
    cache, n, fetched = fakes(6, budget, prefetch)
    for active, probabilities in steps:
        order = cache.plan(n, sorted(active), probabilities)
        assert sorted(order) == sorted(active)
        before = cache.resident
        assert [key in before for key in order] == sorted((key in before for key in active), reverse=True)
        ask(*(n[number] for number in order))
    assert cache.peak_bytes <= 4 * budget
    assert cache.loads == len(fetched)
    if not prefetch:
        assert len(fetched) <= sum(len(active) for active, _ in steps)


def test_networks_outside_the_cache_count_as_resident() -> None:
    cache, n, _ = fakes(2, 1)
    ask(n[1])
    assert cache.plan([n[0], Fake(7), n[1]], [0, 1, 2]) == [1, 2, 0]


def test_selection_probabilities_by_hand() -> None:
    log_p = torch.log(torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.0, 0.8]]))
    owners = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1]])  # two replicas, and a generalist
    expected = [1 - 0.5 * 0.8, 1 - 0.5 * 0.8, 0.5, 1 - 0.5 * 0.2]
    torch.testing.assert_close(torch.tensor(selection_probs(log_p.exp() @ owners.T)), torch.tensor(expected))


def test_a_sampler_prefetches_what_the_router_ranks_below_the_cut() -> None:
    _, n, fetched = fakes(3, 2, prefetch=True)
    log_p = torch.log(torch.tensor([[0.6, 0.1, 0.3]]))
    ensemble = Ensemble([Expert(n[k], FLOW, (k,)) for k in range(3)], lambda x, t, pooled=None: log_p, "top-1")
    u = Sampler(ensemble).velocity(torch.randn(1, 2, 3, 5), torch.full((1,), 0.5))
    assert (u == 0).all()
    assert fetched == [0, 2]


def test_an_expert_that_answers_nan_is_dropped_within_a_budget() -> None:
    cache, n, _ = fakes(3, 1)
    cache._fetches[1] = lambda: Fake(float("nan"))
    log_p = torch.log(torch.tensor([[0.2, 0.5, 0.3]] * 2))
    ensemble = Ensemble([Expert(n[k], FLOW, (k,), name=str(k)) for k in range(3)], lambda x, t, pooled=None: log_p)
    x, t = torch.randn(2, 2, 3, 5), torch.full((2,), 0.5)
    sampler = Sampler(ensemble)
    with pytest.warns(UserWarning, match="1 answered with NaN"), sampler.tracing() as trace:
        u = sampler.velocity(x, t)
    torch.testing.assert_close(u, torch.full_like(u, 2 * 0.3 / 0.5))
    assert trace.weights[0][:, 1].tolist() == [0, 0]
    assert len(cache.resident) == 1


# --- weights of fewer bits ---


@pytest.mark.parametrize(
    ("weights", "bytes_each", "error"), [("bf16", 2, 0.03), ("fp16", 2, 0.01), ("int8", 1.2, 0.06)]
)
def test_rounded_weights_are_smaller_and_nearly_as_accurate(tmp_path, weights, bytes_each, error) -> None:
    path = write_ensemble(tmp_path, 128, 1)
    x, t = torch.randn(5, *LATENT), torch.full((5,), 0.4)
    loaded = load_ensemble(path)
    exact = loaded.ensemble.velocity(x, t, loaded.encoder(PROMPTS))
    plain = load_ensemble(path, weights=weights).ensemble
    network = plain.experts[0].network
    assert bytes_of(network) <= 1.1 * bytes_each * sum(p.numel() for p in network.parameters())
    u = plain.velocity(x, t, loaded.encoder(PROMPTS))
    assert u.dtype == torch.float32
    assert 0 < (u - exact).norm() / exact.norm() < error
    budget = bytes_of(plain.router) + 2 * bytes_of(network)
    held = load_ensemble(path, weights=weights, memory_budget=budget).ensemble
    assert torch.equal(held.velocity(x, t, loaded.encoder(PROMPTS)), u)
    cache = held.experts[0].network.cache
    assert len(cache.resident) == 2
    with cache.using(0) as network:
        assert bytes_of(network) == cache._sizes[0]  # known before it is loaded


def test_a_rounded_file_is_read_one_tensor_at_a_time(small) -> None:
    file = small.parent / "0" / WEIGHTS
    stored, rounded = read_weights(file), read_weights(file, "bf16")
    assert stored.keys() == rounded.keys()
    for name, tensor in rounded.items():
        assert torch.equal(tensor, stored[name].bfloat16())
    if Path("/proc/self/maps").exists():
        del stored
        assert str(file) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
def test_a_moved_network_shares_no_tensor_and_computes_the_same(small, weights) -> None:
    """What is pinned, and what is copied to a GPU: here, cloned."""
    network = cast_weights(load_expert(small.parent / "0").expert.network, weights)
    moved = _moved(network, torch.clone)
    x, t, (condition,) = torch.randn(5, *LATENT), torch.rand(5), load_ensemble(small).encoder(PROMPTS)
    with torch.inference_mode():
        assert torch.equal(moved(x, t, condition), network(x, t, condition))
    assert bytes_of(moved) == bytes_of(network)
    mine, theirs = ({p.data_ptr() for t in _tensors(n) for p in _parts(t)} for n in (network, moved))
    assert len(mine) == len(theirs)
    assert not mine & theirs
    assert [type(p) for p in moved.parameters()] == [type(p) for p in network.parameters()]


def test_int8_quantizes_the_linear_layers_only(small) -> None:
    network = cast_weights(load_expert(small.parent / "0").expert.network, "int8")
    assert type(network.blocks[0].mlp[0].weight).__name__ == "Int8Tensor"
    assert network.positions.dtype == torch.bfloat16


# --- errors ---


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16 * 10**9), ("6GB", 6 * 10**9), ("500MB", 500 * 10**6), ("2GiB", 2**31), ("1.5 kb", 1500), ("7", 7)],
)
def test_budgets_are_parsed(text, size) -> None:
    assert parse_budget(text) == size
    assert parse_budget(size) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0GB", "16 gigs", "1e9", "16GB GB", "٣GB", "nan", -5, 0.5])
def test_an_invalid_budget_is_refused_in_one_line(text) -> None:
    with pytest.raises(AtollError, match="expected a size such as 16GB") as caught:
        parse_budget(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=8))
def test_any_text_is_a_budget_or_refused(text) -> None:
    message = ""
    try:
        assert parse_budget(text) > 0
    except AtollError as error:
        message = str(error)
    assert "\n" not in message


def test_too_small_a_budget_is_refused_with_the_minimum(small) -> None:
    minimum = budget_of(small, 1)
    load_ensemble(small, memory_budget=minimum)
    with pytest.raises(AtollError, match=r"^memory budget \S+KB: the largest expert, e\d, needs \S+KB and") as caught:
        load_ensemble(small, memory_budget=minimum - 1)
    named = re.search(r"set it to at least (\S+),", str(caught.value))[1]
    load_ensemble(small, memory_budget=named)
    with pytest.raises(AtollError, match=r"needs 1?\d\d?KB; set it to at least"):
        load_ensemble(small.parent / "0", memory_budget=5)


def test_unknown_weights_and_a_missing_torchao_are_refused(small, monkeypatch) -> None:
    with pytest.raises(AtollError, match="unknown weights 'int4'; expected fp32, bf16, fp16, int8"):
        load_ensemble(small, weights="int4")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(AtollError, match=r"atoll\[lowbit\]"):
        check_weights("int8")


def test_a_file_that_changes_while_in_use_is_refused(tmp_path) -> None:
    path = write_ensemble(tmp_path, 32, 1)
    ensemble = load_ensemble(path, memory_budget=budget_of(path, 1)).ensemble
    file = tmp_path / "2" / WEIGHTS
    os.utime(file, ns=(0, 0))
    with pytest.raises(AtollError, match="changed while it was in use"), ensemble.experts[2].network.cache.using(2):
        pass


def test_the_sample_command_takes_a_budget(small, tmp_path) -> None:
    images = []
    budget = str(budget_of(small, 2))
    for number, options in enumerate(([], ["--memory-budget", budget], ["--weights", "bf16"])):
        out = tmp_path / f"{number}.png"
        done = CliRunner().invoke(app, ["sample", str(small), *PROMPTS, "-o", str(out), *options])
        assert done.exit_code == 0, done.output
        images.append(out.read_bytes())
    assert images[0] == images[1]
    assert images[0] != images[2]
    failed = CliRunner().invoke(app, ["sample", str(small), "moss", "--memory-budget", "6 gigs"])
    assert "expected a size such as 16GB" in str(failed.exception)


def test_conditions_reach_the_network_unchanged() -> None:
    seen = []
    cache = ExpertCache(4)

    class Noting(Fake):
        def forward(self, x, time, condition):
            seen.append((x, time, condition))
            return x

    network = cache.add("one", 4, lambda: Noting(0))
    given_ = torch.randn(2, 3), torch.rand(2), Condition(torch.randn(2, 4, 6), torch.ones(2, 4, dtype=torch.bool), None)
    network(*given_)
    assert all(a is b for a, b in zip(seen[0], given_, strict=True))
