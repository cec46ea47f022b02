"""Diversity by hand, SqueezeDist against its definition written out, LPIPS if it is installed."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.encoders.feature import NetworkFeature, build_feature
from atoll.errors import AtollError
from atoll.evaluate.metrics.diversity import LPIPS, Diversity, SqueezeDist, mean_distance
from tests.encoders.test_feature import save_mobilenet, save_squeezenet

DATA = Path(__file__).parents[3].parent / "shared" / "data"


class Brightness:
    """The difference of mean brightness."""

    name = "brightness"

    def pairwise(self, images: Tensor, /) -> Tensor:
        return torch.pdist(images.flatten(1).mean(1, keepdim=True))


def grey(*levels: float) -> Tensor:
    return torch.tensor(levels).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 6)


def images_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def squeezenet(tmp_path, monkeypatch) -> NetworkFeature:
    monkeypatch.delenv("ATOLL_WEIGHTS", raising=False)
    feature = build_feature({"name": "squeezenet", "weights": str(save_squeezenet(tmp_path)), "size": 40})
    assert isinstance(feature, NetworkFeature)
    return feature


class TestDiversity:
    def test_diversity_by_hand(self) -> None:
        # pairs of the first: 0.1, 0.4, 0.3; of the second: 0.5
        means = [mean_distance(Brightness(), images) for images in (grey(0.0, 0.1, 0.4), grey(0.2, 0.7))]
        assert means == pytest.approx([0.8 / 3, 0.5])
        found = Diversity.of(means)
        assert found.mean == pytest.approx((0.8 / 3 + 0.5) / 2)
        assert found.std == pytest.approx((0.5 - 0.8 / 3) / 2**0.5)
        assert Diversity.of([0.5]) == Diversity(0.5, 0.0)

    def test_diverged_images_give_nan(self) -> None:
        broken = mean_distance(Brightness(), grey(0.1, torch.nan))
        assert math.isnan(broken)
        for means in ([broken], [0.5, broken]):
            assert math.isnan(Diversity.of(means).mean)
            assert math.isnan(Diversity.of(means).std)

    def test_refusals(self) -> None:
        with pytest.raises(AtollError, match="1 images of a prompt; its diversity needs at least 2"):
            mean_distance(Brightness(), grey(0.1))
        with pytest.raises(AtollError, match="no prompts"):
            Diversity.of([])


def written_out(feature: NetworkFeature, a: Tensor, b: Tensor) -> float:
    """Zhang et al. 2018, Eq. 1 with all weights 1, for two images [C,H,W]."""
    total = 0.0
    for x, y in zip(feature.taps(a[None]), feature.taps(b[None]), strict=True):
        _, _, height, width = x.shape
        for row in range(height):
            for column in range(width):
                p, q = x[0, :, row, column], y[0, :, row, column]
                p = p / p.norm() if p.norm() > 0 else p
                q = q / q.norm() if q.norm() > 0 else q
                total += float((p - q).square().sum()) / (height * width)
    return total


class TestSqueezeDist:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_squeeze_distance_equals_its_definition(self, squeezenet, channels) -> None:
        images = images_of(4, channels, 17, 26)
        found = SqueezeDist(squeezenet).pairwise(images)
        pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
        expected = torch.tensor([written_out(squeezenet, images[i], images[j]) for i, j in pairs])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)

    def test_distance_to_itself_is_zero_and_grows_with_the_change(self, squeezenet) -> None:
        image, noise = images_of(1, 3, 20, 30), images_of(1, 3, 20, 30, seed=2) - 0.5
        found = SqueezeDist(squeezenet).pairwise(torch.cat([image, image, image + 0.1 * noise, image + 0.5 * noise]))
        assert float(found[0]) == pytest.approx(0, abs=1e-6)
        assert 0 < found[1] < found[2]

    @pytest.mark.parametrize(("shape", "seen"), [((16, 16), (64, 64)), ((8, 20), (64, 160)), ((20, 9), (142, 64))])
    def test_small_images_are_enlarged(self, squeezenet, shape, seen) -> None:
        images = images_of(3, 1, *shape)
        enlarged = F.interpolate(images, seen, mode="bilinear", align_corners=False)
        distance = SqueezeDist(squeezenet)
        torch.testing.assert_close(distance.pairwise(images), distance.pairwise(enlarged))

    def test_images_of_17_pixels_are_not_enlarged(self, squeezenet) -> None:
        images = images_of(3, 1, 17, 30)
        other = SqueezeDist(squeezenet, enlarged=40)
        assert torch.equal(SqueezeDist(squeezenet).pairwise(images), other.pairwise(images))

    def test_the_name_depends_on_the_network_and_the_size(self, squeezenet) -> None:
        one = SqueezeDist(squeezenet).name
        assert one.startswith("SqueezeDist [")
        assert len(one) == len("SqueezeDist [12345678]")
        assert one == SqueezeDist(squeezenet).name
        assert one != SqueezeDist(squeezenet, enlarged=48).name

    def test_refusals(self, squeezenet, tmp_path) -> None:
        other = build_feature({"name": "mobilenetv2", "weights": str(save_mobilenet(tmp_path))})
        with pytest.raises(AtollError, match="'mobilenetv2' has no taps; take 'squeezenet'"):
            SqueezeDist(other)
        with pytest.raises(AtollError, match="enlarged to 16 pixels; SqueezeNet needs at least 17"):
            SqueezeDist(squeezenet, enlarged=16)

    @pytest.mark.skipif(not DATA.is_dir(), reason="needs the real weights beside the checkout")
    def test_the_real_network_ranks_a_shift_below_another_image(self) -> None:
        """Which pixels alone do not: fine stripes and the same moved by half a period are opposite everywhere."""
        weights = DATA / "weights" / "squeezenet11_caffe_fp16.npz"
        distance = SqueezeDist(build_feature({"name": "squeezenet", "weights": str(weights)}))
        stripes = (torch.arange(48) // 2 % 2).float().expand(3, 40, 48)
        images = torch.stack([stripes, 1 - stripes, torch.full((3, 40, 48), 0.5)])
        shifted, blank, _ = distance.pairwise(images)
        assert torch.pdist(images.flatten(1))[0] > torch.pdist(images.flatten(1))[1]
        assert shifted < blank


class TestLPIPS:
    def test_lpips_without_its_package_is_one_line(self, tmp_path, monkeypatch) -> None:
        torch.save({}, tmp_path / "alexnet.pth")
        monkeypatch.setitem(sys.modules, "lpips", None)
        with pytest.raises(AtollError, match=r"lpips cannot be imported .*or take SqueezeDist"):
            LPIPS(str(tmp_path / "alexnet.pth"))
        with pytest.raises(AtollError, match="not found"):
            LPIPS(str(tmp_path / "nothing.pth"))
        with pytest.raises(AtollError, match=r"not found \(tried [^()]*\); correct the path"):  # no hub is asked
            LPIPS("some/name")
        with pytest.raises(AtollError, match="unknown net 'alexnet'; take 'alex'"):
            LPIPS(str(tmp_path / "alexnet.pth"), "alexnet")

    def test_lpips_equals_its_package(self, tmp_path, monkeypatch) -> None:
        """With a random network, since torchvision's weights are not at hand."""
        try:
            import lpips
            from torchvision.models import alexnet
        except Exception:
            pytest.skip("lpips or its torchvision is not installed")
        torch.manual_seed(0)
        network = alexnet(weights=None)
        torch.save(network.state_dict(), tmp_path / "alexnet.pth")
        distance = LPIPS(str(tmp_path / "alexnet.pth"))
        assert distance.name.startswith("LPIPS-alex [")
        theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        for name, parameter in theirs.net.named_parameters():
            module = network.features[int(name.split(".")[1])]
            parameter.data = getattr(module, name.split(".")[2]).data
        images = images_of(3, 1, 64, 70)
        expected = [
            float(theirs(2 * images[i : i + 1] - 1, 2 * images[j : j + 1] - 1)) for i, j in ((0, 1), (0, 2), (1, 2))
        ]
        torch.testing.assert_close(distance.pairwise(images), torch.tensor(expected))
        torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "alexnet.pth")
        with pytest.raises(AtollError, match="no weights of torchvision's alex"):
            LPIPS(str(tmp_path / "alexnet.pth"))
