"""Plans of trainings over several sizes of images, and on several GPUs that share an expert."""

import json
import re
from dataclasses import replace

import pytest

from atoll.errors import AtollError
from atoll.manifest import Manifest, load_manifest, parse_manifest, recipe_path
from atoll.plan import plan, plan_run
from atoll.plan.cost import fixed_bytes, parameters, router_flops, training_flops
from atoll.plan.fit import Switches, fastest, needed_bytes
from atoll.plan.gpus import find_gpu
from atoll.plan.mmdit_cost import RoutedBlocks
from atoll.plan.recipe import latent_sizes, network_of, router_of, text_of
from atoll.plan.report import _groups, _routes
from atoll.plan.rules import CUDA_BF16

RECIPE = """
name: sizes
data: {{source: folder, path: here, size: 512, buckets: {{sizes: {sizes}}}}}
codec: {{name: kl, weights: somebody/else}}
condition: {{name: wordllama}}
clusters: {{k: 2}}
network: {{name: mmdit, patch: 2, width: 768, depth: 12, heads: 12}}
train: {{steps: 1000, batch: 32, precision: bf16, compile: true, sharding: {sharding}}}
experts:
  - {{cluster: 0, objective: {{prediction: flow, schedule: linear}}}}
  - {{cluster: 1, objective: {{prediction: flow, schedule: linear}}}}
router: {{network: {{patch: 2}}, train: {{steps: 10, batch: 4}}}}
"""


def recipe(sizes: str = "[512x512, 768x512, 512x1024]", sharding: str = "replicate") -> Manifest:
    return parse_manifest(RECIPE.format(sizes=sizes, sharding=sharding), "here")


def test_each_size_has_the_cost_of_its_network_and_time_is_the_mean_by_share() -> None:
    manifest, counts = recipe(), {"512x512": 30, "768x512": 10}
    sizes, text = latent_sizes(manifest, counts), text_of(manifest.condition)
    assert [(size.shape, size.share) for size in sizes] == [((4, 64, 64), 0.75), ((4, 64, 96), 0.25), ((4, 128, 64), 0)]
    planned = plan(manifest, [find_gpu("a100")], latent=sizes)
    expert, (a100,) = planned.experts[0], planned.machines
    assert [size.tokens for size in expert.sizes] == [1024, 1536, 2048]
    flops = [training_flops(network_of(manifest, manifest.experts[0], size.shape, text)) for size in sizes]
    assert [size.training_flops for size in expert.sizes] == flops
    assert expert.training_flops == pytest.approx(0.75 * flops[0] + 0.25 * flops[1])
    # What fits is decided by the largest size that an image has; the time by all of them.
    assert expert.network == network_of(manifest, manifest.experts[0], (4, 64, 96), text)
    speed = 312e12 * 0.4
    assert a100.step_seconds[expert.name] == pytest.approx([32 * f / speed for f in flops])
    assert a100.gpu_days[expert.name] * 86400 == pytest.approx(32_000 * expert.training_flops / speed)
    routers = [router_flops(router_of(manifest, size.shape, text)) for size in sizes]
    assert planned.router.flops == pytest.approx(3 * (0.75 * routers[0] + 0.25 * routers[1]))
    values = plan(manifest, images=1000, latent=sizes).download_bytes
    assert values == pytest.approx(500 * (2 * 4 * (0.75 * 64 * 64 + 0.25 * 64 * 96) + 120))


def test_routed_tokens_count_in_flops_and_time_and_the_plan_says_so() -> None:
    manifest = recipe()
    train = {"token_route": {"keep": 0.5, "first": 2, "last": 10, "until": 0.7999}}
    routed = manifest.model_copy(
        update={"experts": (manifest.experts[0].model_copy(update={"train": train}), manifest.experts[1])}
    )
    planned = plan(routed, [find_gpu("a100")])
    one, plain = planned.experts
    size, whole = one.sizes[1], plain.sizes[1]  # 1,536 tokens
    assert size.route == RoutedBlocks(first=2, last=10, kept=768, share=0.799)
    assert size.training_flops == training_flops(size.network, route=size.route) < 0.9 * whole.training_flops
    assert (size.forward_flops, one.activation_bytes) == (whole.forward_flops, plain.activation_bytes)
    (a100,) = planned.machines
    seconds = a100.step_seconds[one.name][1] / a100.step_seconds[plain.name][1]
    assert seconds == pytest.approx(size.training_flops / whole.training_flops)
    assert _groups(planned) == [(one.name, one), (plain.name, plain)]
    (line,) = _routes(planned)
    assert line.startswith(
        f"Routed tokens of {one.name}: in 80% of the steps 512 of 1,024 image tokens pass blocks 2 to 9"
    )
    # What training refuses is refused.
    network = manifest.network.model_copy(update={"depth": 8})
    with pytest.raises(AtollError, match=r"blocks 2 to 10, expected first < last <= 8"):
        plan(routed.model_copy(update={"network": network}))


def test_one_size_costs_what_it_did_without_buckets() -> None:
    with_bucket = recipe("[512x512]")
    square = with_bucket.model_copy(update={"data": with_bucket.data.model_copy(update={"buckets": None})})
    assert plan(with_bucket) == plan(square)
    assert isinstance(plan(square).experts[0].training_flops, int)


