"""Every autoencoder of diffusers against what its pipelines do with its latents, by small random networks."""

import inspect
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.encoders.codec import build_codec
from atoll.encoders.codec.diffusers import KINDS
from atoll.encoders.codec.extents import EXTENTS, Extent, extent_of
from atoll.encoders.weights import identity
from atoll.errors import AtollError

# The smallest networks of each class. Sides shrink as much as the published ones' only where that costs nothing.
WIDTHS = {"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1}
KL = WIDTHS | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
VIDEO = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True]}
MEANS = {"latents_mean": [0.5, -0.25, 1.0, 0.0], "latents_std": [2.0, 0.5, 1.5, 3.0]}
SIDES = ("encoder", "decoder")
DC = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    **{f"{side}_block_out_channels": (4, 4, 8) for side in SIDES},
    **{f"{side}_layers_per_block": (1, 1, 1) for side in SIDES},
    **{f"{side}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock") for side in SIDES},
    **{f"{side}_qkv_multiscales": ((), (), (5,)) for side in SIDES},
}
ASYMMETRIC = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "down_block_out_channels": (4, 8),
    "up_block_out_channels": (4, 8),
    "norm_num_groups": 2,
}
HUNYUAN = {
    **{"in_channels": 3, "out_channels": 3, "latent_channels": 8, "layers_per_block": 1},
    **{"block_out_channels": (32, 32, 32), "spatial_compression_ratio": 4, "sample_size": 64},
}
RAE = {
    **{"encoder_type": "mae", "encoder_hidden_size": 64, "encoder_patch_size": 4, "encoder_num_hidden_layers": 1},
    **{"decoder_hidden_size": 12, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
    **{"decoder_intermediate_size": 16, "patch_size": 8, "encoder_input_size": 16, "scaling_factor": 0.7},
    **{"latents_mean": [0.25], "latents_std": [1.75]},
}
TINY = {f"{side}_block_out_channels": (8, 8) for side in SIDES} | {f"num_{side}_blocks": (1, 1) for side in SIDES}
KVAE = {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 1)}
# name -> (class, its arguments, the sizes of its latents)
NETWORKS: dict[str, tuple[str, dict[str, Any], Extent]] = {
    "kl": ("AutoencoderKL", {**KL, "scaling_factor": 0.5, **MEANS}, Extent(4, 2)),
    "asymmetric-kl": ("AsymmetricAutoencoderKL", ASYMMETRIC, Extent(4, 2)),
    "tiny": ("AutoencoderTiny", {**TINY, "scaling_factor": 0.6}, Extent(4, 2)),
    "flux2": ("AutoencoderKLFlux2", {**KL, "latent_channels": 3}, Extent(12, 4)),
    "dc": ("AutoencoderDC", {**DC, "scaling_factor": 0.41}, Extent(4, 4)),
    "hunyuan": ("AutoencoderKLHunyuanImage", {**HUNYUAN, "scaling_factor": 0.75}, Extent(8, 4)),
    "qwen": ("AutoencoderKLQwenImage", {**VIDEO, **MEANS}, Extent(4, 4)),
    "wan": ("AutoencoderKLWan", {**VIDEO, **MEANS, "scale_factor_spatial": 4}, Extent(4, 4)),
    "kvae": ("AutoencoderKLKVAE", KVAE, Extent(4, 2)),
    "rae": ("AutoencoderRAE", RAE, Extent(64, 8, 32)),
}


def size_of(name: str) -> tuple[int, int]:
    side = NETWORKS[name][2].side
    return (32, 48) if side is None else (side, side)


