from collections.abc import Iterator
from typing import Any

import pytest
import torch

from atoll.codec import PixelCodec
from atoll.condition import HashEncoder
from atoll.data import Images, Source
from atoll.data.encode import encode, encode_run
from atoll.errors import AtollError
from atoll.feature import Hog
from atoll.shards import Shards

COUNT, SHAPE = 19, (1, 8, 12)


class Noise(Source):
    """Random pictures; `breaks_at` raises there, `nan_at` puts a NaN there."""

    name = "noise"

    def __init__(self, seed=0, breaks_at=None, nan_at=None):
        self.seed, self.breaks_at, self.nan_at = seed, breaks_at, nan_at
        self.batches_given = 0

    def __len__(self) -> int:
        return COUNT

    def batches(self, size: int) -> Iterator[Images]:
        images = torch.rand(COUNT, *SHAPE, generator=torch.Generator().manual_seed(self.seed))
        if self.nan_at is not None:
            images[self.nan_at, 0, 3, 4] = torch.nan
        for i in range(0, COUNT, size):
            if self.breaks_at is not None and i >= self.breaks_at:
                raise RuntimeError("the network is gone")
            self.batches_given += 1
            numbers = range(i, min(i + size, COUNT))
            yield Images(
                [f"k{n}" for n in numbers],
                [f"picture {n}" for n in numbers],
                ["val" if n % 4 == 1 else "train" for n in numbers],
                images[i : i + size],
            )

    def config(self) -> dict[str, Any]:
        return {"name": "noise"}

    def fingerprint(self) -> str:
        return str(self.seed)


def run(out, source=None, codec=None, **options):
    parts = (codec or PixelCodec(1, 0.5, 2.0)), Hog(3, 2), HashEncoder(dim=6)
    return encode(source or Noise(), out, *parts, batch=5, **options)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_what_is_written(tmp_path) -> None:
    told = []
    assert run(tmp_path / "encoded", shard_rows=8, progress=lambda *news: told.append(news))
    shards = Shards(tmp_path / "encoded", verify=True)
    images = next(Noise().batches(COUNT))
    assert (shards.keys, shards.captions, shards.splits) == (images.keys, images.captions, images.splits)
    latent, feature = (shards.read(name, slice(None)) for name in ("latent", "feature"))
    assert (latent.dtype, feature.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(PixelCodec(1, 0.5, 2.0).decode(latent.float()), images.images, rtol=0, atol=1e-3)
    torch.testing.assert_close(feature, Hog(3, 2)(images.images))
    assert shards.card == {
        "source": {"name": "noise", "sha256": "0"},
        "codec": {"name": "pixels", "channels": 1, "shift": 0.5, "scale": 2.0},
        "condition": {"name": "hash", "dim": 6, "length": 16, "seed": 0},
        "feature": {"name": "hog", "bins": 3, "grid": 2},
    }
    assert [news[:2] for news in told] == [(5, COUNT), (10, COUNT), (15, COUNT), (COUNT, COUNT)]
    assert all(news[2].endswith("images/s") for news in told)


def test_twice_gives_the_same_bytes(tmp_path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_the_same_encoding_is_not_made_again(tmp_path) -> None:
    run(tmp_path / "a")
    again = Noise()
    assert run(tmp_path / "a", again) is False
    assert again.batches_given == 0
    assert run(tmp_path / "a", again, force=True) is True


@pytest.mark.parametrize(
    ("other", "said"), [({"codec": PixelCodec()}, "with codec"), ({"source": Noise(seed=1)}, "with source")]
)
def test_another_encoding_is_not_replaced_unasked(tmp_path, other, said) -> None:
    run(tmp_path / "a")
    before = content(tmp_path / "a")
    with pytest.raises(AtollError, match=rf"{said}.*--force"):
        run(tmp_path / "a", **other)
    assert content(tmp_path / "a") == before
    assert run(tmp_path / "a", **other, force=True)
    assert content(tmp_path / "a") != before


def test_a_source_that_breaks_leaves_nothing(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="network"):
        run(tmp_path / "a", Noise(breaks_at=10))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("scale", "source"), [(2.0, Noise(nan_at=12)), (1e6, Noise())])
def test_a_value_that_is_not_finite_is_named(tmp_path, scale, source) -> None:
    key = "k12" if scale == 2 else "k0"
    with pytest.raises(AtollError, match=f"latent of image '{key}'.*scale"):
        run(tmp_path / "a", source, PixelCodec(1, 0.0, scale))
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_data_set_of_a_run(tmp_path, manifest) -> None:
    told = []
    assert "2,288" in encode_run(tmp_path, manifest, progress=lambda *news: told.append(news))
    shards = Shards(tmp_path / "encoded")
    assert shards.shape("latent") == (1, 16, 16)
    assert shards.card["source"]["subset"] == "demo"
    assert told[-1][:2] == (2288, 2288)
    assert "there already" in encode_run(tmp_path, manifest)
