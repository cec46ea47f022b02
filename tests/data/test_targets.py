"""Targets of representation while encoding: their components, what is stored, and what is refused."""

import json

import numpy as np
import pytest
import torch

from atoll.cluster.add import assign_only
from atoll.cluster.run import cluster
from atoll.data import encode as stage
from atoll.data import targets as fitting
from atoll.data.encode import encode_run
from atoll.data.types import Raw, Skipped
from atoll.encoders.feature import NetworkFeature, build_feature
from atoll.encoders.targets import COMPONENTS, Components, FeatureMoments
from atoll.errors import AtollError
from atoll.manifest import Manifest, parse_manifest
from atoll.manifest.targets import TargetsSettings
from atoll.storage.artifact import sha256_file
from atoll.storage.cards import ClusterShardsCard, EncodedCard
from atoll.storage.layout import cluster_path
from atoll.storage.shards import Shards
from tests.data.test_encode import COUNT, MANIFEST, Noise, content, noise_images
from tests.encoders.test_feature import SAVE

GRID, DIMS = 2, 3


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
    """The file of a SqueezeNet with random weights."""
    return str(SAVE["squeezenet"](tmp_path_factory.mktemp("squeezenet")))


@pytest.fixture
def manifest(network):
    """The manifest of tests/data/test_encode.py with targets."""

    def work(data="flips: false", **changes):
        targets = {"feature": {"name": "squeezenet", "weights": network, "size": 48}, "dims": DIMS, "grid": GRID}
        text = f"{MANIFEST.format(data=data, scale=2.0)}\ntargets: {json.dumps({**targets, **changes})}"
        return parse_manifest(text, "here")

    return work


@pytest.fixture
def encode(tmp_path, monkeypatch, manifest):
    def work(source=None, name="run", settings=None, **options):
        monkeypatch.setattr(stage, "build_source", lambda data: source or Noise())
        return encode_run(tmp_path / name, settings or manifest(), **{"workers": 0, **options})

    return work


