"""Codecs: pixels, and small random networks of diffusers, loaded like any other."""

import io
import json
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from atoll.encoders.codec import NetworkCodec, PixelCodec, build_codec
from atoll.encoders.weights import identity
from atoll.errors import AtollError
from atoll.nn import taef2
from atoll.storage.artifact import sha256_file

DATA = Path(__file__).parents[3].parent / "shared" / "data"
STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_round_trip(channels) -> None:
    codec = PixelCodec(channels, shift=0.7, scale=1.6)
    images = torch.rand(2, channels, 4, 6)
    latents = codec.encode(images)
    assert latents.shape == (2, codec.channels, 4 // codec.factor, 6 // codec.factor)
    torch.testing.assert_close(latents, (2 * images - 1 - 0.7) * 1.6)
    torch.testing.assert_close(codec.decode(latents), images)


def test_shift_and_scale_standardise_the_data() -> None:
    images = torch.rand(64, 1, 8, 6) ** 3
    data = 2 * images - 1
    latents = PixelCodec(1, float(data.mean()), float(1 / data.std())).encode(images)
    assert latents.mean().abs() < 1e-5
    assert abs(latents.std() - 1) < 1e-5


def test_decoded_pixels_are_clamped() -> None:
    assert PixelCodec().decode(torch.tensor([[[[-9.0, 0.0, 9.0]]]])).flatten().tolist() == [0, 0.5, 1]


def test_the_wrong_channels_are_refused_with_the_fix() -> None:
    with pytest.raises(AtollError, match=r"3 channels.*set to 1.*codec.channels to 3"):
        PixelCodec(1).encode(torch.rand(2, 3, 4, 5))


def test_build_codec_round_trip() -> None:
    codec = PixelCodec(3, shift=0.5, scale=2.0)
    again = build_codec(codec.config())
    assert again.config() == codec.config() == {"name": "pixels", "channels": 3, "shift": 0.5, "scale": 2.0}
    assert build_codec({"name": "pixels"}).config() == {"name": "pixels", "channels": 1, "shift": 0.0, "scale": 1.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "jpeg"}, "'jpeg'.*'pixels'"),
        ({"name": ["pixels"]}, "unknown codec"),
        ({"name": "kl"}, "codec 'kl': weights: missing; set it to a local path"),
        ({"name": "kl", "weights": "x", "scale": [1.0, 0.0]}, "scale"),
        ({"name": "kl", "weights": "x", "subfolder": "../vae"}, "subfolder"),
        ({"name": "kl", "weights": "x", "sha256": "abc"}, "sha256"),
        ({"name": "taef2", "weights": "/no/such/place"}, "/no/such/place.*not found"),
        ({"name": "pixels", "channels": 2}, "channels"),
        ({"name": "pixels", "scale": 0}, "scale"),
        ({"name": "pixels", "shift": float("nan")}, "shift"),
        ({"name": "pixels", "size": 3}, "size"),
    ],
)
def test_build_codec_refuses_bad_configs(config, message) -> None:
    with pytest.raises(AtollError, match=message):
        build_codec(config)


def test_pixels_have_channels_and_can_be_moved() -> None:
    codec = PixelCodec(3)
    assert codec.image_channels == codec.channels == 3
    assert codec.to("cpu", torch.bfloat16) is codec


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    """Whatever is local is loaded without the hub and without a connection."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("ATOLL_WEIGHTS", raising=False)


def save_kl(path: Path, **options: object) -> Path:
    """A small AutoencoderKL, 4x down, 3 channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"block_out_channels": (4, 4, 8), "norm_num_groups": 2, "latent_channels": 3}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    AutoencoderKL(**blocks, **kinds, **options).save_pretrained(path)
    return path


