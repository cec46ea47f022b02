import pytest
import torch

from atoll.codec import PixelCodec, build_codec
from atoll.errors import AtollError


@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip(channels) -> None:
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


def test_decode_clamps() -> None:
    assert PixelCodec().decode(torch.tensor([[[[-9.0, 0.0, 9.0]]]])).flatten().tolist() == [0, 0.5, 1]


def test_other_channels_are_refused_with_the_fix() -> None:
    with pytest.raises(AtollError, match=r"3 channels.*set to 1.*codec.channels to 3"):
        PixelCodec(1).encode(torch.rand(2, 3, 4, 5))


def test_build_codec_round_trip() -> None:
    codec = PixelCodec(3, shift=0.5, scale=2.0)
    again = build_codec(codec.config())
    assert again.config() == codec.config() == {"name": "pixels", "channels": 3, "shift": 0.5, "scale": 2.0}
    assert build_codec({"name": "pixels"}).config() == {"name": "pixels", "channels": 1, "shift": 0.0, "scale": 1.0}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"name": "jpeg"}, "'jpeg'.*'pixels'"),
        ({"name": "pixels", "channels": 2}, "channels"),
        ({"name": "pixels", "scale": 0}, "scale"),
        ({"name": "pixels", "shift": float("nan")}, "shift"),
        ({"name": "pixels", "size": 3}, "size"),
    ],
)
def test_build_codec_refuses(config, said) -> None:
    with pytest.raises(AtollError, match=said):
        build_codec(config)