def maps_of(count=40, width=6) -> torch.Tensor:
    """Features [n,D,2,3] of three strong directions and noise, with a mean."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, generator=g)).Q
    scales = torch.tensor([5.0, 3.0, 2.0, 0.3, 0.2, 0.1])
    values = torch.randn(count, 2, 3, width, generator=g) * scales
    return (values @ basis.T).permute(0, 3, 1, 2) + torch.arange(width)[:, None, None]


def fitted(maps: torch.Tensor, dims: int = DIMS, parts: int = 1) -> Components:
    moments = FeatureMoments()
    for part in maps.chunk(parts):
        moments.add(part)
    return moments.components(dims)


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    maps = maps_of()
    components = fitted(maps, parts=3)
    vectors = maps.transpose(0, 1).flatten(1).T.double().numpy()  # [n,D]
    centred = vectors - vectors.mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(components.mean, vectors.mean(0), rtol=1e-6)
    np.testing.assert_allclose(components.deviation, singular[:DIMS] / len(vectors) ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(np.abs(components.directions.numpy() @ directions[:DIMS].T), np.eye(DIMS), atol=1e-5)
    assert (components.directions.gather(1, components.directions.abs().argmax(1, keepdim=True)) > 0).all()
    # The coordinates are uncorrelated, of mean 0 and variance 1.
    coordinates = components(maps).transpose(0, 1).flatten(1)
    torch.testing.assert_close(coordinates @ coordinates.T / coordinates.shape[1], torch.eye(DIMS), rtol=0, atol=1e-4)
    torch.testing.assert_close(coordinates.mean(1), torch.zeros(DIMS), rtol=0, atol=1e-5)


def test_components_ignore_images_that_are_not_finite() -> None:
    maps = maps_of()
    bad = torch.full_like(maps[:1], torch.nan)
    torch.testing.assert_close(fitted(torch.cat([bad, maps])).directions, fitted(maps).directions)


def test_features_of_too_few_directions_are_refused() -> None:
    flat = maps_of()[:, :1].expand(-1, 4, -1, -1)
    with pytest.raises(AtollError, match=r"dims is 2, .*vary in 1 directions; lower targets.dims"):
        fitted(flat, 2)
    with pytest.raises(AtollError, match="vary in 0 directions"):
        fitted(torch.ones(2, 4, 2, 2), 1)


def test_what_is_stored(tmp_path, encode, manifest, network) -> None:
    encode(settings=manifest("flips: true"))
    shards = Shards(tmp_path / "run" / "encoded", verify=True)
    targets, record = shards.read("target", slice(None)), shards.card(EncodedCard).targets
    assert (targets.dtype, targets.shape) == (torch.float16, (COUNT, DIMS, GRID, GRID))
    assert (record.feature["name"], record.feature["size"], record.dims, record.grid) == ("squeezenet", 48, DIMS, GRID)
    assert "weights" not in record.feature
    file = tmp_path / "run" / "encoded" / COMPONENTS
    assert record.sha256 == sha256_file(file)
    # All training images are in the sample here, and none that is held out.
    images = torch.from_numpy(noise_images()).float() / 255
    feature = build_feature({"name": "squeezenet", "weights": network, "size": 48})
    train = torch.tensor([n for n in range(COUNT) if n % 4 != 1])
    maps = feature.patches(images, GRID)
    expected = fitted(maps[train])
    torch.testing.assert_close(Components.read(file, DIMS).directions, expected.directions, rtol=0, atol=1e-3)
    torch.testing.assert_close(targets.float(), expected(maps), rtol=0, atol=2e-2)
    with pytest.raises(AtollError, match=r"holds components \[3, 512\]; expected 4 rows"):
        Components.read(file, 4)


def test_without_targets_the_files_are_those_of_a_manifest_that_lacks_the_section(tmp_path, encode, manifest) -> None:
    plain = parse_manifest(MANIFEST.format(data="flips: false", scale=2.0), "here")
    off = plain.model_copy(update={"targets": manifest().targets.model_copy(update={"feature": None})})
    encode(name="a", settings=plain)
    encode(name="b", settings=off)
    assert content(tmp_path / "a" / "encoded") == content(tmp_path / "b" / "encoded")
    # The other columns do not depend on them.
    encode(name="c")
    one, other = (Shards(tmp_path / name / "encoded") for name in ("a", "c"))
    assert {*other.columns} - {*one.columns} == {"target"}
    assert all(torch.equal(one.read(name, slice(None)), other.read(name, slice(None))) for name in one.columns)


@pytest.mark.parametrize("at", [1, 12])
def test_the_same_bytes_after_an_interruption(tmp_path, encode, at) -> None:
    encode(name="whole")
    # The second reading of the source breaks, once the components are fitted.
    source, blocks = Noise(), []
    read = source.read
    source.read = lambda block: blocks.append(block) or _breaking(read(block), len(blocks) > 4, at)
    with pytest.raises(RuntimeError, match="plug"):
        encode(source)
    assert (tmp_path / "run" / "encoded.partial" / COMPONENTS).is_file()
    encode(resume=True)
    assert content(tmp_path / "run" / "encoded") == content(tmp_path / "whole" / "encoded")


def _breaking(samples, breaks, at):
    for sample in samples:
        if breaks and isinstance(sample, Raw) and sample.key == f"k{at}":
            raise RuntimeError("the plug was pulled")
        yield sample


def test_the_sample_is_spread_over_a_source(monkeypatch, tmp_path, encode) -> None:
    """At most SAMPLE images, and of each block evenly spaced training images."""
    monkeypatch.setattr(fitting, "SAMPLE", 8)
    calls, patches = [], NetworkFeature.patches

    def recorded(self, images, grid):
        calls.append(images)
        return patches(self, images, grid)

    monkeypatch.setattr(NetworkFeature, "patches", recorded)
    encode()
    images = torch.from_numpy(noise_images()).float() / 255
    sampled = torch.cat(calls)[:-COUNT]
    numbers = sorted(next(i for i, image in enumerate(images) if torch.equal(image, one)) for one in sampled)
    # Blocks of 7, 0, 9 and 3 samples, two of each at most; every fourth image is held out.
    assert numbers == [0, 4, 7, 12, 16, 18]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature": {"name": "hog"}}, "targets.feature: 'hog' has no patch features; use one of efficientnet-lite0"),
        ({"dims": 65}, "targets.dims"),
        ({"grid": 0}, "targets.grid"),
        ({"feature": None}, "dims: without a feature, no targets are stored"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, encode, manifest, changes, message) -> None:
    with pytest.raises(AtollError, match=message):
        encode(settings=manifest(**changes))
    assert not (tmp_path / "run").exists()


def test_a_manifest_without_targets_survives_being_written_out() -> None:
    plain = parse_manifest(MANIFEST.format(data="flips: false", scale=2.0), "here")
    assert Manifest(**plain.model_dump()) == plain


def test_a_source_without_a_training_image_is_refused(encode) -> None:
    source = Noise()
    source.read = lambda block: iter([Skipped(f"k{block.content}", "broken")])
    with pytest.raises(AtollError, match="targets: the source holds no training image"):
        encode(source)


def test_another_encoding_is_not_replaced_unasked(encode, manifest) -> None:
    plain = parse_manifest(MANIFEST.format(data="flips: false", scale=2.0), "here")
    encode()
    assert "there already" in encode()
    for settings in (plain, manifest(dims=2)):
        with pytest.raises(AtollError, match=r"was encoded with targets .*--force"):
            encode(settings=settings)
    encode(settings=plain, force=True)
    with pytest.raises(AtollError, match=r"was encoded with targets None, atoll.yaml names .*--force"):
        encode()


def test_more_data_take_the_components_of_the_first(tmp_path, encode, manifest) -> None:
    encode()
    clusters, first = tmp_path / "clusters", tmp_path / "run" / "encoded"
    cluster(first, clusters, 2, "random", router_fraction=0.9)
    # The targets travel with the rows, but for the router.
    rows = {key: row for row, key in enumerate(Shards(first).keys)}
    for number in range(2):
        shards = Shards(cluster_path(clusters, number))
        assert shards.card(ClusterShardsCard).targets == Shards(first).card(EncodedCard).targets
        expected = Shards(first).read("target", torch.tensor([rows[key] for key in shards.keys]))
        assert torch.equal(shards.read("target", slice(None)), expected)
    router = Shards(clusters / "router")
    assert "target" not in router.columns
    assert router.card(ClusterShardsCard).targets is None
    # Other images with components of their own do not fit; with those of the first, they do.
    new = Noise(seed=1)
    new.read = lambda block, read=new.read: (_renamed(sample) for sample in read(block))
    encode(new, name="other")
    with pytest.raises(AtollError, match=r"its targets is .*targets.like in atoll.yaml"):
        assign_only(clusters, tmp_path / "other" / "encoded")
    settings = manifest(like="../run")
    with pytest.raises(AtollError, match="was encoded with targets"):
        encode(new, name="other", settings=settings)
    encode(new, name="other", settings=settings, force=True)
    assert "there already" in encode(new, name="other", settings=settings)
    assert f"{COUNT} images added" in assign_only(clusters, tmp_path / "other" / "encoded")
    (tmp_path / "third").mkdir()
    with pytest.raises(AtollError, match=r"has targets .*'dims': 3.*names .*'dims': 2"):
        encode(new, name="third", settings=manifest(like="../run/encoded", dims=2))
    (first / COMPONENTS).unlink()
    with pytest.raises(AtollError, match="missing or altered"):
        encode(new, name="third", settings=settings)


def _renamed(sample: Raw) -> Raw:
    return Raw(f"new-{sample.key}", sample.image, sample.caption, sample.split)


def test_targets_of_a_bucket_are_those_of_the_image_that_its_latent_shows(network) -> None:
    """Nothing of a wide image is cropped: its left and right ends decide the outer columns."""
    feature = build_feature({"name": "squeezenet", "weights": network, "size": 96})
    wide = torch.rand(1, 3, 32, 128, generator=torch.Generator().manual_seed(0))
    changed = wide.clone()
    changed[..., :12] = 0
    difference = (feature.patches(changed, 4) - feature.patches(wide, 4)).abs().sum(1)[0]  # [4,4]
    assert difference[:, 0].min() > 10 * difference[:, 3].max()


def test_a_training_without_targets_is_refused_before_anything_is_encoded(tmp_path, manifest, encode):
    settings = manifest()
    train = settings.train.model_copy(update={"targets_weight": 0.5})
    without = settings.model_copy(update={"train": train, "targets": TargetsSettings()})
    with pytest.raises(AtollError, match=r"expert 0-.*targets_weight is 0.5, but encoding stores no targets"):
        encode(settings=without)
    assert not list(tmp_path.glob("run/*"))
    encode(settings=settings.model_copy(update={"train": train}))
