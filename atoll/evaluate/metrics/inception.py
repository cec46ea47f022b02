"""Inception-v3's features, the only ones for which a Fréchet distance is called FID. Uses torch-fidelity's network."""

import os
import pickle
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from atoll.encoders.feature import Feature
from atoll.encoders.weights import WeightsConfig, find_weights, parse_config, require_sha256, sha256_weights
from atoll.errors import AtollError
from atoll.storage.memory import refuse_out_of_memory

# TensorFlow's graph of 2015-12-05, which defines FID, as torch-fidelity converted it. The file name ends in the first
# digits of its hash: weights-inception-2015-12-05-6726825d.pth.
FID_WEIGHTS = "6726825d"


class InceptionConfig(WeightsConfig):
    """weights: the local path of weights-inception-2015-12-05-6726825d.pth, from torch-fidelity's releases."""

    name: Literal["inception"] = "inception"


class Inception(Feature):
    """The last pooled vector, 2048-d (Heusel et al. 2017), of images rounded to 8 bits and resized as TensorFlow did.

    Raises:
        AtollError: torch-fidelity or torchvision is not installed; the weights are missing (nothing is downloaded),
            damaged, or not those that define FID.
    """

    name, dim = "inception", 2048

    def __init__(self, config: InceptionConfig):
        path = local_weights(config.weights)
        if not path.is_file():
            raise AtollError(f"feature 'inception': {path} is a directory; name the .pth file in it")
        # Only the weights that define FID are accepted.
        sha256 = sha256_weights(path)
        require_sha256("feature 'inception'", path, sha256, config.sha256)
        if not sha256.startswith(FID_WEIGHTS):
            raise AtollError(
                f"{path}: has sha256 {sha256[:8]}..., FID is defined by the weights {FID_WEIGHTS}...; get "
                f"weights-inception-2015-12-05-{FID_WEIGHTS}.pth from torch-fidelity's release v0.2.0"
            )
        library = import_with_torchvision("torch_fidelity.feature_extractor_inceptionv3", "pip install torch-fidelity")
        try:
            # torch-fidelity unpickles anything; what torch's restricted reader accepts cannot execute code.
            torch.load(path, map_location="cpu", weights_only=True)
            network = library.FeatureExtractorInceptionV3(
                "inception", ["2048"], feature_extractor_weights_path=str(path)
            )
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, AttributeError, TypeError) as error:
            refuse_out_of_memory(error, path)
            reason = " ".join(str(error).split())[:120]  # not the file's fault: its hash is right
            raise AtollError(
                f"{path}: torch-fidelity cannot load it ({reason}), though its sha256 is right; update torch-fidelity"
            ) from None
        self._network: nn.Module = network
        self._config = config.model_copy(update={"sha256": sha256})

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise AtollError(f"the feature 'inception' takes images of 1 or 3 channels; got {images.shape[1]}")
        # Move the network to the images once, at the first batch.
        if next(self._network.parameters()).device != images.device:
            self._network.to(images.device)
        # FID is defined on images of 8 bits.
        pixels = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)  # [B,1 or 3,H,W]
        output: Tensor = self._network(pixels.expand(-1, 3, -1, -1).contiguous())[0].float()  # [B,2048]
        return output

    def config(self) -> dict[str, Any]:
        return {"name": self.name, **self._config.model_dump(exclude={"name"})}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        self._network.to(device)  # always float32, as published FIDs
        return self


def local_weights(given: str) -> Path:
    """Like `find_weights`, but never from the hub. Raises AtollError if there are none."""
    return find_weights(os.path.abspath(os.path.expanduser(os.path.expandvars(given))))


def build_inception(config: Mapping[str, Any]) -> Inception:
    """Build the feature from {"name": "inception", "weights": path}. Raises AtollError like `build_feature`."""
    return Inception(parse_config("feature", {"inception": InceptionConfig}, config))


def import_with_torchvision(module: str, fix: str, otherwise: str = "") -> Any:
    """Import a module that needs torchvision and may be missing. Raises AtollError with the fix."""
    try:
        return import_module(module)
    except Exception as error:  # a torchvision for another torch raises RuntimeError
        refuse_out_of_memory(error, module)
        reason = " ".join(str(error).split())[:120]
        package = module.partition(".")[0].replace("_", "-")
        raise AtollError(
            f"{package} cannot be imported ({reason}); {fix}, and the torchvision of this torch{otherwise}"
        ) from None