def save(name: str, path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Save a random network of the real class as a publisher would; return it in float32, as it is saved."""
    import diffusers

    cls, arguments, _ = NETWORKS[name]
    torch.manual_seed(0)
    network = getattr(diffusers, cls)(**arguments).eval()
    if name == "flux2":  # statistics that show
        network.bn.running_mean.copy_(torch.linspace(-1, 1, 12))
        network.bn.running_var.copy_(torch.linspace(0.5, 4, 12))
    network.to(dtype).save_pretrained(path)
    return network.float()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (directory, network), each made once."""
    root, made = tmp_path_factory.mktemp("codecs"), {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            made[name] = root / name, save(name, root / name)
        return made[name]

    return get


def images_of(name: str, rows: int = 3) -> Tensor:
    return torch.rand(rows, 3, *size_of(name), generator=torch.Generator().manual_seed(1))


def pipeline(name: str, network: Any) -> tuple[Any, Any]:
    """(encode, decode) as diffusers' pipelines do: from images in [-1, 1] to what their transformers read, and back."""
    from diffusers import Flux2Pipeline

    own = network.config
    if name == "flux2":
        this = SimpleNamespace(vae=network, _patchify_latents=Flux2Pipeline._patchify_latents)

        def decode(latents: Tensor) -> Tensor:  # Flux2Pipeline.__call__, after the loop
            mean = network.bn.running_mean.view(1, -1, 1, 1)
            std = torch.sqrt(network.bn.running_var.view(1, -1, 1, 1) + own.batch_norm_eps)
            return network.decode(Flux2Pipeline._unpatchify_latents(latents * std + mean), return_dict=False)[0]

        return lambda x: Flux2Pipeline._encode_vae_image(this, x, None), decode
    if name in ("qwen", "wan"):  # QwenImageImg2ImgPipeline, with the posterior's mean in place of a sample
        mean, std = (torch.tensor(own[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        return (
            lambda x: ((network.encode(x.unsqueeze(2)).latent_dist.mode() - mean) * (1 / std))[:, :, 0],
            lambda z: network.decode(z.unsqueeze(2) / (1 / std) + mean, return_dict=False)[0][:, :, 0],
        )
    if name == "rae":  # reads and returns images in [0, 1]
        return lambda x: network.encode((x + 1) / 2).latent, lambda z: 2 * network.decode(z).sample - 1
    factor = own.get("scaling_factor", 1.0)
    if name == "kl":  # StableDiffusionXLPipeline: a mean and a deviation beside the factor
        mean, std = (torch.tensor(own[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        return (
            lambda x: (network.encode(x).latent_dist.mode() - mean) * factor / std,
            lambda z: network.decode(z * std / factor + mean, return_dict=False)[0],
        )
    # StableDiffusion's, Sana's, HunyuanImage's.
    latent = {"dc": lambda x: network.encode(x).latent, "tiny": lambda x: network.encode(x).latents}
    encode = latent.get(name, lambda x: network.encode(x).latent_dist.mode())
    return lambda x: encode(x) * factor, lambda z: network.decode(z / factor, return_dict=False)[0]


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_latents_and_images_are_those_of_the_pipelines(saved, name) -> None:
    path, network = saved(name)
    codec, extent, images = build_codec({"name": name, "weights": str(path)}), NETWORKS[name][2], images_of(name)
    encode, decode = pipeline(name, network)
    latents, (height, width) = codec.encode(images), size_of(name)
    assert (codec.channels, codec.factor, codec.image_channels) == (extent.channels, extent.factor, 3)
    assert latents.shape == (3, extent.channels, height // extent.factor, width // extent.factor)
    torch.testing.assert_close(latents, encode(2 * images - 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(codec.encode(images), latents)  # nothing is drawn
    expected = ((decode(latents) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(codec.decode(latents), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-3
    # A latent of one image does not depend on the others.
    torch.testing.assert_close(codec.encode(images[1:2]), latents[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "rae"])
def test_several_sizes_go_through_one_codec(saved, name) -> None:
    codec = build_codec({"name": name, "weights": str(saved(name)[0])})
    for height, width in ((16, 32), (32, 16), (16, 16)):
        latents = codec.encode(torch.rand(2, 3, height, width))
        assert latents.shape[2:] == (height // codec.factor, width // codec.factor)
        assert codec.decode(latents).shape == (2, 3, height, width)


@pytest.mark.parametrize("name", NETWORKS)
def test_sides_that_do_not_fit_are_refused_in_one_line(saved, name) -> None:
    codec, (height, width) = build_codec({"name": name, "weights": str(saved(name)[0])}), size_of(name)
    with pytest.raises(AtollError, match=rf"the codec '{name}' takes .*got {height} x {width - 1}: set data.size to"):
        codec.encode(torch.rand(1, 3, height, width - 1))


def test_a_codec_of_one_size_names_it(saved) -> None:
    codec = build_codec({"name": "rae", "weights": str(saved("rae")[0])})
    with pytest.raises(AtollError, match=r"takes images of 32 x 32 alone; got 64 x 32: set data\.size to 32"):
        codec.encode(torch.rand(1, 3, 64, 32))
    with pytest.raises(AtollError, match=r"decodes latents of 4 x 4 alone; got 4 x 8: set data\.size to 32"):
        codec.decode(torch.rand(1, 64, 4, 8))


@pytest.mark.parametrize("name", ["flux2", "dc", "qwen"])
@torch.no_grad()
def test_half_precision_weights_are_computed_in_float32(tmp_path, name) -> None:
    network = save(name, tmp_path, torch.bfloat16)
    assert torch.bfloat16 in {tensor.dtype for tensor in load_file(next(tmp_path.glob("*.safetensors"))).values()}
    codec, images = build_codec({"name": name, "weights": str(tmp_path)}), images_of(name)
    encode, decode = pipeline(name, network)
    latents = codec.encode(images)
    torch.testing.assert_close(latents, encode(2 * images - 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.decode(latents), ((decode(latents) + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5)
    # In bf16 the constants stay what they were.
    config = codec.config()
    rough = codec.to(dtype=torch.bfloat16).encode(images)
    assert codec.config() == config
    assert rough.dtype == torch.float32
    assert 0 < (rough - latents).abs().mean() < 0.1 * latents.std() + 0.02


def test_flux2_constants_are_those_of_the_batch_norm(saved) -> None:
    path, network = saved("flux2")
    config = build_codec({"name": "flux2", "weights": str(path)}).to(dtype=torch.bfloat16).config()
    mean, variance = network.bn.running_mean.double(), network.bn.running_var.double()
    assert config["shift"] == mean.tolist()
    torch.testing.assert_close(torch.tensor(config["scale"]).double(), 1 / (variance + 1e-4).sqrt(), rtol=1e-7, atol=0)
    # The packed latent by hand: channel c of offset (i, j) within a patch is at 4 c + 2 i + j.
    z = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    identical = SimpleNamespace(
        config=SimpleNamespace(patch_size=(2, 2)),
        encode=lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x)),
        decode=lambda x: SimpleNamespace(sample=x),
    )
    pack, unpack = KINDS["flux2"].steps(identical)
    packed = pack((z + 1) / 2)
    assert packed.shape == (2, 12, 2, 3)
    assert packed[1, 4 * 2 + 2 * 1 + 0, 1, 2] == z[1, 2, 3, 4]
    assert torch.equal(2 * unpack(packed) - 1, z)


def test_a_codec_of_video_decodes_in_several_threads(saved) -> None:
    """The network keeps features of earlier frames in itself; evaluation decodes with a pool of threads."""
    codec = build_codec({"name": "wan", "weights": str(saved("wan")[0])})
    latents = [torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    expected = [codec.decode(one) for one in latents]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(codec.decode, latents), expected, strict=True):
            assert torch.equal(one, other)


def test_a_config_without_a_scale_has_none(tmp_path) -> None:
    """AutoencoderDC's default is 1, not Sana's 0.41407."""
    import diffusers

    diffusers.AutoencoderDC(**DC).save_pretrained(tmp_path)
    config = build_codec({"name": "dc", "weights": str(tmp_path)}).config()
    assert (config["shift"], config["scale"]) == (0.0, 1.0)


@pytest.mark.parametrize("name", ["flux2", "qwen", "rae"])
def test_a_card_of_another_machine_builds_the_same_codec(saved, tmp_path, name) -> None:
    path, _ = saved(name)
    codec = build_codec({"name": name, "weights": str(path)})
    card = json.loads(json.dumps(codec.config()))
    shutil.copytree(path, tmp_path / "there")
    again = build_codec({**card, "weights": str(tmp_path / "there")})
    assert identity(again.config()) == identity(card)
    assert torch.equal(again.encode(images_of(name)), codec.encode(images_of(name)))


@pytest.mark.parametrize("name", NETWORKS)
def test_another_class_is_refused_by_name(saved, name) -> None:
    other = "tiny" if name != "tiny" else "kl"
    with pytest.raises(AtollError, match=rf"says '{NETWORKS[other][0]}'; expected one of {NETWORKS[name][0]}"):
        build_codec({"name": name, "weights": str(saved(other)[0])})


def test_images_of_other_channels_are_refused(tmp_path) -> None:
    """Video with transparency, say."""
    import diffusers

    diffusers.AutoencoderKLWan(**VIDEO, **MEANS, in_channels=4, out_channels=4).save_pretrained(tmp_path)
    with pytest.raises(AtollError, match="takes images of 4 channels; expected a codec of 1 or 3"):
        build_codec({"name": "wan", "weights": str(tmp_path)})


def test_weights_without_the_batch_norm_are_refused(saved, tmp_path) -> None:
    shutil.copytree(saved("flux2")[0], tmp_path / "flux2")
    file = tmp_path / "flux2" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("bn.")}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AtollError, match=r"not in its weights \(first: bn\."):
        build_codec({"name": "flux2", "weights": str(tmp_path / "flux2")})


def test_every_kind_has_its_sizes_and_is_tested() -> None:
    assert set(KINDS) == set(EXTENTS) == set(NETWORKS)
    assert {name: kind.cls for name, kind in KINDS.items()} == {name: entry[0] for name, entry in NETWORKS.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_follow_from_config_json_alone(saved, name) -> None:
    assert extent_of(name, json.loads((saved(name)[0] / "config.json").read_text())) == NETWORKS[name][2]


PUBLISHED = {
    **{"kl": Extent(4, 8), "asymmetric-kl": Extent(4, 8), "tiny": Extent(4, 8), "hunyuan": Extent(64, 32)},
    **{"flux2": Extent(128, 16), "dc": Extent(32, 32), "qwen": Extent(16, 8), "wan": Extent(16, 8)},
    **{"kvae": Extent(16, 8), "rae": Extent(768, 16, 256)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_a_config_the_sizes_are_the_published_ones(name) -> None:
    import diffusers

    assert extent_of(name, {}) == PUBLISHED[name]
    # Where the class has the published network's sizes as defaults, they agree.
    if name in ("flux2", "dc", "qwen", "wan", "kvae", "rae"):
        parameters = inspect.signature(getattr(diffusers, NETWORKS[name][0]).__init__).parameters.values()
        defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
        assert extent_of(name, defaults) == PUBLISHED[name]


def test_the_name_of_an_autoencoder_dc_says_its_sizes() -> None:
    assert extent_of("dc", {}, "mit-han-lab/dc-ae-f64c128-in-1.0-diffusers") == Extent(128, 64)
    assert extent_of("dc", {"latent_channels": 7}, "mit-han-lab/dc-ae-f64c128") == Extent(7, 32)
