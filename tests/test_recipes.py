"""The recipes: what their plans say, against the papers and their own comments; and tiny versions that really train."""

import math

import pytest
from safetensors.torch import load_file

from atoll.manifest import load_manifest, recipe_path
from atoll.plan import Plan, plan
from atoll.plan.gpus import find_gpu
from atoll.storage.artifact import WEIGHTS, read_card
from atoll.storage.cards import ExpertCard, RouterCard
from atoll.train.expert import train_expert
from atoll.train.router import train_router
from atoll.train.track import read_metrics
from tests.shrunk import STEPS, K, write_shrunk_run
from tests.train.together import Training, start

NAME = "1-flow-linear"
DAY = 86400


def planned(recipe: str, gpu: str, **options) -> Plan:
    return plan(load_manifest(recipe_path(recipe)), [find_gpu(gpu)], **options)


def test_ddm_imagenet_has_the_papers_sizes() -> None:
    """895 M, a router of 158 M with 4 % of the training, 308 GFLOP, and all experts cost 7.4 times top-1."""
    p = planned("ddm-imagenet", "a100")
    assert {e.parameters for e in p.experts} == {p.experts[0].parameters}
    assert len(p.experts) == 8
    assert p.experts[0].parameters == pytest.approx(895e6, rel=0.001)
    assert p.router.parameters == pytest.approx(158e6, rel=0.001)
    assert p.experts[0].forward_flops == pytest.approx(308e9, rel=0.015)
    training = sum(e.images * e.training_flops for e in p.experts)
    assert p.router.images * p.router.flops == pytest.approx(0.04 * training, rel=0.01)
    assert p.sampling.calls == 2
    assert p.sampling.flops["full"] / p.sampling.flops["top-1"] == pytest.approx(7.4, abs=0.05)
    # By hand: two passes of each expert, one of the router.
    expert, router = p.experts[0].forward_flops, p.router.flops / 3
    assert p.sampling.flops == pytest.approx({"top-1": 50 * (2 * expert + router), "full": 50 * (16 * expert + router)})


def test_ddm_24b_takes_the_papers_step_at_a_quarter_of_the_peak() -> None:
    """8 x 3 B, 0.28 s a step on 16 GPUs, 6.5 days in both stages."""
    seconds = 0.0
    for recipe in ("ddm-24b", "ddm-24b-high"):
        p = planned(recipe, "h100", mfu=0.25, each=16)
        assert sum(e.parameters for e in p.experts) == pytest.approx(24e9, rel=0.005)
        (h100,), expert = p.machines, p.experts[0]
        assert h100.step_seconds[expert.name][0] == pytest.approx(0.28, rel=0.03)
        # The closed form, for the main size.
        work = expert.batch * expert.sizes[0].training_flops
        assert h100.step_seconds[expert.name][0] == pytest.approx(work / (16 * 989e12 * 0.25))
        fit = h100.fits[expert.name]
        assert fit is not None
        assert (fit.switches, fit.accumulate) == (expert.recipe_switches, expert.accumulate)
        seconds += expert.steps * 0.28
    assert seconds == pytest.approx(6.5 * DAY, rel=0.01)


@pytest.mark.parametrize(("recipe", "days"), [("modern-256", 10), ("modern-512", 4.4)])
def test_modern_experts_fit_one_card_of_24_gb_as_the_recipe_says(recipe, days) -> None:
    p = planned(recipe, "4090")
    (card,) = p.machines
    for expert in p.experts:
        fit = card.fits[expert.name]
        assert fit is not None
        assert (fit.switches, fit.accumulate) == (expert.recipe_switches, expert.accumulate)
        # Room for the text encoder, which the plan does not count.
        assert (fit.largest - fit.micro_batch) * expert.activation_bytes_compiled > 1.4e9
    assert card.gpu_days["0-flow-linear"] == pytest.approx(days, rel=0.02)


def test_the_modern_stages_cost_about_a_dense_model_of_2026() -> None:
    """20 to 32 H100-days, at the MFU that is assumed for one."""
    work = sum(
        expert.images * expert.training_flops
        for recipe in ("modern-256", "modern-512")
        for expert in planned(recipe, "h100").experts
    )
    assert 20 <= work / (989e12 * 0.4 * DAY) <= 32


@pytest.mark.parametrize("recipe", ["ddm-imagenet", "ddm-24b", "modern-256", "modern-tiny"])
def test_a_tiny_version_trains(tmp_path, recipe) -> None:
    run = tmp_path / recipe
    manifest = write_shrunk_run(run, recipe)
    train_expert(run, manifest, "1")
    train_router(run, manifest)
    card = read_card(run / "experts" / NAME, ExpertCard)
    network, own = card.network, load_manifest(recipe_path(recipe)).network
    assert network["name"] == own.name
    assert network["patch"] == own.patch
    assert card.training is not None
    assert card.training.steps == STEPS
    shapes = 1 if manifest.data.buckets is None else 2
    assert len(card.shapes or [card.latent_shape]) == shapes
    lines = [line for line in read_metrics(run / f"experts/.train-{NAME}") if "loss" in line]
    assert len(lines) == STEPS
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert read_card(run / "router", RouterCard).network["clusters"] == K


@pytest.mark.parametrize(("first", "second"), [("ddm-24b", "ddm-24b-high"), ("modern-256", "modern-512")])
def test_the_second_stage_goes_on_from_the_run_of_the_first(tmp_path, first, second) -> None:
    train_expert(tmp_path / first, write_shrunk_run(tmp_path / first, first), "1")
    manifest = write_shrunk_run(tmp_path / second, second, side=16)
    train_expert(tmp_path / second, manifest, "1")
    before, after = (read_card(tmp_path / run / "experts" / NAME, ExpertCard) for run in (first, second))
    assert after.training is not None
    assert after.training.init is not None
    assert after.training.init.sha256 == before.weights_sha256
    assert (before.network["size"], after.network["size"]) == ([8, 8], [16, 16])
    assert after.network["base_size"] == [8, 8]


@pytest.mark.slow  # two processes that import torch
def test_a_tiny_ddm_24b_is_sharded_over_two_processes(tmp_path) -> None:
    manifest = write_shrunk_run(tmp_path / "one", "ddm-24b", precision="fp32")
    assert manifest.train.sharding == "shard"
    write_shrunk_run(tmp_path / "two", "ddm-24b", precision="fp32")
    train_expert(tmp_path / "one", manifest, "1")
    start([Training(str(tmp_path / "two"))])
    one, two = (load_file(tmp_path / run / "experts" / NAME / WEIGHTS) for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-5, name
    # Each process wrote its part of the checkpoint.
    assert list((tmp_path / "two" / f"experts/.train-{NAME}").glob("checkpoint-*.dcp"))
