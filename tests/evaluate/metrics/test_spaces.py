"""Feature spaces: their names, their hashes, their projections; random networks, Inception if it is installed."""

import hashlib
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from atoll.encoders.feature import Hog, build_feature
from atoll.errors import AtollError
from atoll.evaluate.metrics import inception
from atoll.evaluate.metrics.frechet import metric_name
from atoll.evaluate.metrics.spaces import FeatureSpace, build_space_feature
from tests.encoders.test_feature import save_clip_image, save_dinov2, save_mobilenet, save_squeezenet

DATA = Path(__file__).parents[3].parent / "shared" / "data"


def images_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def space_of(feature: dict, components: int | None = None, batches: tuple[Tensor, ...] = ()) -> FeatureSpace:
    built = build_space_feature(feature)
    return FeatureSpace(built) if components is None else FeatureSpace.fit(built, batches, components)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "save", "label", "dim"),
        [
            ("mobilenetv2", save_mobilenet, "MNv2", 1280),
            ("squeezenet", save_squeezenet, "SqueezeNet", 512),
            ("dinov2", save_dinov2, "DINOv2", 16),
            ("clip-image", save_clip_image, "CLIP", 10),
        ],
    )
    def test_names_of_networks(self, tmp_path, monkeypatch, name, save, label, dim) -> None:
        monkeypatch.delenv("ATOLL_WEIGHTS", raising=False)
        config = {"name": name, "weights": str(save(tmp_path))} | ({"size": 35} if name == "dinov2" else {})
        space = space_of(config)
        assert (space.name, space.dim, space.explained) == (label, dim, 1)
        assert re.fullmatch(rf"FD-{label} \[{space.sha256[:8]}\]", metric_name("FD", space))
        images = images_of(2, 3, 30, 44)
        assert torch.equal(space(images), build_feature(config)(images))

    def test_names_with_components(self) -> None:
        batches = tuple(images_of(40, 1, 16, 18).split(7))
        space = space_of({"name": "hog"}, 5, batches)
        assert (space.name, space.dim) == ("HOG-pca5", 5)
        assert metric_name("FD", space) == f"FD-HOG-pca5 [{space.sha256[:8]}]"
        assert space_of({"name": "hog"}).name == "HOG"
        assert space_of({"name": "hog"}, 64, batches[:1]).name == "HOG-pca6"  # of 7 images


class TestHashes:
    def test_hashes_do_not_depend_on_the_weights_path(self, tmp_path) -> None:
        (tmp_path / "here").mkdir()
        here = save_squeezenet(tmp_path / "here")
        there = shutil.copytree(tmp_path / "here", tmp_path / "there") / here.name
        one = space_of({"name": "squeezenet", "weights": str(here), "size": 40})
        assert one.sha256 == space_of({"name": "squeezenet", "weights": str(there), "size": 40}).sha256
        assert one.sha256 != space_of({"name": "squeezenet", "weights": str(here), "size": 48}).sha256

    def test_hashes_differ_by_settings_images_and_components(self) -> None:
        some, others = images_of(20, 1, 16, 18), images_of(20, 1, 16, 18, seed=2)
        hog = {"name": "hog"}
        spaces = [
            space_of(hog),
            space_of({"name": "hog", "bins": 6}),
            space_of(hog, 3, (some,)),
            space_of(hog, 3, (others,)),
            space_of(hog, 4, (some,)),
        ]
        assert len({space.sha256 for space in spaces}) == 5
        assert spaces[2].sha256 == space_of(hog, 3, (some,)).sha256


