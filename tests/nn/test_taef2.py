"""TAEF2: what the files' keys mean, and that the real network is the reference's."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.nn import taef2

DATA = Path(__file__).parents[2].parent / "shared" / "data"
WIDTH, CHANNELS = 4, 6


def file_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """The module's weights, at random, under the keys of a file: written out anew, as taesd numbers its layers."""
    numbers = {name: i for i, name in enumerate(module.LAYERS) if name}
    parts = {"conv1": "conv.0", "conv2": "conv.2", "conv3": "conv.4"}
    parts |= {"context.up": "pool.0", "context.norm": "pool.1", "context.down": "pool.3"}
    g = torch.Generator().manual_seed(0)
    found = {}
    for name, value in module.state_dict().items():
        path, kind = name.rsplit(".", 1)
        layer = next(layer for layer in numbers if path == layer or path.startswith(layer + "."))
        part = path[len(layer) + 1 :]
        key = ".".join(filter(None, [str(numbers[layer]), parts[part] if part else "", kind]))
        found[key] = 0.2 * torch.randn(value.shape, generator=g).half()
    return found


def test_shapes_and_kind() -> None:
    encoder = taef2.load_encoder(file_of(taef2.TAEF2Encoder(WIDTH, CHANNELS)), "a file")
    decoder = taef2.load_decoder(file_of(taef2.TAEF2Decoder(WIDTH, CHANNELS)), "a file")
    images = torch.rand(2, 3, 16, 24)
    latents = encoder(images)
    assert (latents.shape, latents.dtype) == ((2, CHANNELS, 2, 3), torch.float32)
    assert decoder(latents).shape == images.shape


def test_keys_of_a_file() -> None:
    assert len(taef2.TAEF2Encoder.LAYERS) == 15
    assert len(taef2.TAEF2Decoder.LAYERS) == 20
    assert taef2.our_name("0.bias", taef2.TAEF2Encoder.LAYERS) == "stem.bias"
    assert taef2.our_name("12.pool.3.weight", taef2.TAEF2Encoder.LAYERS) == "blocks8.1.context.down.weight"
    assert taef2.our_name("18.conv.4.bias", taef2.TAEF2Decoder.LAYERS) == "blocks1.0.conv3.bias"
    for key in ("2.weight", "20.weight", "3.conv.1.bias", "x.bias"):
        with pytest.raises(KeyError):
            taef2.our_name(key, taef2.TAEF2Decoder.LAYERS)


def test_the_decoder_squeezes_wild_latents() -> None:
    decoder = taef2.load_decoder(file_of(taef2.TAEF2Decoder(WIDTH, CHANNELS)), "a file")
    wild = torch.full((1, CHANNELS, 2, 3), 30.0)
    torch.testing.assert_close(decoder(wild), decoder(10 * wild))


def test_only_the_coarse_blocks_see_the_whole_image() -> None:
    encoder = taef2.load_encoder(file_of(taef2.TAEF2Encoder(WIDTH, CHANNELS)), "a file")
    images = torch.rand(1, 3, 16, 480)
    other = images.clone()
    other[..., :8] = 0  # 59 latent columns away, far outside every stack of convolutions
    far = slice(-1, None)
    assert not torch.equal(encoder(images)[..., far], encoder(other)[..., far])
    early = lambda x: encoder.blocks4(encoder.down4(encoder.blocks2(encoder.down2(encoder.blocks1(encoder.stem(x))))))  # noqa: E731
    assert torch.equal(early(images)[..., far], early(other)[..., far])


@pytest.mark.parametrize("damage", ["missing", "foreign", "shape", "empty"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_other_weights_are_refused(part, damage) -> None:
    cls, load = {
        "encoder": (taef2.TAEF2Encoder, taef2.load_encoder),
        "decoder": (taef2.TAEF2Decoder, taef2.load_decoder),
    }[part]
    tensors = file_of(cls(WIDTH, CHANNELS))
    if damage == "missing":
        del tensors["4.conv.2.weight"]
    elif damage == "foreign":
        tensors["encoder.conv_in.weight"] = torch.zeros(1)
    elif damage == "shape":
        tensors["8.conv.0.bias"] = torch.zeros(3)
    else:
        tensors = {}
    with pytest.raises(AtollError, match=rf"^a file: not a TAEF2 {part} \(.*give taef2_{part}.pth"):
        load(tensors, "a file")


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real weights beside the checkout")
def test_the_real_network_equals_the_reference() -> None:
    spec = importlib.util.spec_from_file_location("readers", DATA / "readers.py")
    readers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readers)
    files = {part: DATA / "weights" / f"taef2_{part}.pth" for part in ("encoder", "decoder")}
    reference = readers.TinyAutoencoder(files["encoder"], files["decoder"])
    encoder = taef2.load_encoder(torch.load(files["encoder"], weights_only=True), "")
    decoder = taef2.load_decoder(torch.load(files["decoder"], weights_only=True), "")
    images = torch.rand(2, 3, 40, 72, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = encoder(images)
        torch.testing.assert_close(latents, reference.encode(images))
        torch.testing.assert_close(decoder(latents).clamp(0, 1), reference.decode(latents))
