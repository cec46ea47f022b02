"""PRX, SD3, Sana, Lumina2, FLUX and FLUX.2 kept as experts: a transformer's directory, or a whole pipeline's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from atoll.assemble import assemble
from atoll.condition import Condition
from atoll.convert import convert
from atoll.convert.foreign import keep
from atoll.convert.kind import CLASSES
from atoll.encoders.text import build_encoder
from atoll.ensemble.loading import load_ensemble, load_expert
from atoll.errors import AtollError
from atoll.nn import build_network
from atoll.solver import sample
from atoll.storage.artifact import WEIGHTS, read_card
from atoll.storage.cards import ExpertCard
from tests.convert import test_foreign as kept
from tests.encoders.text import small_models
from tests.encoders.text.test_joint import save_wide_t5, split
from tests.encoders.text.test_text import save_clip
from tests.nn.foreign_small import GUIDANCE, MASKED, SMALL, TEXT, condition_for, small

diffusers = pytest.importorskip("diffusers")

PRX, SD3, SANA = (f"{name}Transformer2DModel" for name in ("PRX", "SD3", "Sana"))
LUMINA2, FLUX, FLUX2 = (f"{name}Transformer2DModel" for name in ("Lumina2", "Flux", "Flux2"))
HASH = {"name": "hash", "dim": TEXT, "length": 5}
SIZE = (8, 8)


def saved(root: Path, cls: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A small network of random weights, written by diffusers to `root`."""
    network = getattr(diffusers, cls)(**SMALL[cls] | changes)
    network.load_state_dict(small(cls, **changes).network.state_dict())
    network.to(dtype).eval().requires_grad_(False).save_pretrained(root)
    return network


def save_sd3_text(root: Path) -> None:
    for number in ("", "_2"):
        save_clip(root / f"text_encoder{number}")
    save_wide_t5(root / "text_encoder_3")
    for number in ("", "_2", "_3"):
        split(root / f"text_encoder{number}", number)


def save_flux_text(root: Path) -> None:
    save_clip(root / "text_encoder")
    save_wide_t5(root / "text_encoder_2")
    for number in ("", "_2"):
        split(root / f"text_encoder{number}", number)


# class -> the pipeline's class, its text encoders, and the transformer's widths that fit them.
PIPELINES: dict[str, tuple[str, Callable[[Path], None], dict[str, Any]]] = {
    PRX: ("PRXPipeline", small_models.save_t5gemma, {"context_in_dim": 16}),
    SD3: ("StableDiffusion3Pipeline", save_sd3_text, {"joint_attention_dim": 40, "pooled_projection_dim": 20}),
    SANA: ("SanaPipeline", small_models.save_gemma2, {"caption_channels": 16}),
    LUMINA2: ("Lumina2Pipeline", small_models.save_gemma2, {"cap_feat_dim": 16, "axes_lens": [300, 16, 16]}),
    FLUX: ("FluxPipeline", save_flux_text, {"joint_attention_dim": 40, "pooled_projection_dim": 16}),
    FLUX2: ("Flux2KleinPipeline", small_models.save_qwen3, {"joint_attention_dim": 48, "guidance_embeds": False}),
}


