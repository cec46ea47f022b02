import io
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from atoll.errors import AtollError
from atoll.manifest import Manifest, TrainSettings, load_manifest, recipe_path
from atoll.manifest.targets import TargetsSettings
from atoll.nn import build_network
from atoll.plan import Plan, as_json, plan, plan_run, render
from atoll.plan.cost import DiTSizes, sizes_of, training_flops
from atoll.plan.fit import EMA_EVERY, all_switches, ladder
from atoll.plan.gpus import find_gpu
from atoll.plan.islands import load_islands
from atoll.plan.measure_machine import compare, measured_flops, measured_rate
from atoll.plan.muon_cost import MuonCost, muon_matrices
from atoll.plan.recipe import Text, cluster_bytes, latent_shape, latent_sizes, switches_of, text_of
from atoll.plan.report import comparison_lines
from atoll.storage.cards import ExpertCard
from atoll.train import state
from atoll.train.denoiser import denoiser_config
from atoll.train.muon import matrix_parts
from tests.cards import expert_card

ISLANDS = """
- {name: anna, gpu: 4090, hours_per_day: 12, failures_per_day: 0.2, download_mbit: 100, experts: [1, 5-flow-linear]}
- {name: ben, gpu: a40, failures_per_day: 0.05, dropouts_per_day: 0.01, mfu: 0.5}
- {name: lab, gpu: a100, gpus: 4, failures_per_day: 0.1}
- {name: attic, tflops: 40, memory_gb: 12, hours_per_day: 5}
"""


@pytest.fixture(scope="module")
def hddm() -> Manifest:
    return load_manifest(recipe_path("hddm-xl2-laion"))


def shown(p: Plan) -> str:
    text = io.StringIO()
    Console(file=text, width=200).print(render(p, date(2026, 1, 1)))
    return text.getvalue()


def test_hddm_gives_its_own_figures_back(hddm: Manifest) -> None:
    """8 x XL/2 of 605 M, 2 DDPM and 6 Flow Matching, 11 M images: 72 A100-days (at the MFU that is stated)."""
    p = plan(hddm, [find_gpu("a100")], images=11_000_000)
    assert len(p.experts) == 8
    assert [part.objective.prediction for part in hddm.experts].count("eps") == 2
    assert {round(e.parameters / 1e6) for e in p.experts} == {606}
    assert p.router.parameters == pytest.approx(129e6, rel=0.01)
    (a100,) = p.machines
    assert a100.mfu == 0.4
    assert a100.total_gpu_days == pytest.approx(72, rel=0.01)
    assert a100.total_gpu_days == pytest.approx(sum(a100.gpu_days.values()))
    # The closed form: what 72 days of 40 % of 312 TFLOP/s can do.
    work = sum(e.images for e in p.experts) * p.experts[0].training_flops
    assert work == pytest.approx(72 * 86400 * 312e12 * 0.4, rel=0.01)
    assert p.batches[p.experts[0].name]["compile"] == {24e9: 24, 48e9: 84, 80e9: 164}


def test_twice_the_share_is_half_the_time_and_the_price(hddm: Manifest) -> None:
    low, high = (plan(hddm, [find_gpu("a100")], mfu=mfu).machines[0] for mfu in (0.25, 0.5))
    assert low.total_gpu_days == pytest.approx(2 * (high.total_gpu_days or 0))
    assert low.usd == pytest.approx(2 * (high.usd or 0)) == pytest.approx((low.total_gpu_days or 0) * 24 * 1.39)


def test_download_of_a_cluster(hddm: Manifest) -> None:
    p = plan(hddm, images=11_000_000)
    assert p.download_bytes == pytest.approx(11e6 / 8 * (4 * 32 * 32 * 2 + 120))
    assert plan(hddm).download_bytes is None


def test_networks_are_those_that_training_builds() -> None:
    """The plan's sizes are those that `atoll train` builds from, for the recipes that need no download."""
    mmdit = {"name": "mmdit", "patch": 4, "width": 64, "depth": 3, "heads": 4, "dual_blocks": 1}
    for name, network, block in (("demo", {}, "mmdit"), ("glyphs", {}, "dit"), ("demo", mmdit, "mmdit")):
        manifest = load_manifest(recipe_path(name))
        manifest = Manifest.model_validate({**manifest.model_dump(), **({"network": network} if network else {})})
        text, latent = text_of(manifest.condition), latent_shape(manifest)
        for part, expert in zip(manifest.experts, plan(manifest).experts, strict=True):
            config = denoiser_config(manifest.network_of(part), latent, text.dim, text.pooled)
            built = build_network(config).config.model_dump()  # type: ignore[union-attr,operator]
            assert expert.network == sizes_of(built, text.tokens)
            assert expert.network.name == block