def save_tiny(path: Path, **options: object) -> Path:
    """A small AutoencoderTiny, 2x down, 4 channels."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    sizes = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    counts = {f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")}
    AutoencoderTiny(**sizes, **counts, **options).save_pretrained(path)
    return path


def save_taef2(path: Path, suffix: str = ".pth", channels: int = 6) -> Path:
    """A narrow TAEF2 under the keys of its files."""
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    back = {ours: theirs for theirs, ours in taef2._PARTS.items()}
    for part, module in (("encoder", taef2.TAEF2Encoder(4, channels)), ("decoder", taef2.TAEF2Decoder(4, 6))):
        numbers = {name: i for i, name in enumerate(module.LAYERS) if name}
        tensors = {}
        for name, value in module.state_dict().items():
            layer = next(layer for layer in numbers if name.startswith(layer + "."))
            inner, _, kind = name[len(layer) + 1 :].rpartition(".")
            tensors[".".join(filter(None, [str(numbers[layer]), back.get(inner, ""), kind]))] = value.half()
        file = path / f"taef2_{part}{suffix}"
        save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    return path


SAVE = {"kl": save_kl, "tiny": save_tiny, "taef2": save_taef2}


def images_of(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("quant", [True, False])
def test_kl_latents_are_the_shifted_scaled_posterior_mean(tmp_path, quant) -> None:
    from diffusers import AutoencoderKL

    path = save_kl(tmp_path, scaling_factor=0.36, shift_factor=0.12, use_quant_conv=quant, use_post_quant_conv=quant)
    codec, direct = build_codec({"name": "kl", "weights": str(path)}), AutoencoderKL.from_pretrained(path)
    images = images_of(2, 3, 16, 24)
    latents = codec.encode(images)
    assert (codec.channels, codec.factor, codec.image_channels) == (3, 4, 3)
    assert (latents.shape, latents.dtype) == ((2, 3, 4, 6), torch.float32)
    with torch.no_grad():
        expected = (direct.encode(2 * images - 1).latent_dist.mean - 0.12) * 0.36
        torch.testing.assert_close(latents, expected)
        decoded = (direct.decode(latents / 0.36 + 0.12).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(codec.decode(latents), decoded)
    assert torch.equal(codec.encode(images), latents)  # nothing is drawn
    config = codec.config()
    assert (config["shift"], config["scale"]) == (0.12, 0.36)


def test_kl_uses_a_mean_and_deviation_per_channel(tmp_path) -> None:
    """As diffusers' SDXL pipeline: z = latent * std / scaling_factor + mean."""
    mean, std = [0.5, -1.0, 2.0], [2.0, 4.0, 0.5]
    path = save_kl(tmp_path, scaling_factor=0.5, latents_mean=mean, latents_std=std)
    codec = build_codec({"name": "kl", "weights": str(path)})
    plain = build_codec({"name": "kl", "weights": str(path), "shift": 0.0, "scale": 1.0})
    images = images_of(2, 3, 8, 12)
    z = codec.encode(images) * torch.tensor(std).reshape(3, 1, 1) / 0.5 + torch.tensor(mean).reshape(3, 1, 1)
    torch.testing.assert_close(plain.encode(images), z)
    assert codec.config()["scale"] == [0.25, 0.125, 1.0]


def test_tiny_equals_diffusers(tmp_path) -> None:
    from diffusers import AutoencoderTiny

    path = save_tiny(tmp_path, scaling_factor=0.7, shift_factor=0.2)
    codec, direct = build_codec({"name": "tiny", "weights": str(path)}), AutoencoderTiny.from_pretrained(path)
    images = images_of(3, 3, 8, 12)
    latents = codec.encode(images)
    assert (codec.channels, codec.factor, latents.shape) == (4, 2, (3, 4, 4, 6))
    with torch.no_grad():
        torch.testing.assert_close(latents, (direct.encode(2 * images - 1).latents - 0.2) * 0.7)
        decoded = (direct.decode(latents / 0.7 + 0.2).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(codec.decode(latents), decoded)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_taef2_equals_its_networks(tmp_path, suffix) -> None:
    codec = build_codec({"name": "taef2", "weights": str(save_taef2(tmp_path, suffix))})
    file = tmp_path / f"taef2_encoder{suffix}"
    tensors = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)
    images = images_of(2, 3, 16, 24)
    with torch.no_grad():
        expected = taef2.load_encoder(tensors, "")(images)
    assert (codec.channels, codec.factor, expected.shape) == (6, 8, (2, 6, 2, 3))
    torch.testing.assert_close(codec.encode(images), expected)
    assert codec.decode(expected).shape == images.shape


