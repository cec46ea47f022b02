"""Reference statistics from a file: another network or image size is refused."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from atoll.encoders.codec import PixelCodec
from atoll.encoders.feature import Hog, Pixels
from atoll.encoders.text import HashEncoder, PromptEncoder
from atoll.errors import AtollError
from atoll.evaluate import EvaluateSettings, Reference
from atoll.evaluate.measure import side_by_side
from atoll.evaluate.metrics.frechet import Moments, frechet_distance, metric_name
from atoll.evaluate.metrics.gaussian import FORMAT, load_gaussian, save_gaussian
from atoll.evaluate.metrics.image_metrics import image_metrics
from atoll.evaluate.metrics.spaces import FeatureSpace
from atoll.evaluate.reference import ReferenceData
from atoll.evaluate.run_statistics import statistics_run
from atoll.manifest import Manifest, SpaceSettings
from atoll.storage.shards import Shards, ShardWriter
from tests.cards import encoded_card
from tests.waiting import run_to_end

SIDE = 8
SHAPE = (1, SIDE, SIDE)
CODEC = PixelCodec(1, shift=0.0, scale=1.0)
OBJECTIVE = {"prediction": "flow", "schedule": "linear"}
PIXELS = {"name": "pixels", "size": 2}  # 12 dimensions


class Boom:
    """Runs code when it is unpickled, unless that is refused."""

    def __reduce__(self):
        return eval, ("1 / 0",)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def moments_of(images: Tensor, feature: Pixels | Hog) -> Moments:
    moments = Moments(feature.dim)
    moments.update(feature(images))
    return moments


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Statistics of 200 images in the space of 2 x 2 pixels."""
    path = tmp_path / "theirs.safetensors"
    save_gaussian(path, moments_of(images(200), Pixels(2)), Pixels(2), SHAPE)
    return path


def encoded(path: Path, count: int = 90, seed: int = 3) -> Path:
    latents = (images(count, seed) * 2 - 1).half()
    splits = ["val" if i % 10 == 0 else "train" for i in range(count)]
    with ShardWriter(path / "encoded", encoded_card(codec=CODEC.config())) as writer:
        writer.append([f"p{i}" for i in range(count)], ["a dot"] * count, splits, {"latent": latents})
    return path


def manifest_of(*spaces: dict) -> Manifest:
    content = {"name": "m", "experts": [{"cluster": 0, "objective": OBJECTIVE}], "evaluate": {"spaces": list(spaces)}}
    return Manifest.model_validate(content)


class TestFiles:
    def test_saved_statistics_are_read_unchanged(self, file: Path) -> None:
        feature, own = Pixels(2), moments_of(images(200), Pixels(2))
        found = load_gaussian(file, feature, SHAPE)
        assert torch.equal(found.mean, own.mean)
        assert torch.equal(found.covariance, own.covariance)
        assert found.count == 200
        assert found.name == f"theirs [{found.sha256[:8]}]"
        drawn = moments_of(images(50, 7), feature)
        assert frechet_distance(drawn, found) == frechet_distance(drawn, own) > 0
        assert frechet_distance(own, found) == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_an_npz_of_other_tools_is_read(self, tmp_path: Path, dtype) -> None:
        own = moments_of(images(200), Pixels(2))
        mu, sigma = own.mean.numpy().astype(dtype), own.covariance.numpy().astype(dtype)
        np.savez_compressed(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu[:2], arr_0=np.zeros((1, 2, 2, 3)))
        found = load_gaussian(tmp_path / "adm.npz", Pixels(2), (3, 256, 256))
        torch.testing.assert_close(found.covariance, own.covariance, atol=1e-6, rtol=1e-6)
        assert found.count == float("inf")

    @pytest.mark.parametrize("name", ["a.npz", "A.NPZ", "a.pt", "a.pkl", "noname"])
    @pytest.mark.parametrize("names", [("mu", "sigma"), ("mean", "cov")])
    def test_a_file_is_read_by_what_it_holds(self, tmp_path: Path, name: str, names: tuple[str, str]) -> None:
        own = moments_of(images(200), Pixels(2))
        arrays = dict(zip(names, (own.mean.numpy(), own.covariance.numpy()), strict=True))
        contents = {
            "a.pt": lambda file: torch.save(dict(zip(names, (own.mean, own.covariance), strict=True)), file),
            "a.pkl": lambda file: pickle.dump({**arrays, "num_items": np.int64(200)}, file),
            "noname": lambda file: torch.save(arrays, file),
        }
        with (tmp_path / name).open("wb") as file:
            contents.get(name, lambda file: np.savez(file, **arrays))(file)
        found = load_gaussian(tmp_path / name, Pixels(2), SHAPE)
        assert torch.equal(found.mean, own.mean)
        assert torch.equal(found.covariance, own.covariance)

    def test_projection_on_all_directions_keeps_the_distance(self, file: Path) -> None:
        feature = Pixels(2)
        whole = load_gaussian(file, feature, SHAPE)
        space = FeatureSpace.of(feature, whole, 12)
        drawn = moments_of(images(50, 7), feature)
        seen = Moments(12)
        seen.update(space(images(50, 7)))
        assert frechet_distance(seen, space.seen(whole)) == pytest.approx(frechet_distance(drawn, whole), rel=1e-4)

    def test_components_come_from_the_file(self, file: Path) -> None:
        whole = load_gaussian(file, Pixels(2), SHAPE)
        space = FeatureSpace.of(Pixels(2), whole, 3)
        assert (space.name, space.dim) == ("pixels-pca3", 3)
        seen = space.seen(whole)
        assert seen.mean.abs().max() < 1e-6  # centred on them
        variances = torch.linalg.eigvalsh(whole.covariance).flip(0)[:3]
        torch.testing.assert_close(seen.covariance, torch.diag(variances), atol=1e-7, rtol=1e-4)