@pytest.mark.parametrize("gpu", [None, "a100", "24GB"])
def test_tables_and_json(hddm: Manifest, gpu: str | None, tmp_path: Path) -> None:
    file = tmp_path / "islands.yaml"
    file.write_text(ISLANDS)
    p = plan_run("hddm-xl2-laion", gpu, file, images=11_000_000, trials=20)
    text = shown(p)
    for word in ("605.7 M", "439 MiB", "8 experts", "Largest batch", "GPU-days", "anna", "Done on 2026-", "decides it"):
        assert word in text
    value = json.loads(json.dumps(as_json(p, date(2026, 1, 1)), allow_nan=False))
    assert value["experts"][0]["parameters"] == 605_675_536
    assert value["batches"]["0-eps-cosine"]["compile"]["24GB"] == 24
    assert value["finish"]["start"] == "2026-01-01"
    assert value["finish"]["median"] <= value["finish"]["p90"]
    days = value["machines"][0]["total_gpu_days"]
    assert (days is None) == (gpu == "24GB")
    assert set(value["simulation"]["assignment"]) == {"anna", "ben", "lab", "attic"}


def test_islands_train_what_they_may_and_what_fits(hddm: Manifest, tmp_path: Path) -> None:
    file = tmp_path / "islands.yaml"
    file.write_text("- {name: one, gpu: a40, experts: [0]}\n- {name: many, gpu: a100, gpus: 8}")
    simulation = plan_run("hddm-xl2-laion", islands=file, trials=3).simulation
    assert simulation is not None
    assert set(simulation.assignment["one"]) <= {"0-eps-cosine"}
    # Eight GPUs that share the batch of 128, 16 each, do eight times the images.
    per_expert = plan(hddm, [find_gpu("a100")]).machines[0].gpu_days["1-flow-linear"]
    experts = len(simulation.assignment["many"])
    assert simulation.hours["many"] == pytest.approx(experts * per_expert * 24 / 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: a, gpu: a40, experts: [0]}", "no island for expert 1-flow-linear"),
        ("- {name: a, tflops: 40, memory_gb: 3}", "no island for expert 0-eps-cosine"),
        ("- {name: a, gpu: a40, experts: [9]}", "island a: no expert '9'; expected some of 0-eps-cosine"),
        ("- {name: a, gpu: a41}", "no GPU 'a41'"),
        ("- {name: a, gpu: 24GB}", "24GB has no known speed"),
    ],
)
def test_islands_that_do_not_do(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "islands.yaml"
    file.write_text(text)
    with pytest.raises(AtollError, match=message):
        plan_run("hddm-xl2-laion", islands=file, trials=2)


def test_mistakes(hddm: Manifest) -> None:
    with pytest.raises(AtollError, match=r"606 M parameters need .* GB .*more than 4GB has"):
        plan_run("hddm-xl2-laion", "4GB")
    huge = hddm.model_copy(update={"network": hddm.network.model_copy(update={"width": 32_000, "heads": 32})})
    with pytest.raises(AtollError, match="more than any GPU known has"):
        plan(huge)
    with pytest.raises(AtollError, match="no recipe 'nothing'"):
        plan_run("nothing")
    with pytest.raises(AtollError, match="no GPU 'a1'"):
        plan_run("demo", "a1")
    for mfu in (0.0, 1.5, -1.0):
        with pytest.raises(AtollError, match="--mfu"):
            plan_run("demo", mfu=mfu)
    with pytest.raises(AtollError, match="--images 0"):
        plan_run("demo", images=0)


def test_a_gpu_too_small_is_shown_where_none_was_named(hddm: Manifest) -> None:
    """3 B parameters take 66 GB: a 4090 cannot, an H200 can."""
    wide = hddm.model_copy(update={"network": hddm.network.model_copy(update={"width": 3584, "heads": 28})})
    p = plan(wide)
    fits = {m.gpu.name: m.fits["0-eps-cosine"] is not None for m in p.machines}
    assert fits["h200"]
    assert not fits["4090"]
    assert "does not fit" in shown(p)


def test_a_run_knows_its_number_of_images(tmp_path: Path) -> None:
    (tmp_path / "encoded").mkdir()
    (tmp_path / "atoll.yaml").write_text(recipe_path("demo").read_text())
    assert plan_run(tmp_path).images is None
    index = tmp_path / "encoded" / "index.json"
    index.write_text(json.dumps({"rows": 2288, "columns": {"latent": {"dtype": "float16", "shape": [3, 8, 24]}}}))
    p = plan_run(tmp_path)
    assert p.images == 2288
    assert (p.experts[0].network.channels, p.experts[0].network.size) == (3, (8, 24))
    assert plan_run(tmp_path, images=7).images == 7
    assert "captions" not in shown(p)
    counts = {"cut": {"captions": 1200, "fraction": 0.25}}
    index.write_text(json.dumps({**json.loads(index.read_text()), "card": {"counts": counts}}))
    said = "1,200 captions are longer than the text encoder reads: on average 25% of their text is cut."
    assert said in " ".join(shown(plan_run(tmp_path)).split())
    index.write_text(json.dumps({"rows": 2288, "columns": {}}))
    with pytest.raises(AtollError, match="encode again"):
        plan_run(tmp_path)


def test_widths_of_encoders(tmp_path: Path) -> None:
    assert text_of({"name": "hash"}) == Text(16, 64, 64)
    assert text_of({"name": "wordllama"}) == Text(32, 256, 256)
    assert text_of({"name": "wordllama", "dim": 64, "length": 20}) == Text(20, 64, 64)
    assert text_of({"name": "clip", "weights": "openai/clip-vit-large-patch14"}) == Text(77, 768, 768)
    assert text_of({"name": "t5", "weights": "google/t5-v1_1-xxl", "length": 77}) == Text(77, 4096, None)
    (tmp_path / "config.json").write_text(
        '{"text_config": {"hidden_size": 32, "projection_dim": 24}, "d_model": 48, "latent_channels": 16}'
    )
    assert text_of({"name": "clip", "weights": str(tmp_path)}) == Text(77, 32, 32)
    assert text_of({"name": "clip", "weights": str(tmp_path), "length": 20, "pooled": "projected"}) == Text(20, 32, 24)
    assert text_of({"name": "t5", "weights": str(tmp_path)}) == Text(120, 48, None)
    assert text_of({"name": "label", "labels": ["cat", "dog", "owl"]}) == Text(1, 3, 3)
    assert text_of({"name": "sd3", "weights": "stabilityai/sd3", "length": 100}) == Text(177, 4096, 2048)
    assert text_of({"name": "flux", "weights": "x/y"}) == Text(512, 4096, 768)
    assert text_of({"name": "sana", "weights": "x/y"}) == Text(300, 2304, None)
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"text_config": {"hidden_size": 20}}')
    assert text_of({"name": "flux2", "weights": str(tmp_path)}) == Text(512, 60, None)
    for unknown in ({"name": "t5", "weights": "somebody/else"}, {"name": "words"}):
        with pytest.raises(AtollError, match="--text"):
            text_of(unknown)