def test_halves_of_different_autoencoders_are_refused(tmp_path) -> None:
    with pytest.raises(AtollError, match=r"the encoder returns 5 channels, the decoder takes 6"):
        build_codec({"name": "taef2", "weights": str(save_taef2(tmp_path, channels=5))})


@pytest.mark.parametrize("name", SAVE)
def test_a_codec_is_built_from_its_card_on_another_machine(tmp_path, name) -> None:
    codec = build_codec({"name": name, "weights": str(SAVE[name](tmp_path / "here"))})
    card = json.loads(json.dumps(codec.config()))
    assert card == codec.config()
    shutil.move(tmp_path / "here", tmp_path / "there")
    again = build_codec({**card, "weights": str(tmp_path / "there")})
    assert again.config() != card
    assert identity(again.config()) == identity(card)
    images = images_of(2, 3, 16, 24)
    assert torch.equal(again.encode(images), codec.encode(images))
    with pytest.raises(AtollError, match=r"have sha256 .*, the config expects 00000000"):
        build_codec({**again.config(), "sha256": "0" * 64})


@pytest.mark.parametrize("name", SAVE)
def test_constants_per_channel_give_latents_of_unit_variance(tmp_path, name) -> None:
    config = {"name": name, "weights": str(SAVE[name](tmp_path))}
    images = images_of(5, 3, 32, 24)
    z = build_codec({**config, "shift": 0.0, "scale": 1.0}).encode(images)
    shift, scale = z.mean((0, 2, 3)).tolist(), (1 / z.std((0, 2, 3))).tolist()
    codec = build_codec({**config, "shift": shift, "scale": scale})
    latents = codec.encode(images)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(codec.channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(codec.channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(codec.decode(latents), build_codec({**config, "shift": 0.0, "scale": 1.0}).decode(z))
    with pytest.raises(AtollError, match=rf"codec '{name}': shift has 2 values; expected one, or one for each of the"):
        build_codec({**config, "shift": [0.0, 1.0]})


@pytest.mark.parametrize("name", SAVE)
def test_a_codec_is_frozen_in_any_dtype_and_batch(tmp_path, name, monkeypatch) -> None:
    codec = build_codec({"name": name, "weights": str(SAVE[name](tmp_path))})
    images = images_of(5, 3, 16, 24).requires_grad_()
    latents = codec.encode(images)
    assert not latents.requires_grad
    assert latents.is_contiguous()
    monkeypatch.setattr("atoll.encoders.codec.autoencoder.CPU_PIXELS", 2 * 16 * 24)  # two images at a time
    torch.testing.assert_close(codec.encode(images), latents)
    torch.testing.assert_close(codec.encode(images)[3:4], codec.encode(images[3:4]))
    assert codec.to("cpu", torch.bfloat16) is codec
    rough = codec.encode(images)
    assert rough.dtype == codec.decode(rough).dtype == torch.float32
    assert 0 < (rough - latents).abs().max() < 0.05 * latents.std() + 0.05
    wild = codec.decode(1e3 * torch.randn(2, codec.channels, 2, 3))
    assert wild.min() >= 0
    assert wild.max() <= 1


@pytest.mark.parametrize("name", SAVE)
def test_images_of_the_wrong_size_or_channels_are_refused(tmp_path, name) -> None:
    codec = build_codec({"name": name, "weights": str(SAVE[name](tmp_path))})
    with pytest.raises(AtollError, match=rf"'{name}' takes images of 3 channels; got 1"):
        codec.encode(torch.rand(2, 1, 16, 24))
    with pytest.raises(AtollError, match=rf"multiples of {codec.factor}; got 17 x 24: set data.size to 16"):
        codec.encode(torch.rand(2, 3, 17, 24))


def test_a_codec_in_a_pipelines_subfolder_is_loaded(tmp_path) -> None:
    save_kl(tmp_path / "vae")
    whole = build_codec({"name": "kl", "weights": str(tmp_path), "subfolder": "vae"})
    alone = build_codec({"name": "kl", "weights": str(tmp_path / "vae")})
    assert identity(whole.config()) == identity(alone.config())
    with pytest.raises(AtollError, match=rf"no {STEM}.safetensors; name a directory \(or its subfolder\)"):
        build_codec({"name": "kl", "weights": str(tmp_path)})


def test_another_autoencoder_is_refused(tmp_path) -> None:
    save_tiny(tmp_path)
    with pytest.raises(AtollError, match=r"says 'AutoencoderTiny'; expected one of AutoencoderKL"):
        build_codec({"name": "kl", "weights": str(tmp_path)})


@pytest.mark.parametrize("damage", ["cut", "missing", "config"])
def test_damaged_weights_are_refused(tmp_path, damage) -> None:
    file = save_kl(tmp_path) / f"{STEM}.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "missing":
        tensors = load_file(file)
        del tensors["encoder.conv_in.weight"]
        save_file(tensors, file, {"format": "pt"})
    else:
        (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "block_out_channels": [3]}')
    with pytest.raises(
        AtollError, match=r"cannot be loaded|is cut off: |1 of the network's tensors.*encoder\.conv_in"
    ) as caught:
        build_codec({"name": "kl", "weights": str(tmp_path)})
    assert "\n" not in str(caught.value)


class Bomb:
    """Executes when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("content", [b"", b"no pickle", "bomb", "list"])
def test_a_pickle_executes_nothing(tmp_path, content, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = save_taef2(tmp_path) / "taef2_encoder.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save({"0.weight": Bomb()} if content == "bomb" else [torch.zeros(1)], file)
    with pytest.raises(AtollError, match=r"taef2_encoder\.pth: "):
        build_codec({"name": "taef2", "weights": str(tmp_path)})
    assert not Path("exploded").exists()


def test_missing_packages_and_files_are_named(tmp_path, monkeypatch) -> None:
    save_kl(tmp_path)
    with pytest.raises(AtollError, match=r"neither taef2_encoder.safetensors nor taef2_encoder.pth"):
        build_codec({"name": "taef2", "weights": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(AtollError, match=r"pip install 'atoll\[hub\]'"):
        build_codec({"name": "kl", "weights": str(tmp_path)})


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real images and weights beside the checkout")
@pytest.mark.parametrize(("file", "known"), [("eurosat64_0of2.parquet", 31.4), ("flowers128.parquet", 25.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taef2_reconstructs_images(file, known, dtype) -> None:
    import pyarrow.parquet as pq

    rows = next(pq.ParquetFile(DATA / file).iter_batches(32 if "64" in file else 8, columns=["image_bytes"]))
    images = [Image.open(io.BytesIO(data.as_py())).convert("RGB") for data in rows["image_bytes"]]
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255  # [B,3,h,h]
    codec = build_codec({"name": "taef2", "weights": str(DATA / "weights")}).to(dtype=dtype)
    assert isinstance(codec, NetworkCodec)
    again = codec.decode(codec.encode(images))
    psnr = -10 * (images - again).square().mean((1, 2, 3)).log10()
    # `known` is the mean over all images (dB, in the data's README); this is a sample.
    assert (psnr.mean() - known).abs() < 3 * psnr.std() / len(psnr) ** 0.5
    assert codec.config()["sha256"] != sha256_file(DATA / "weights" / "taef2_encoder.pth")