def save_pipeline(root: Path, cls: str, **index: Any) -> nn.Module:
    """A pipeline's directory with small networks; return its transformer."""
    pipeline, save_text, widths = PIPELINES[cls]
    transformer = saved(root / "transformer", cls, **widths)
    save_text(root)
    channels = 16 if cls == FLUX2 else 4
    torch.manual_seed(0)
    codec = diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    codec.save_pretrained(root / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(json.dumps({"_class_name": pipeline, "default_sample_size": 16} | index))
    return transformer


@pytest.mark.parametrize("cls", PIPELINES)
def test_a_pipelines_directory_becomes_an_expert_that_samples(cls, tmp_path, monkeypatch) -> None:
    """Codec, text encoder, objective and size follow from the directory."""
    monkeypatch.setattr("atoll.encoders.text.language_model._cleaner", lambda: None)  # needs the package ftfy
    transformer = save_pipeline(tmp_path / "pipeline", cls)
    size = None if cls in (PRX, SD3, SANA, LUMINA2) else SIZE  # FLUX's default is 1024 pixels
    out = keep(tmp_path / "pipeline", tmp_path / "e", size=size)
    card = read_card(out, ExpertCard).plain()
    kind = card["conversion"]["kind"]
    assert CLASSES[kind] == card["network"]["class"] == cls
    assert card["latent_shape"][1:] == [8, 8]
    assert (card["codec"]["name"], card["codec"]["shift"], card["codec"]["scale"]) == ("kl", 0.1, 0.5)
    assert len(card["codec"]["sha256"]) == len(card["condition"]["sha256"]) == 64
    assert (card["objective"]["prediction"], card["objective"]["schedule"]["name"]) == ("flow", "linear")
    # As every ensemble is loaded and sampled.
    loaded = load_ensemble(out, trust_paths=True)
    (condition,) = loaded.encoder(["red moss", ""])
    x = torch.randn(2, *loaded.latent_shape, generator=torch.Generator().manual_seed(0))
    got = loaded.ensemble.velocity(x, torch.tensor([0.3, 0.8]), condition)
    network = build_network(card["network"]).eval()
    network.network.load_state_dict(transformer.state_dict())
    time = torch.tensor([0.3, 0.8]) * card["objective"]["time_scale"]
    with torch.no_grad():
        torch.testing.assert_close(got, network(x, time, condition), rtol=1e-4, atol=1e-4)
    latents = sample(lambda x, t: loaded.ensemble.velocity(x, t, condition, 2.0), x, steps=2)
    assert loaded.codec.decode(latents).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("cls", SMALL)
def test_a_transformers_directory_alone(cls, tmp_path, atoll) -> None:
    """The text encoder is named by the user; FLUX's and FLUX.2's need vectors or masks that `hash` lacks."""
    theirs = saved(tmp_path / "t", cls)
    flags = ["--keep", "-o", "e", "--condition", f"hash,dim={TEXT},length=5", "--codec", "pixels"]
    sized = "sample_size" in SMALL[cls]
    flags = [*flags[:5], *([] if sized else ["--size", "8x8"])]
    code, text, error = atoll("convert", tmp_path / "t", *flags)
    if cls not in MASKED:
        assert code == 2
        assert len(error.strip().splitlines()) == 1
        expected = "its pooled vector is 10, does not fit" if cls in (SD3, FLUX) else "pads captions, and Flux2"
        assert expected in error
        assert not Path("e").exists()
        return
    kind = next(kind for kind, name in CLASSES.items() if name == cls)
    assert (code, text, error) == (0, f"e written: from {kind}, flow on linear, kept (exact)\n", "")
    network = load_expert("e").expert.network
    x, condition = torch.randn(3, 4, 8, 8), condition_for(network)
    got = network(x, torch.tensor([0.1, 0.5, 0.9]), condition)
    network.network = theirs
    torch.testing.assert_close(got, network(x, torch.tensor([0.1, 0.5, 0.9]), condition), rtol=1e-4, atol=1e-4)


def test_the_guidance_that_flux_embeds_is_in_the_card(tmp_path, atoll) -> None:
    saved(tmp_path / "t", FLUX, joint_attention_dim=40, pooled_projection_dim=16)
    save_flux_text(tmp_path / "text")
    condition = {"name": "flux", "weights": str(tmp_path / "text"), "length": 6}
    out = keep(tmp_path / "t", tmp_path / "e", condition=condition, size=(8, 12))
    network = read_card(out, ExpertCard).network
    assert (network["guidance"], network["size"]) == (GUIDANCE, [8, 12])
    flags = ("--keep", "--size", "8", "--condition", f"flux,weights={tmp_path / 'text'},length=6", "-o")
    code, text, _ = atoll("convert", tmp_path / "t", *flags, "f", "--guidance", 2)
    assert (code, text) == (0, "f written: from flux, flow on linear, kept (exact), guidance 2 embedded\n")
    saved(tmp_path / "plain", FLUX, joint_attention_dim=40, pooled_projection_dim=16, guidance_embeds=False)
    code, _, error = atoll("convert", tmp_path / "plain", *flags, "g", "--guidance", 2)
    assert code == 2
    assert "guidance 2, but this network embeds none" in error
    code, _, error = atoll("convert", tmp_path / "t", "-o", "h", "--guidance", 2)
    assert "--guidance is for a network that is kept; add --keep" in error
    assert not Path("g").exists()


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)],
)
def test_bfloat16_weights_stay_bfloat16(tmp_path, stored, dtype) -> None:
    """Others become float32: the float16 of a file is for GPUs, and overflows."""
    saved(tmp_path / "t", SD3, stored)
    network = small(SD3)
    condition = condition_for(network, 1)
    encoder = {"name": "hash", "dim": TEXT, "length": 5}
    with pytest.raises(AtollError, match="its pooled vector is 10, does not fit"):
        keep(tmp_path / "t", tmp_path / "e", condition=encoder)
    saved(tmp_path / "p", PRX, stored)
    out = keep(tmp_path / "p", tmp_path / "e", condition=encoder, size=SIZE)
    with safe_open(out / WEIGHTS, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118  # no mapping
    x, exact = torch.randn(1, 4, 8, 8), small(PRX)
    got = load_expert(out).expert.network(x, torch.tensor([0.4]), condition)
    expected = exact(x, torch.tensor([0.4]), condition)
    assert got.dtype == torch.float32
    assert (got - expected).norm() / expected.norm() < 0.05


def test_two_saves_in_one_directory_are_refused(tmp_path) -> None:
    """diffusers follows a stale index, transformers an old whole file: neither tells."""
    saved(tmp_path / "t", PRX).save_pretrained(tmp_path / "t", max_shard_size="8KB")
    for make in (keep, convert):
        with pytest.raises(AtollError, match=r"index\.json with its shards, and diffusion_.*: two saves, perhaps of"):
            make(tmp_path / "t", tmp_path / "e", condition=HASH)
    (tmp_path / "t" / "diffusion_pytorch_model.safetensors").unlink()
    assert keep(tmp_path / "t", tmp_path / "e", condition=HASH, size=SIZE).is_dir()


def test_without_keep_there_is_nothing_to_convert_to(tmp_path, atoll) -> None:
    saved(tmp_path / "t", SANA)
    code, _, error = atoll("convert", tmp_path / "t", "-o", "e", "--condition", "hash,dim=10")
    assert code == 2
    assert "a SanaTransformer2DModel has no counterpart among Atoll's networks; keep it as it is: add --keep" in error


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "img_in.weight"], r"a FluxTransformer2DModel in its original layout"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], r"a SD3Transformer2DModel in its original"),
        (
            ["x_embedder.proj.weight", "t_block.1.weight", "blocks.0.mlp.inverted_conv.conv.weight"],
            r"a SanaTransformer2DModel in its original layout; .*from_single_file\(\.\.\.\)\.save_pretrained\(DIR\)",
        ),
    ],
)
@pytest.mark.parametrize("make", [keep, convert])
def test_original_layouts_are_refused_by_name(tmp_path, names, message, make) -> None:
    torch.save({name: torch.ones(2, 2) for name in names}, tmp_path / "x.pth")
    with pytest.raises(AtollError, match=message):
        make(tmp_path / "x.pth", tmp_path / "e", condition=HASH)


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "PRXPixelPipeline"}, r"is no expert of an ensemble: its noise has"),
        ("model_index.json", {"default_sample_size": None}, r"nothing tells the size of its latents; say it \(--size"),
        ("vae/config.json", {"_class_name": "VQModel"}, r"a VQModel; name the codec \(--codec\), one of kl, asymm"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "epsilon"},
            r"DPMSolverMultistepScheduler with prediction_type 'epsilon'; expected a flow",
        ),
        ("transformer/config.json", {"context_in_dim": 12}, r"txt_in\.weight: float32 \[16, 16\], expected \[16, 12\]"),
        ("transformer/config.json", {"rotary": True}, r"got rotary True, which PRXTransformer2DModel does not know"),
        ("transformer/config.json", {"_class_name": "UNet2DConditionModel"}, r"names a UNet2DConditionModel; "),
    ],
)
def test_what_does_not_fit_is_named(pipeline, tmp_path, file, changes, message) -> None:
    root = tmp_path / "pipeline"
    shutil.copytree(pipeline, root)
    _edit(root / file, **changes)
    with pytest.raises(AtollError, match=message) as raised:
        keep(root, tmp_path / "e", condition=HASH | {"dim": 16})
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "e").exists()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prx") / "pipeline"
    save_pipeline(root, PRX)
    return root