class TestRefused:
    @pytest.mark.parametrize(
        ("feature", "shape", "words"),
        [
            (Pixels(3), SHAPE, r"another feature network: size 2 \(here 3\)"),
            (Hog(), SHAPE, r"another feature network: name pixels \(here hog\)"),
            (Pixels(2), (1, 16, 16), r"images \[1, 8, 8\], these are \[1, 16, 16\]"),
            (Pixels(2), (3, 8, 8), r"images \[1, 8, 8\], these are \[3, 8, 8\]"),
        ],
    )
    def test_another_network_or_image_size_is_refused(self, file: Path, feature, shape, words) -> None:
        with pytest.raises(AtollError, match=words):
            load_gaussian(file, feature, shape)

    def test_an_npz_of_another_network_is_refused_by_dimension(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", mu=np.zeros(2048), sigma=np.eye(2048))
        with pytest.raises(AtollError, match=r"a mean of \[2048\].* 'pixels' has 12 dimensions"):
            load_gaussian(tmp_path / "a.npz", Pixels(2), SHAPE)

    def test_an_npz_that_unpacks_to_much_more_than_its_size_is_refused(self, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
        with pytest.raises(AtollError, match=r"a\.npz: unpacks to 33,\d+,\d+ bytes"):
            load_gaussian(tmp_path / "a.npz", Pixels(2), SHAPE)

    @pytest.mark.parametrize("name", ["no.npz", "no.safetensors"])
    def test_missing_and_damaged_files_are_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(AtollError, match="not found"):
            load_gaussian(tmp_path / name, Pixels(2), SHAPE)
        for content, words in (
            (b"", "is empty"),
            (b"PK\x03\x04 and nothing", "cannot be read"),
            (b"\x93NUMPY", r"an \.npy file holds one array; expected both mu and sigma in one file: np\.savez"),
            (b"text", "cannot be read"),
            (b"\xff" * 100, "cannot be read"),
            (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(AtollError, match=words) as raised:
                load_gaussian(tmp_path / name, Pixels(2), SHAPE)
            assert "\n" not in str(raised.value)

    def test_other_contents_are_refused(self, tmp_path: Path) -> None:
        save_file({"mean": torch.zeros(12)}, tmp_path / "a.safetensors", {"format": "other"})
        with pytest.raises(AtollError, match=f"'other', expected '{FORMAT}'"):
            load_gaussian(tmp_path / "a.safetensors", Pixels(2), SHAPE)
        whole = {"format": FORMAT, "feature": json.dumps(PIXELS), "image": "[1, 8, 8]", "count": "9"}
        for key, value in (
            ("feature", None),
            ("feature", "no json"),
            ("feature", "3"),
            ("image", None),
            ("count", "many"),
        ):
            metadata = {k: v for k, v in {**whole, key: value}.items() if v is not None}
            save_file({"mean": torch.zeros(12), "covariance": torch.eye(12)}, tmp_path / "b.safetensors", metadata)
            with pytest.raises(AtollError, match="its metadata cannot be read"):
                load_gaussian(tmp_path / "b.safetensors", Pixels(2), SHAPE)
        np.savez(tmp_path / "a.npz", mean=np.zeros(12))
        with pytest.raises(AtollError, match="holds mean; expected mu and sigma"):
            load_gaussian(tmp_path / "a.npz", Pixels(2), SHAPE)
        np.savez(tmp_path / "a.npz", mu=np.array(["code"], dtype=object), sigma=np.eye(12))
        with pytest.raises(AtollError, match="cannot be read"):  # a pickle
            load_gaussian(tmp_path / "a.npz", Pixels(2), SHAPE)
        np.savez(tmp_path / "a.npz", mu=np.array(["1.0"]), sigma=np.eye(12))
        with pytest.raises(AtollError, match="mu is <U3; expected an array of real numbers"):
            load_gaussian(tmp_path / "a.npz", Pixels(2), SHAPE)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ([1.0], "holds list; expected a dictionary of mu and sigma"),
            ({"mu": torch.zeros(12)}, "holds mu; expected mu and sigma"),
            ({"mu": 3, "sigma": torch.eye(12)}, "mu is int; expected an array of real numbers"),
            ({"mu": torch.zeros(12, dtype=torch.complex64), "sigma": torch.eye(12)}, "mu is torch.complex64"),
            ({"mu": torch.zeros(12), "sigma": Boom()}, "a pickle that holds more than tensors: it names builtins.eval"),
        ],
        ids=["list", "one", "number", "complex", "code"],
    )
    def test_other_contents_of_a_pytorch_file(self, tmp_path: Path, content, words: str) -> None:
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(AtollError, match=words) as raised:
            load_gaussian(tmp_path / "a.pt", Pixels(2), SHAPE)
        assert "\n" not in str(raised.value)

    @given(data=st.binary(max_size=120), name=st.sampled_from(["a.npz", "a.pt", "a.safetensors"]))
    def test_any_bytes_are_an_error_of_one_line(self, tmp_path: Path, data: bytes, name: str) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AtollError) as raised:
            load_gaussian(tmp_path / name, Pixels(2), SHAPE)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("place", [(0, 0), (3, 5)])
    @pytest.mark.parametrize("value", [np.nan, np.inf, 0.5])
    def test_invalid_covariances_are_refused(self, tmp_path: Path, place, value) -> None:
        sigma = np.eye(12)
        sigma[place] = value
        np.savez(tmp_path / "a.npz", mu=np.zeros(12), sigma=sigma)
        if place == (0, 0) and value == 0.5:
            assert load_gaussian(tmp_path / "a.npz", Pixels(2), SHAPE).finite
            return
        with pytest.raises(AtollError, match="not finite and symmetric"):
            load_gaussian(tmp_path / "a.npz", Pixels(2), SHAPE)


class TestStage:
    def test_writes_one_file_per_feature(self, tmp_path: Path) -> None:
        run, told = encoded(tmp_path), []
        manifest = manifest_of({"feature": PIXELS}, {"feature": {**PIXELS, "size": 3}, "components": 4})
        written = statistics_run(run, manifest, tmp_path / "out", lambda *progress: told.append(progress))
        assert told == [(81, 81)]
        assert [path.name.split("-")[0] for path in written] == ["pixels", "pixels"]
        assert len(set(written)) == 2
        shards = Shards(run / "encoded")
        images = CODEC.decode(shards.read("latent", shards.rows("train")).float())
        for path, feature in zip(written, (Pixels(2), Pixels(3)), strict=True):
            found = load_gaussian(path, feature, SHAPE)
            assert found.count == 81
            torch.testing.assert_close(found.mean, feature(images).double().mean(0))

    @pytest.mark.parametrize(
        ("count", "spaces", "words"),
        [(90, [], "evaluate.spaces is empty"), (1, [{"feature": PIXELS}], "0 training images; expected at least 2")],
    )
    def test_refuses(self, tmp_path: Path, count: int, spaces, words: str) -> None:
        with pytest.raises(AtollError, match=words):
            statistics_run(encoded(tmp_path, count), manifest_of(*spaces), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_from_the_command_line(self, tmp_path: Path) -> None:
        run = encoded(tmp_path)
        content = {"name": "m", "experts": [{"cluster": 0, "objective": OBJECTIVE}]}
        (run / "atoll.yaml").write_text(yaml.safe_dump({**content, "evaluate": {"spaces": [{"feature": PIXELS}]}}))
        command = [sys.executable, "-m", "atoll", "statistics", "-r", str(run), "-o", str(tmp_path / "out")]
        done = run_to_end(command)
        assert done.returncode == 0, done.stderr
        (file,) = (tmp_path / "out").iterdir()
        assert done.stdout == f"{file} written; set it as `statistics` of that feature's space\n"
        assert load_gaussian(file, Pixels(2), SHAPE).count == 81


def real_of(run: Path, file: Path, components: int | None = None) -> ReferenceData:
    space = SpaceSettings(feature=PIXELS, components=components, statistics=str(file))
    settings = EvaluateSettings(images=20, batch=7, components=4, spaces=(space,))
    return ReferenceData(
        Reference(Shards(run / "encoded"), PromptEncoder([HashEncoder(8, 4)]), CODEC), settings, run / "evaluation"
    )


def metrics_of(real: ReferenceData) -> dict[str, float | None]:
    with side_by_side(1) as run:
        base, probe = real.statistics("base", run), real.statistics("probe", run)
    return image_metrics(real.spaces[1], base[1], probe[1], real.published[1])


class TestEvaluated:
    def test_distances_to_the_file_and_to_the_data_are_both_reported(self, tmp_path: Path, file: Path) -> None:
        real = real_of(encoded(tmp_path), file)
        found, given = metrics_of(real), real.published[1]
        assert given is not None
        name = f"{metric_name('FD', real.spaces[1])} to theirs [{given.sha256[:8]}]"
        assert list(found)[-1] == name
        assert found[name] != found[metric_name("FD", real.spaces[1])]
        probe = moments_of(real.reference.images(real.probe), Pixels(2))
        assert found[name] == pytest.approx(frechet_distance(probe, load_gaussian(file, Pixels(2), SHAPE)), rel=1e-5)

    def test_one_file_gives_one_space_for_any_data(self, tmp_path: Path, file: Path) -> None:
        one = real_of(encoded(tmp_path / "one"), file, components=3)
        two = real_of(encoded(tmp_path / "two", seed=4), file, components=3)
        assert one.spaces[1].sha256 == two.spaces[1].sha256
        assert one.spaces[0].sha256 != two.spaces[0].sha256  # the pixels' components are each data set's own
        assert list(metrics_of(one)) == list(metrics_of(two))

    def test_other_statistics_are_another_measurement(self, tmp_path: Path, file: Path) -> None:
        run = encoded(tmp_path / "run")
        other = tmp_path / "theirs-too.safetensors"
        save_gaussian(other, moments_of(images(300, 9), Pixels(2)), Pixels(2), SHAPE)
        keys = {real_of(run, file).key, real_of(run, other).key, real_of(run, file).key}
        assert len(keys) == 2

    def test_statistics_of_another_size_are_refused_before_measuring(self, tmp_path: Path) -> None:
        run, file = encoded(tmp_path), tmp_path / "large.safetensors"
        save_gaussian(file, moments_of(images(50), Pixels(2)), Pixels(2), (1, 64, 64))
        with pytest.raises(AtollError, match=r"images \[1, 64, 64\], these are \[1, 8, 8\]"):
            real_of(run, file)
        assert not (run / "evaluation").exists()

    def test_the_metadata_describes_network_size_and_count(self, file: Path) -> None:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as content:
            metadata = content.metadata()
        assert json.loads(metadata["feature"]) == PIXELS
        assert (metadata["count"], metadata["image"]) == ("200", "[1, 8, 8]")