@pytest.mark.parametrize("counted", [False, True])
def test_a_line_for_each_size_and_their_mean_in_80_columns(atoll, tmp_path, counted) -> None:
    run = tmp_path / "run"
    (run / "encoded").mkdir(parents=True)
    (run / "atoll.yaml").write_text(RECIPE.format(sizes="[512x512, 768x512, 64x96]", sharding="replicate"))
    if counted:
        counts = {"sizes": {"512x512": 300, "768x512": 100}}
        index = {"rows": 400, "columns": {"latent": {"shape": [4, 64, 64]}}, "card": {"counts": counts}}
        (run / "encoded" / "index.json").write_text(json.dumps(index))
    code, text, error = atoll("plan", run, "--gpu", "4090")
    assert code == 0, error
    table = text.partition("The sizes of the images")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [line.split()[:3] for line in table]
    shares = ["75.0%", "25.0%", "0.0%"] if counted else ["33.3%"] * 3
    assert rows[:3] == [
        ["512x512", shares[0], "1,024"],
        ["768x512", shares[1], "1,536"],
        ["64x96", shares[2], "24"],
    ]
    assert rows[3] == ["mean", "100.0%", "1,152" if counted else "861"]
    assert ("Shares: equal" in text) != counted
    assert ("No image fills 64x96." in text) == counted
    assert ("Data: 400 images" in text) == counted
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


@pytest.mark.parametrize(
    ("sizes", "counts", "message"),
    [
        ("[512x512, 500x512]", {}, r"data.buckets.sizes: 500x512, expected sides that are multiples of 16"),
        ("[512x512]", {"256x256": 9}, r"the encoded images have the size 256x256, atoll.yaml names 512x512; encode ag"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(sizes, counts, message) -> None:
    with pytest.raises(AtollError, match=message):
        latent_sizes(recipe(sizes), counts)


def test_shards_divide_all_but_the_copies() -> None:
    network = plan(recipe()).experts[0].network
    count = parameters(network)
    whole, eighth = (fixed_bytes(network, CUDA_BF16, shards=shards) for shards in (1, 8))
    copies = whole - 20 * count
    # Three blocks of twelve are gathered at a time.
    assert eighth == pytest.approx(20 * count / 8 + copies + 3 * 4 * count / 12)
    least = needed_bytes(network, CUDA_BF16, Switches(), 1, shards=8)
    assert fastest(network, CUDA_BF16, 1, least, 1e14) != fastest(network, CUDA_BF16, 1, least, 1e14, shards=8)


def test_gpus_that_share_an_expert() -> None:
    """Four GPUs are four times as fast, and take as many GPU-days."""
    manifest = load_manifest(recipe_path("hddm-xl2-laion"))
    (one,), (four,) = (plan(manifest, [find_gpu("a100")], each=each).machines for each in (1, 4))
    assert four.images_per_s["1-flow-linear"] == pytest.approx(4 * one.images_per_s["1-flow-linear"])
    assert four.total_gpu_days == pytest.approx(one.total_gpu_days)
    assert four.usd == pytest.approx(one.usd)
    fit = four.fits["1-flow-linear"]
    assert fit is not None
    assert fit.micro_batch == 32


def test_what_no_gpu_can_hold_several_can_if_they_shard() -> None:
    wide, small = {"width": 2560, "depth": 30, "heads": 20}, replace(find_gpu("a40"), memory=40e9)
    replicas, shards = (recipe(sharding=sharding) for sharding in ("replicate", "shard"))
    replicas, shards = (
        manifest.model_copy(update={"network": manifest.network.model_copy(update=wide)})
        for manifest in (replicas, shards)
    )
    with pytest.raises(AtollError, match="more than a40 has"):
        plan(replicas, [small], each=16)
    fit = plan(shards, [small], each=16).machines[0].fits["0-flow-linear"]
    assert fit is not None
    assert fit.switches == Switches()


def test_what_gpus_cannot_share_is_refused_as_in_training() -> None:
    manifest, a100 = recipe(), [find_gpu("a100")]
    batch = manifest.train.batch
    with pytest.raises(AtollError, match=f"a batch of {batch} cannot be divided among {batch - 1} GPUs"):
        plan(manifest, a100, each=batch - 1)
    for key, value in (("fused_backward", True), ("block_swap", 1)):
        one_gpu = {"clip": None, "compile": False, "checkpointing": "full", key: value}
        train = manifest.train.model_copy(update=one_gpu)
        with pytest.raises(AtollError, match=f"train.{key} is for one GPU"):
            plan(manifest.model_copy(update={"train": train}), a100, each=2)
    # Nor are they in the table of batches.
    rows = {each: " ".join(*plan(manifest, a100, each=each).batches.values()) for each in (1, 2)}
    assert all(word in rows[1] and word not in rows[2] for word in ("fused backward", "swapped"))


def test_numbers_of_a_narrow_table_are_whole(atoll) -> None:
    code, text, _ = atoll("plan", "modern-tiny", "--gpu", "24GB")
    assert code == 0
    assert re.search(r"^compile, full checkpointing +\d{5} +\d{6} +\d{6}$", text, re.MULTILINE)


def test_gpus_on_the_command_line(atoll) -> None:
    code, text, _ = atoll("plan", "hddm-xl2-laion", "--gpu", "a100", "--gpus", "8")
    assert code == 0
    assert "8 x a100" in text
    assert "batch 128 on 8 GPUs, each as 1 x 16 with: compile" in text
    assert "a step takes 0.111 s" in " ".join(text.split())
    code, _, error = atoll("plan", "demo", "--compare", "--gpus", "2")
    assert code == 2
    assert "leave --gpu, --gpus" in error


def test_a_plan_of_a_run_that_is_not_encoded_knows_the_sizes(tmp_path) -> None:
    file = tmp_path / "sizes.yaml"
    file.write_text(RECIPE.format(sizes="[512x512, 768x512]", sharding="replicate"))
    planned = plan_run(file)
    assert [size.image for size in planned.experts[0].sizes] == ["512x512", "768x512"]
    assert not planned.counted