class TestProjection:
    def test_projection_uses_the_singular_vectors_of_the_features(self) -> None:
        images = images_of(40, 1, 16, 18)
        space = FeatureSpace.fit(Hog(), images.split(9), 6)
        features = Hog()(images)
        centred = features - features.mean(0)
        _, values, right = torch.linalg.svd(centred, full_matrices=False)
        expected = centred @ right[:6].T
        found = space(images)
        torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-4, rtol=1e-3)
        assert space.explained == pytest.approx(float(values[:6].square().sum() / values.square().sum()), rel=1e-4)

    def test_refuses_too_few_images_and_broken_ones(self) -> None:
        with pytest.raises(AtollError, match="the principal components of 1 images; expected at least 2"):
            FeatureSpace.fit(Hog(), [images_of(1, 1, 16, 18)], 3)
        broken = images_of(4, 1, 16, 18)
        broken[2, 0, 5, 5] = torch.nan
        with pytest.raises(AtollError, match="'hog' of the reference images is not finite"):
            FeatureSpace.fit(Hog(), [broken], 3)

    def test_a_mean_without_a_basis_is_refused(self) -> None:
        with pytest.raises(ValueError, match="a mean without its basis"):
            FeatureSpace(Hog(), mean=torch.zeros(256))
        with pytest.raises(ValueError, match="a basis of 9 dimensions for a feature of 256"):
            FeatureSpace(Hog(), torch.zeros(9), torch.zeros(9, 2))

    def test_only_a_non_finite_image_gets_nan(self, tmp_path) -> None:
        # A network that resizes clamps infinity away: it would count as an image.
        images = images_of(4, 3, 30, 44)
        images[1, 2, 3, 4], images[3] = torch.inf, torch.nan
        feature = build_feature({"name": "squeezenet", "weights": str(save_squeezenet(tmp_path)), "size": 40})
        assert torch.isfinite(feature(images)[1]).all()
        for space in (FeatureSpace(feature), FeatureSpace.fit(feature, [images_of(5, 3, 30, 44)], 3)):
            found = space(images)
            assert found[[1, 3]].isnan().all()
            assert torch.isfinite(found[[0, 2]]).all()


class TestSettings:
    def test_a_feature_refuses_its_own_bad_settings(self) -> None:
        with pytest.raises(AtollError, match="bins"):
            space_of({"name": "hog", "bins": 1})
        with pytest.raises(AtollError, match="'vgg'"):
            space_of({"name": "vgg"})
        with pytest.raises(AtollError, match="'inception': weights: missing"):
            space_of({"name": "inception"})