@pytest.mark.parametrize(
    ("codec", "shape"),
    [
        ({"name": "pixels", "channels": 3}, (3, 256, 256)),
        ({"name": "kl"}, (4, 32, 32)),
        ({"name": "taef2"}, (32, 32, 32)),
        ({"name": "flux2", "weights": "black-forest-labs/FLUX.2-dev", "subfolder": "vae"}, (128, 16, 16)),
        ({"name": "dc", "weights": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"}, (32, 8, 8)),
        ({"name": "dc", "weights": "mit-han-lab/dc-ae-f64c128-in-1.0-diffusers"}, (128, 4, 4)),
        ({"name": "qwen", "weights": "Qwen/Qwen-Image", "statistics": "measured"}, (16, 32, 32)),
        ({"name": "hunyuan"}, (64, 8, 8)),
        ({"name": "rae"}, (768, 16, 16)),
    ],
)
def test_shapes_of_latents(hddm: Manifest, codec: dict, shape: tuple[int, int, int]) -> None:
    assert latent_shape(hddm.model_copy(update={"codec": codec})) == shape


def test_a_config_json_beside_the_weights_says_the_shape(hddm: Manifest, tmp_path) -> None:
    """Nothing but it is read: there are no weights here."""
    (tmp_path / "vae").mkdir()
    config = {"latent_channels": 8, "block_out_channels": [8, 8, 8], "patch_size": [2, 2]}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    codec = {"name": "flux2", "weights": str(tmp_path), "subfolder": "vae"}
    assert latent_shape(hddm.model_copy(update={"codec": codec})) == (32, 32, 32)


def test_a_codec_of_one_size_is_planned_for_it_alone(hddm: Manifest) -> None:
    large = {"data": hddm.data.model_copy(update={"size": 512}), "codec": {"name": "rae"}}
    with pytest.raises(AtollError, match=r"data\.size 512, codec rae: it takes images of 256 pixels a side; set that"):
        latent_shape(hddm.model_copy(update=large))


def test_latents_that_do_not_divide(hddm: Manifest) -> None:
    odd = hddm.model_copy(update={"data": hddm.data.model_copy(update={"size": 100})})
    with pytest.raises(AtollError, match="multiple of 8"):
        latent_shape(odd)
    with pytest.raises(AtollError, match="codec 'vq'"):
        latent_shape(hddm.model_copy(update={"codec": {"name": "vq"}}))


def test_what_is_recommended_is_what_a_recipe_may_say(hddm: Manifest) -> None:
    asked, accumulate = switches_of(hddm.train)
    assert (str(asked), accumulate) == ("compile", 1)
    network = plan(hddm).experts[0].network
    for switches in {*all_switches(), *ladder(network)}:
        parts, clip = (1, None) if switches.fused_backward else (3, 1.0)
        train = TrainSettings(**asdict(switches), batch=12, accumulate=parts, clip=clip)
        assert switches_of(train) == (switches, parts)
    assert "as in the recipe" in shown(plan(hddm, [find_gpu("a100")]))
    assert "batch 128 as 8 x 16 with: compile (up to 24" in shown(plan(hddm, [find_gpu("4090")]))


def test_a_swap_names_its_bytes_and_their_time(hddm: Manifest) -> None:
    """14 blocks of 21.3 M parameters: weights twice and gradients once, 4 bytes each."""
    train = hddm.train.model_copy(update={"block_swap": 14, "checkpointing": "full", "compile": False})
    p = plan(hddm.model_copy(update={"train": train}), [find_gpu("12GB")])
    assert p.experts[0].swap_bytes == pytest.approx(14 * 21.26e6 * 12, rel=1e-3)
    text = shown(p)
    assert "block_swap of 8 experts: 3.57 GB over PCIe a step, 0.22 s at 16 GB/s, 0.11 s at 32 GB/s" in text
    assert "full checkpointing, 14 blocks swapped" in text
    assert "over PCIe" not in shown(plan(hddm, [find_gpu("24GB")]))


def test_average_on_the_cpu_is_updated_as_training_does() -> None:
    assert state._EMA_EVERY_ON_CPU == EMA_EVERY


def test_a_finished_run_against_its_plan() -> None:
    network = DiTSizes((8, 12), 1, 4, 32, 2, 2, 4.0, states_dim=16, tokens=5)
    config = {key: value for key, value in asdict(network).items() if key != "tokens"}
    training = {"mark": "x", "steps": 100, "seconds": 20.0, "settings": {"batch": 16}}
    c = compare(ExpertCard(**expert_card(network=config, training=training)), tokens=5, flops=1e9, mfu=0.5)
    assert c.images == 1600
    assert c.predicted_seconds == pytest.approx(1600 * training_flops(network) / 0.5e9)
    assert c.mfu == pytest.approx(1600 * training_flops(network) / 20 / 1e9)
    assert c.ratio == pytest.approx(20 / c.predicted_seconds)
    assert "measured / predicted" in comparison_lines([c])
    for broken in ({"seconds": 0.0}, {"seconds": None}, {"settings": {}}, {"settings": {"batch": "many"}}):
        card = ExpertCard(**expert_card(network=config, training={**training, **broken}))
        with pytest.raises(AtollError, match="its card"):
            compare(card, 5, 1e9, 0.5)


def test_this_machine_is_measured() -> None:
    import torch

    threads = torch.get_num_threads()
    assert 0 < measured_flops(threads + 1, "fp32", size=256, seconds=0.01) < 1e16
    config = {"name": "dit", "size": (4, 6), "channels": 1, "patch": 2, "width": 16, "depth": 1, "heads": 2,
              "states_dim": 8, "pooled_dim": 8}  # fmt: skip
    assert measured_rate(config, tokens=5, batch=3, threads=threads + 1, seconds=0.01) > 0
    assert torch.get_num_threads() == threads


def test_planning_needs_no_torch_of_its_own() -> None:
    code = "import sys, atoll.plan; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_muon_adds_its_products_to_a_step(hddm: Manifest) -> None:
    """XL/2: 28 blocks of 8 matrices 1152 x 1152 and 2 of 1152 x 4608, five iterations each."""
    muon = hddm.model_copy(update={"train": hddm.train.model_copy(update={"optimizer": "muon"})})
    plain, p = (plan(one, [find_gpu("a100")]) for one in (hddm, muon))
    D = 1152
    flops = 5 * 28 * (8 * 6 * D**3 + 2 * (4 * D * D * 4 * D + 2 * D**3))
    assert p.experts[0].muon == MuonCost(flops, 4 * 28 * 16 * D * D)
    name = p.experts[0].name
    more = flops / (312e12 * p.machines[0].mfu)
    assert p.machines[0].step_seconds[name][0] == pytest.approx(plain.machines[0].step_seconds[name][0] + more)
    assert "Muon of 8 experts: 18,000 GFLOP a step beside the step's own 111,000, and 2.38 GB less" in shown(p)
    assert "Muon of" not in shown(plain)


@pytest.mark.parametrize("network", [{}, {"name": "mmdit", "dual_blocks": 1}, {"name": "mmdit"}])
def test_muons_matrices_are_those_of_training(network: dict[str, Any]) -> None:
    manifest = load_manifest(recipe_path("demo"))
    sizes = {"patch": 4, "width": 64, "depth": 3, "heads": 4}
    manifest = Manifest.model_validate({**manifest.model_dump(), "network": {**sizes, **network}})
    text, latent = text_of(manifest.condition), latent_shape(manifest)
    config = denoiser_config(manifest.network_of(manifest.experts[0]), latent, text.dim, text.pooled)
    counts: Counter[tuple[int, int]] = Counter()
    for name, p in build_network(config).named_parameters():
        if parts := matrix_parts(name, p):
            rows, columns = p.shape[0] // parts, p.shape[1]
            counts[min(rows, columns), max(rows, columns)] += parts
    assert muon_matrices(plan(manifest).experts[0].network) == counts


def test_targets_add_a_projector_and_bytes_to_download(hddm: Manifest) -> None:
    """XL/2 has 256 tokens of 1152; the projector is that of training."""
    from atoll.train.targets import projector

    chosen = TargetsSettings(feature={"name": "efficientnet-lite0"}, dims=8, grid=8)
    train = hddm.train.model_copy(update={"targets_weight": 0.5, "targets_until": 0.25})
    with_targets = hddm.model_copy(update={"train": train, "targets": chosen})
    plain, p = plan(hddm), plan(with_targets)
    cost = p.experts[0].targets
    assert plain.experts[0].targets is None
    assert cost is not None
    assert cost.parameters == sum(weight.numel() for weight in projector(1152, 8).parameters())
    assert cost.flops == 0.25 * 3 * 2 * 256 * (2 * 1152**2 + 1152 * 8)
    assert "Targets of 8 experts: a projector of 2.67 M parameters, 53.3 MB and 1.02 GFLOP" in shown(p)
    assert "Targets of" not in shown(plain)
    sizes = latent_sizes(hddm)
    more = cluster_bytes(with_targets, sizes, 1000) - cluster_bytes(hddm, sizes, 1000)
    assert more == pytest.approx(1000 / hddm.clusters.k * 1024)
    # A training without targets to learn from is found before anything is spent, whichever part it is of.
    with pytest.raises(AtollError, match=r"expert 0-.*targets_weight is 0.5, but encoding stores no targets"):
        plan(hddm.model_copy(update={"train": train}))
    content = common_of(hddm, 10).model_dump()
    content["common"]["train"]["targets_weight"] = 0.1
    manifest = Manifest.model_validate(content)
    with pytest.raises(AtollError, match=r"^common: train.targets_weight is 0.1"):
        plan(manifest)


def common_of(hddm: Manifest, steps: int, **sections: Any) -> Manifest:
    """The manifest with a common model, from which all experts start."""
    content = hddm.model_dump()
    objective = {"prediction": "flow", "schedule": "linear"}
    common = {"objective": objective, "train": {"steps": steps, "batch": 1024}}
    return Manifest.model_validate(
        content | {"common": common, "train": content["train"] | {"init": "common"}} | sections
    )


def test_a_common_model_is_counted_once(hddm: Manifest, tmp_path: Path) -> None:
    file = tmp_path / "islands.yaml"
    file.write_text("- {name: lab, gpu: a100, download_mbit: 1}")
    islands = load_islands(file)
    without = plan(hddm, [find_gpu("a100")], images=11_000_000, islands=islands, trials=2)
    p = plan(common_of(hddm, 1000), [find_gpu("a100")], images=11_000_000, islands=islands, trials=2)
    assert without.common is None
    assert (without.machines[0].common_gpu_days, p.experts, p.router, p.sampling) == (
        None, without.experts, without.router, without.sampling
    )  # fmt: skip
    # Its FLOPs are its images times those of one expert's image; its days follow from them, and are in the total.
    assert p.common is not None
    (a100,), (before,) = p.machines, without.machines
    images = sum(e.images for e in p.experts)
    assert p.common.fraction == pytest.approx(1_024_000 / (1_024_000 + images))
    assert len(p.common.experts) == 8
    assert a100.common_gpu_days == pytest.approx((before.total_gpu_days or 0) * 1_024_000 / images, rel=0.01)
    assert a100.gpu_days == before.gpu_days
    assert a100.total_gpu_days == pytest.approx((before.total_gpu_days or 0) + (a100.common_gpu_days or 0))
    assert a100.usd == pytest.approx((a100.total_gpu_days or 0) * 24 * 1.39)
    # Whoever trains an expert downloads it first: 32 bits for each weight, at 1 Mbit/s.
    hours = 8 * 32 * p.common.training.parameters / 1e6 / 3600
    assert p.simulation is not None
    assert without.simulation is not None
    later = p.simulation.median_days - without.simulation.median_days
    assert later * 24 == pytest.approx(hours, rel=0.01)
    assert p.batches == without.batches  # the same network
    value = json.loads(json.dumps(as_json(p), allow_nan=False))
    assert value["common"]["training"]["name"] == "common"
    text = " ".join(shown(p).split())
    assert f"Common start: 1,000 steps of 1024 on all clusters, once for the run: {p.common.fraction:.1%} of" in text
    assert "8 experts start from it." in text
    assert "the common model's 2.42 GB besides, and gives back 2.42 GB" in text
    assert "counted from the day on which the common model is trained. lab decides" in text
    assert "Common start:" not in shown(without)


def test_a_generalist_is_counted_beside_the_experts(hddm: Manifest) -> None:
    objective = {"prediction": "flow", "schedule": "linear", "levels": [0, 0.2]}
    part = {"objective": objective, "train": {"steps": 1000, "batch": 1024}}
    without, p = plan(hddm, [find_gpu("a100")]), plan(common_of(hddm, 500, generalist=part), [find_gpu("a100")])
    assert (without.generalist, without.machines[0].generalist_gpu_days) == (None, None)
    assert p.generalist is not None
    assert p.common is not None
    images = sum(e.images for e in p.experts)
    assert p.generalist.fraction == pytest.approx(1_024_000 / (1_536_000 + images))
    assert p.common.fraction == pytest.approx(512_000 / (1_536_000 + images))
    assert "generalist" in p.common.experts
    (a100,), (before,) = p.machines, without.machines
    assert (p.experts, p.sampling, a100.gpu_days) == (without.experts, without.sampling, before.gpu_days)
    days = (a100.common_gpu_days or 0) + (a100.generalist_gpu_days or 0)
    assert a100.generalist_gpu_days == pytest.approx(2 * (a100.common_gpu_days or 0))
    assert a100.total_gpu_days == pytest.approx((before.total_gpu_days or 0) + days)
    assert json.loads(json.dumps(as_json(p), allow_nan=False))["generalist"]["levels"] == [0, 0.2]
    text = " ".join(shown(p).split())
    assert f"Generalist: 1,000 steps of 1024 on all clusters: {p.generalist.fraction:.1%} of the training FLOPs" in text
    assert "used at the levels 0 to 0.2." in text
    # The common model's days and the generalist's, in one column.
    (row,) = [line.split() for line in shown(p).splitlines() if line.startswith("a100 ")]
    assert f"{days:.3g}" in row
    assert "Generalist:" not in shown(without)


def test_an_image_counts_the_generalist_where_no_expert_is(hddm: Manifest) -> None:
    def cost(fine: list[float] | None, coarse: list[float] | None, some: int = 8, **sampling: Any) -> dict[str, float]:
        """In evaluations of one network; of 8 experts, `some` have the coarse levels only, the others all."""
        objective = {"prediction": "flow", "schedule": "linear"}
        general = {"objective": {**objective, "levels": fine}}
        parts = [{"cluster": c, "objective": {**objective, "levels": coarse if c < some else None}} for c in range(8)]
        content = hddm.model_dump() | {"experts": parts, "generalist": general}
        content["sampling"] = {"steps": 10, "guidance_scale": 1, "routing": "top-2", **sampling}
        p = plan(Manifest.model_validate(content))
        one, router = p.experts[0].sizes[0].forward_flops, p.router.flops / 3
        return {name: (flops - 10 * router) / one for name, flops in p.sampling.flops.items()}

    # Times 1, 0.9, ..., 0.1: the generalist has the last of them, 0.1.
    assert cost([0, 0.15], [0.15, 1]) == pytest.approx({"top-1": 10, "top-2": 19, "full": 73})
    # An edge belongs to the levels above it, and t = 1 to those that end there.
    assert cost([0, 0.5], [0.5, 1])["full"] == pytest.approx(6 * 8 + 4)
    # Shifted towards noise, no time is below 0.15; guidance evaluates all of them twice.
    assert cost([0, 0.15], [0.15, 1], shift=3.0)["full"] == pytest.approx(80)
    assert cost([0, 0.15], [0.15, 1], guidance_scale=2.0)["full"] == pytest.approx(146)
    # Where half of the clusters have an expert, the other half share the generalist: two random clusters need
    # 2 x 1/2 experts, and it unless both have one.
    half = cost([0, 0.15], [0.15, 1], some=4)
    assert half == pytest.approx({"top-1": 10, "top-2": 18 + 1 + 3 / 4, "full": 72 + 4 + 1 - 1 / 256})
    # Without levels the generalist stands in for no cluster that has an expert.
    assert cost(None, None)["full"] == pytest.approx(80)


def test_an_image_of_a_run_with_few_experts_counts_those(hddm: Manifest) -> None:
    """Clusters without an expert get no weight from the router, so top-1 still evaluates one."""
    some = hddm.model_copy(update={"experts": hddm.experts[:3]})
    p = plan(some)
    one, router = p.experts[0].sizes[0].forward_flops, p.router.flops / 3
    steps, calls = p.sampling.steps, p.sampling.calls
    cost = {name: (flops / steps - router) / (one * calls) for name, flops in p.sampling.flops.items()}
    assert (cost["top-1"], cost["full"]) == (pytest.approx(1), pytest.approx(3))


def test_a_common_model_that_fits_nowhere_or_that_gpus_cannot_share_is_refused(hddm: Manifest) -> None:
    manifest = common_of(hddm, 10)
    assert manifest.common is not None
    wide = manifest.model_copy(update={"common": manifest.common.model_copy(update={"network": {"width": 9216}})})
    with pytest.raises(AtollError, match=r"expert common: .*more than any GPU known has"):
        plan(wide)
    odd = manifest.model_copy(update={"common": manifest.common.model_copy(update={"train": {"batch": 1023}})})
    with pytest.raises(AtollError, match="expert common: a batch of 1023 cannot be divided among 2 GPUs"):
        plan(odd, each=2)
