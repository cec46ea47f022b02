"""SqueezeNet: its taps, its input, its file."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from atoll.errors import AtollError
from atoll.nn.squeezenet import DIM, SMALLEST, SqueezeNet, load_squeezenet

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """A file of the same layout, at random."""
    rng = np.random.default_rng(0)
    found = {}
    for name, parameter in SqueezeNet().named_parameters():
        module, kind = name.rsplit(".", 1)
        scale = 1 / parameter[0].numel() ** 0.5
        found[f"{module.replace('.', '_')}__{kind[0]}"] = rng.normal(0, scale, parameter.shape).astype(np.float16)
    return found


def test_taps_and_feature(arrays) -> None:
    network = load_squeezenet(arrays, "a file")
    images = torch.rand(2, 3, 64, 96)
    taps = network.taps(images)
    assert [tap.shape[1] for tap in taps] == [64, 128, 256, 384, 384, 512, 512]
    assert [tuple(tap.shape[-2:]) for tap in taps] == [(31, 47), (15, 23), (7, 11), *[(3, 5)] * 4]
    assert network(images).shape == (2, DIM)
    torch.testing.assert_close(network(images), taps[-1].mean((2, 3)))


def test_input_is_caffes(arrays) -> None:
    """The mean colour is black to the network, and blue comes first."""
    network = load_squeezenet({**arrays, "conv1__b": np.zeros(64, np.float32)}, "a file")
    grey = torch.tensor([123.0, 117.0, 104.0]).div(255).reshape(1, 3, 1, 1).expand(2, 3, 20, 24)
    assert network.taps(grey)[0].abs().max() < 1e-4
    only_blue = {**arrays, "conv1__b": np.zeros(64, np.float32), "conv1__w": arrays["conv1__w"].copy()}
    only_blue["conv1__w"][:, 1:] = 0
    blue = load_squeezenet(only_blue, "a file")
    lit, red = grey.clone(), grey.clone()
    lit[:, 2] += 0.2
    red[:, 0] += 0.2
    assert blue.taps(lit)[0].max() > 0.1
    assert blue.taps(red)[0].max() < 1e-4


def test_smallest_image(arrays) -> None:
    network = load_squeezenet(arrays, "a file")
    assert network(torch.rand(2, 3, SMALLEST, 40)).isfinite().all()
    with pytest.raises(AtollError, match=r"16 x 40 pixels.*at least 17"):
        network(torch.rand(2, 3, 16, 40))


def test_other_weights_are_refused(arrays) -> None:
    missing = {key: value for key, value in arrays.items() if key != "fire5_squeeze1x1__b"}
    with pytest.raises(AtollError, match=r"a file: no array 'fire5_squeeze1x1__b'"):
        load_squeezenet(missing, "a file")
    with pytest.raises(AtollError, match=r"conv1__w is \(64,\), expected \(64, 3, 3, 3\)"):
        load_squeezenet({**arrays, "conv1__w": arrays["conv1__b"]}, "a file")


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real weights beside the checkout")
def test_the_real_network_equals_the_reference() -> None:
    spec = importlib.util.spec_from_file_location("readers", DATA / "readers.py")
    readers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readers)
    file = DATA / "weights" / "squeezenet11_caffe_fp16.npz"
    images = torch.rand(2, 3, 50, 72, generator=torch.Generator().manual_seed(0))
    with np.load(file, allow_pickle=False) as arrays, torch.no_grad():
        network = load_squeezenet(arrays, str(file))
        features, _, taps = readers.SqueezeNet11(file)(images, taps=True)
        torch.testing.assert_close(network(images), features)
        for ours, theirs in zip(network.taps(images), taps, strict=True):
            torch.testing.assert_close(ours, theirs)