class Tiny(nn.Module):
    """Stands in for torch-fidelity's network: the mean colours of its input, 2048 numbers."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str):
        super().__init__()
        assert features_list == ["2048"]
        self.weight = nn.Parameter(torch.load(feature_extractor_weights_path, weights_only=False)["weight"])

    def forward(self, images: Tensor) -> tuple[Tensor]:
        assert images.dtype == torch.uint8
        return (self.weight * images.double().mean((2, 3)).sum(1, keepdim=True).float(),)


class TestInception:
    @pytest.fixture
    def weights(self, tmp_path, monkeypatch) -> Path:
        """A file that passes as FID's."""
        path = tmp_path / "inception.pth"
        torch.save({"weight": torch.ones(2048)}, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(inception, "FID_WEIGHTS", digest[:8])
        monkeypatch.delenv("ATOLL_WEIGHTS", raising=False)
        return path

    @pytest.fixture
    def library(self, monkeypatch) -> None:
        module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
        module.FeatureExtractorInceptionV3 = Tiny
        monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def test_inception_is_called_fid_only_with_its_weights(self, weights, library) -> None:
        space = space_of({"name": "inception", "weights": str(weights)})
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        assert metric_name("FD", space) == f"FID [{digest[:8]}]"
        assert space.dim == 2048
        projected = FeatureSpace(space.feature, torch.zeros(2048), torch.eye(2048)[:, :2])
        assert metric_name("FD", projected) == f"FD-Inception-pca2 [{projected.sha256[:8]}]"
        assert projected.sha256[:8] != digest[:8]

    def test_inception_gets_images_of_8_bits(self, weights, library) -> None:
        space = space_of({"name": "inception", "weights": str(weights)})
        grey = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.7]).reshape(5, 1, 1, 1).expand(5, 1, 6, 7)
        assert space(grey)[:, 9].tolist() == [0, 0, 3, 765, 765]
        assert torch.equal(space(grey.expand(-1, 3, -1, -1)), space(grey))
        with pytest.raises(AtollError, match="1 or 3 channels; got 4"):
            space(images_of(2, 4, 6, 7))
        assert space(torch.full((2, 3, 6, 7), torch.nan)).isnan().all()  # 8 bits have no NaN

    def test_inception_without_torch_fidelity_is_one_line(self, weights, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
        with pytest.raises(AtollError, match=r"torch-fidelity cannot be imported .*pip install torch-fidelity"):
            space_of({"name": "inception", "weights": str(weights)})

    def test_other_weights_are_not_fid(self, weights, library, monkeypatch) -> None:
        monkeypatch.setattr(inception, "FID_WEIGHTS", "6726825d")
        with pytest.raises(AtollError, match=r"FID is defined by the weights 6726825d"):
            space_of({"name": "inception", "weights": str(weights)})
        with pytest.raises(AtollError, match=r"not found"):
            space_of({"name": "inception", "weights": str(weights) + "x"})
        with pytest.raises(AtollError, match=r"not found \(tried [^()]*\); correct the path"):  # no hub is asked
            space_of({"name": "inception", "weights": "some/name"})
        with pytest.raises(AtollError, match=r"is a directory; name the .pth"):
            space_of({"name": "inception", "weights": str(weights.parent)})

    def test_a_pickle_that_executes_is_refused(self, weights, library, monkeypatch) -> None:
        class Bomb:
            def __reduce__(self) -> tuple:
                return (Path.touch, (weights.parent / "exploded",))

        torch.save({"weight": Bomb()}, weights)
        monkeypatch.setattr(inception, "FID_WEIGHTS", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
        with pytest.raises(AtollError, match="torch-fidelity cannot load it"):
            space_of({"name": "inception", "weights": str(weights)})
        assert not (weights.parent / "exploded").exists()

    def test_inception_equals_torch_fidelitys_class(self, weights, monkeypatch) -> None:
        """At random, since its weights are not at hand; slow where it is installed."""
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except Exception:
            pytest.skip("torch-fidelity is not installed")
        with monkeypatch.context() as patch:
            patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
            torch.manual_seed(0)
            network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights))
        torch.save(network.state_dict(), weights)
        monkeypatch.setattr(inception, "FID_WEIGHTS", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
        space = space_of({"name": "inception", "weights": str(weights)})
        images = images_of(2, 3, 30, 44)
        expected = network((images * 255).round().to(torch.uint8))[0]
        torch.testing.assert_close(space(images), expected)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real images and weights beside the checkout")
def test_a_real_network_separates_images_from_noisy_ones() -> None:
    import io

    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    from atoll.evaluate.metrics.frechet import Moments, frechet_distance

    table = pq.read_table(DATA / "eurosat64_0of2.parquet", columns=["image_bytes"]).slice(0, 160)
    images = [np.asarray(Image.open(io.BytesIO(data.as_py())).convert("RGB")) for data in table["image_bytes"]]
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    config = {"name": "squeezenet", "weights": str(DATA / "weights" / "squeezenet11_caffe_fp16.npz"), "size": 64}
    space = space_of(config, 16, tuple(images[:80].split(50)))
    assert metric_name("FD", space).startswith("FD-SqueezeNet-pca16 [")

    def moments(images: Tensor) -> Moments:
        found = Moments(space.dim)
        found.update(space(images))
        return found

    real = moments(images[:80])
    floor = frechet_distance(moments(images[80:]), real)
    noisy = images[80:] + 0.1 * torch.randn(images[80:].shape, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(moments(noisy.clamp(0, 1)), real) > 3 * floor
