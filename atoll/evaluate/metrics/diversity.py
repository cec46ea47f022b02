"""Intra-prompt diversity, as HDDM reports it: the mean distance between images of one prompt."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.encoders.feature import NetworkFeature, build_feature
from atoll.encoders.weights import sha256_weights
from atoll.errors import AtollError
from atoll.evaluate.metrics.inception import import_with_torchvision, local_weights
from atoll.nn.squeezenet import SMALLEST
from atoll.storage.content import advice
from atoll.storage.memory import refuse_out_of_memory


class PerceptualDistance(Protocol):
    """A distance between images. `name` says which, with the first 8 digits of the hash of its inputs."""

    name: str

    def pairwise(self, images: Tensor, /) -> Tensor:
        """Images [n, C, H, W] in [0, 1] -> distances [n (n - 1) / 2] of (0, 1), (0, 2), ... (n - 2, n - 1)."""


class SqueezeDist:
    """The squared difference of SqueezeNet's unit-length taps: LPIPS without its learnt weights, hence another name.

    Zhang et al. 2018, Eq. 1 with all w_l = 1: channels at unit length in each place, squared differences summed over
    channels, averaged over places, summed over the seven taps. It depends on the images' size.

    Args:
        feature: "squeezenet", built by `atoll.encoders.feature.build_feature`.
        enlarged: images with a side below 17 pixels, the network's minimum, are enlarged (bilinear) to this shorter
            side. Part of the hash in the name.

    Raises:
        AtollError: another feature, or `enlarged` below 17.
    """

    def __init__(self, feature: NetworkFeature, enlarged: int = 64):
        if feature.name != "squeezenet":
            raise AtollError(f"the feature {feature.name!r} has no taps; take 'squeezenet'")
        if enlarged < SMALLEST:
            raise AtollError(f"images enlarged to {enlarged} pixels; SqueezeNet needs at least {SMALLEST}")
        self.feature, self.enlarged = feature, enlarged
        # The enlargement changes the distance, so it is part of the name.
        digest = hashlib.sha256(f"{feature.config()['sha256']} enlarged {enlarged}".encode())
        self.name = f"SqueezeDist [{digest.hexdigest()[:8]}]"

    def pairwise(self, images: Tensor, /) -> Tensor:
        # Sum over the taps; in float32, whatever the images are.
        total = images.new_zeros(len(images) * (len(images) - 1) // 2, dtype=torch.float32)
        for tap in self.feature.taps(_enlarged(images, self.enlarged)):  # [n,D,h,w]
            unit = tap / (tap.norm(dim=1, keepdim=True) + 1e-10)  # 0 if no channel is active
            total += torch.pdist(unit.flatten(1)).square() / unit[0, 0].numel()
        return total


class LPIPS:
    """LPIPS 0.1 (Zhang et al. 2018) by the package `lpips`, which contains its learnt weights but not the network's.

    Args:
        weights: the local path of torchvision's weights of the network (alexnet-owt-7be5be79.pth for "alex").
        net: "alex", as papers report it; "vgg" or "squeeze".

    Raises:
        AtollError: another net; lpips or torchvision is not installed; the weights are missing (nothing is
            downloaded), damaged, or of another network.
    """

    def __init__(self, weights: str, net: Literal["alex", "vgg", "squeeze"] = "alex"):
        if net not in ("alex", "vgg", "squeeze"):
            raise AtollError(f"lpips: unknown net {net!r}; take 'alex', 'vgg' or 'squeeze'")
        path = local_weights(weights)
        library = import_with_torchvision("lpips", "pip install lpips", ", or take SqueezeDist, which needs neither")
        network = library.LPIPS(net=net, pnet_rand=True, verbose=False)  # random, so that nothing is downloaded
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            # lpips splits torchvision's `features` into slices: slice2.5.weight is features.5.weight.
            own = {key: stored[f"features.{key.split('.', 1)[1]}"] for key in network.net.state_dict()}
            network.net.load_state_dict(own)
        except Exception as error:  # a damaged or foreign file can raise anything
            refuse_out_of_memory(error, path)
            raise AtollError(
                f"{path}: no weights of torchvision's {net}: it {advice(path, error)}; expected the file that "
                f"torchvision downloads for {net}, such as alexnet-owt-7be5be79.pth"
            ) from None
        self._network = network.eval().requires_grad_(False)
        self.name = f"LPIPS-{net} [{sha256_weights(path)[:8]}]"

    @torch.no_grad()
    def pairwise(self, images: Tensor, /) -> Tensor:
        self._network.to(images.device)
        # Grey images become three equal channels.
        images, pairs = images.float().expand(-1, 3, -1, -1), combinations(range(len(images)), 2)
        distances = [self._network(images[i : i + 1], images[j : j + 1], normalize=True) for i, j in pairs]
        return torch.cat(distances).flatten()


@dataclass(frozen=True)
class Diversity:
    """HDDM's intra-prompt diversity (arXiv 2603.06741).

    Larger is more diverse. Noise is the most diverse, so the number means nothing alone. NaN if images diverged.

    Attributes:
        mean: over prompts, of the mean distance between the images of one prompt.
        std: over prompts; 0 for one prompt.
    """

    mean: float
    std: float

    @classmethod
    def of(cls, by_prompt: Sequence[float]) -> "Diversity":
        """From `mean_distance` of each prompt's images. Raises AtollError for no prompts."""
        if not by_prompt:
            raise AtollError("the diversity of no prompts; expected at least one")
        # One prompt has a spread of 0; the product passes NaN on.
        values = torch.tensor(by_prompt, dtype=torch.float64)
        return cls(float(values.mean()), float(values.std()) if len(values) > 1 else float(values[0] * 0))


def mean_distance(distance: PerceptualDistance, images: Tensor) -> float:
    """Mean distance between the images [n, C, H, W] in [0, 1] of one prompt; NaN if any is not finite.

    Raises:
        AtollError: fewer than two images.
    """
    if len(images) < 2:
        raise AtollError(f"{len(images)} images of a prompt; its diversity needs at least 2")
    return float(distance.pairwise(images).double().mean()) if bool(torch.isfinite(images).all()) else math.nan


def _enlarged(images: Tensor, size: int) -> Tensor:
    """Enlarge images [n,C,H,W] below the network's smallest side to a shorter side of `size` pixels."""
    height, width = images.shape[-2:]
    least = min(height, width)
    if least >= SMALLEST:
        return images
    # The longer side grows in proportion.
    shape = [max(size, round(side * size / least)) for side in (height, width)]
    return F.interpolate(images.float(), shape, mode="bilinear", align_corners=False)


def build_distance(config: Mapping[str, Any]) -> PerceptualDistance:
    """Build a distance from {name: squeezenet, weights: ...} or {name: lpips, weights: ..., net: alex}.

    Raises:
        AtollError: another name or key; as `LPIPS` and `build_feature`.
    """
    if config.get("name") == "lpips":
        if unknown := sorted(config.keys() - {"name", "weights", "net"}):
            raise AtollError(f"diversity: lpips takes no {unknown[0]!r}; expected weights, and net")
        return LPIPS(str(config.get("weights")), config.get("net", "alex"))
    feature = build_feature(config)
    if not isinstance(feature, NetworkFeature):
        raise AtollError(f"the feature {feature.name!r} has no taps; take 'squeezenet'")
    return SqueezeDist(feature)
