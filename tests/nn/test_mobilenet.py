"""MobileNetV2: its padding, its blocks, its file."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from atoll.errors import AtollError
from atoll.nn import mobilenet
from atoll.nn.mobilenet import Conv, InvertedResidual, MobileNetV2, load_mobilenet

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """A file of the same layout, at random."""
    rng = np.random.default_rng(0)
    found = {}
    for i, conv in enumerate(m for m in MobileNetV2().modules() if isinstance(m, Conv)):
        found[f"q{i}"] = rng.integers(-127, 128, conv.weight.shape, dtype=np.int8)
        fan_in = conv.weight[0].numel()
        found[f"s{i}"] = (rng.uniform(0.5, 1.5, len(conv.weight)) / 60 / fan_in**0.5).astype(np.float32)
        found[f"b{i}"] = rng.normal(0, 0.1, len(conv.weight)).astype(np.float32)
    return found


def test_weights_are_widened_in_order_of_use(arrays) -> None:
    network = load_mobilenet(arrays, "a file")
    convolutions = [m for m in network.modules() if isinstance(m, Conv)]
    assert len(convolutions) == 52
    for i, conv in ((0, network.stem), (1, network.blocks[0].depthwise), (51, network.head)):
        assert conv is convolutions[i]
        expected = arrays[f"q{i}"].astype(np.float32) * arrays[f"s{i}"][:, None, None, None]
        np.testing.assert_allclose(conv.weight.detach().numpy(), expected)
        np.testing.assert_allclose(conv.bias.detach().numpy(), arrays[f"b{i}"])


def test_shapes(arrays) -> None:
    features = load_mobilenet(arrays, "a file")(torch.rand(2, 3, 64, 96))
    assert features.shape == (2, mobilenet.DIM)
    assert (features >= 0).all()
    assert features.std() > 0


@pytest.mark.parametrize("size", [(6, 8), (7, 9), (6, 9)])
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_padding_is_tensorflows_same(size, side, stride) -> None:
    """Output ceil(n/s); the window of output i starts at i*s - floor(total/2), total = (out-1)*s + side - n."""
    conv = Conv(1, 1, side, stride)
    conv.weight.data.fill_(1.0)
    conv.bias.data.zero_()
    x = torch.rand(2, 1, *size)
    found = conv(x)
    outputs = [-(-n // stride) for n in size]
    assert found.shape == (2, 1, *outputs)
    starts = [max((o - 1) * stride + side - n, 0) // 2 for o, n in zip(outputs, size, strict=True)]
    for i in range(outputs[0]):
        for j in range(outputs[1]):
            top, left = i * stride - starts[0], j * stride - starts[1]
            window = x[:, 0, max(top, 0) : top + side, max(left, 0) : left + side]
            torch.testing.assert_close(found[:, 0, i, j], window.sum((1, 2)))


def test_a_block_skips_only_where_shapes_allow() -> None:
    assert InvertedResidual(8, 8, 6, 1).skips
    assert not InvertedResidual(8, 8, 6, 2).skips
    assert not InvertedResidual(8, 16, 6, 1).skips
    block = InvertedResidual(4, 4, 6, 1)
    block.project.weight.data.zero_()
    block.project.bias.data.zero_()
    x = torch.randn(2, 4, 5, 7)
    torch.testing.assert_close(block(x), x)


def test_other_weights_are_refused(arrays) -> None:
    missing = {key: value for key, value in arrays.items() if key != "s7"}
    with pytest.raises(AtollError, match=r"a file: no array 's7'"):
        load_mobilenet(missing, "a file")
    with pytest.raises(AtollError, match=r"a file: q3, .*expected \(96, 16, 1, 1\)"):
        load_mobilenet({**arrays, "q3": arrays["q4"]}, "a file")


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real weights beside the checkout")
@pytest.mark.parametrize("size", [(64, 96), (65, 98)])
def test_the_real_network_equals_the_reference(size) -> None:
    spec = importlib.util.spec_from_file_location("readers", DATA / "readers.py")
    readers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readers)
    file = DATA / "weights" / "mobilenetv2_tf_int8.npz"
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with np.load(file, allow_pickle=False) as arrays, torch.no_grad():
        found = load_mobilenet(arrays, str(file))(images)
        torch.testing.assert_close(found, readers.MobileNetV2(file)(images)[0])