def test_a_sana_with_a_factor_of_its_times(tmp_path) -> None:
    saved(tmp_path / "t", SANA, timestep_scale=0.001)
    out = keep(tmp_path / "t", tmp_path / "e", condition=HASH)
    assert read_card(out, ExpertCard).objective["time_scale"] == 1.0
    flow = {"prediction": "flow", "schedule": "linear", "time_scale": 999.0}
    with pytest.raises(AtollError, match=r"time_scale: got 999; a 'sana' reads time as 0\.\.1: set time_scale: 1"):
        keep(tmp_path / "t", tmp_path / "f", condition=HASH, objective=flow)


def test_a_native_expert_a_prx_and_an_eps_pixart_sample_as_one(tmp_path) -> None:
    """Three networks, two objectives and three text encoders over one latent."""
    told = {"codec": kept.PIXELS, "assignment": "these", "k": 3}
    saved(tmp_path / "prx", PRX, in_channels=kept.C)
    kept.saved(tmp_path / "pixart", **kept.PIXART)
    experts = [
        kept.native(tmp_path / "native", 0, k=3),
        keep(tmp_path / "prx", tmp_path / "p", condition=HASH | {"seed": 1}, size=SIZE, clusters=(1,), **told),
        keep(tmp_path / "pixart", tmp_path / "x", condition=HASH | {"length": 7}, clusters=(2,), **told),
    ]
    out = assemble(experts, kept.router(tmp_path / "router", k=3), tmp_path / "ensemble")
    with pytest.warns(UserWarning, match="x: an eps-expert without calibration"):
        loaded = load_ensemble(out, routing="full", strict=True, trust_paths=True)
    assert len(loaded.encoder.encoders) == 3
    conditions = loaded.encoder(["moss", "", "red rust in the rain"])
    x, t = torch.randn(3, kept.C, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([0.2, 0.5, 1.0])
    # The router of the test finds all clusters alike likely, so the ensemble is the mean of its experts.
    parts = [expert.velocity(x, t, conditions[expert.encoder]) for expert in loaded.ensemble.experts]
    torch.testing.assert_close(loaded.ensemble.velocity(x, t, conditions), sum(parts) / 3, rtol=1e-4, atol=1e-4)
    latents = sample(lambda x, t: loaded.ensemble.velocity(x, t, conditions, 3.0), x, steps=4)
    assert latents.isfinite().all()
    # Without one of the encoders' widths, the network says which it needs.
    narrow = Condition(torch.randn(3, 5, 4), torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(AtollError, match=r"condition states: got 4 wide, expected 10; use the encoder that"):
        loaded.ensemble.velocity(x, t, (conditions[0], narrow, conditions[2]))


def test_a_named_encoder_goes_before_the_pipelines_own(pipeline, tmp_path) -> None:
    own = {"name": "hash", "dim": 16, "length": 5, "seed": 2}
    out = keep(pipeline, tmp_path / "f", condition=own)
    assert build_encoder(read_card(out, ExpertCard).condition).config() == own
