"""FLUX.2's tiny autoencoder, TAEF2 (Bohan 2025, github.com/madebyollin/taesd), which diffusers does not load.

Images [B,3,8H,8W] in [0,1] <-> latents [B,32,H,W]. Deterministic both ways.
Letters: B batch, D width (64), C channels of the latent (32), H W the latent's sides.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.errors import AtollError
from atoll.storage.memory import refuse_out_of_memory


class Context(nn.Module):
    """A block's extra branch for wide receptive fields: statistics of the whole image.

    The group norm over the whole image is the only connection between distant pixels.
    """

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm = nn.GroupNorm(4, 4 * width)
        self.down = nn.Conv2d(4 * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.up(x))  # [B,4D,h,w]
        return self.down(F.relu(h))  # [B,D,h,w]


class ConvBlock(nn.Module):
    """Three convolutions around a skip, after the whole image's context if `context` is set."""

    def __init__(self, width: int, context: bool = False):
        super().__init__()
        self.context = Context(width) if context else None
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.context is not None:
            x = x + self.context(x)  # [B,D,h,w]
        h = F.relu(self.conv1(x))  # [B,D,h,w]
        h = F.relu(self.conv2(h))  # [B,D,h,w]
        return F.relu(self.conv3(h) + x)  # [B,D,h,w]


class TAEF2Encoder(nn.Module):
    """Images [B,3,8H,8W] in [0,1] to latents [B,C,H,W]."""

    # A file's keys are numbers of layers: layer i of the file is LAYERS[i] here.
    LAYERS: Sequence[str] = (
        *("stem", "blocks1.0"),
        *("down2", "blocks2.0", "blocks2.1", "blocks2.2"),
        *("down4", "blocks4.0", "blocks4.1", "blocks4.2"),
        *("down8", "blocks8.0", "blocks8.1", "blocks8.2", "head"),
    )

    def __init__(self, width: int = 64, channels: int = 32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks1 = nn.Sequential(ConvBlock(width))
        self.down2 = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        self.blocks2 = nn.Sequential(*(ConvBlock(width) for _ in range(3)))
        self.down4 = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        self.blocks4 = nn.Sequential(*(ConvBlock(width) for _ in range(3)))
        self.down8 = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        self.blocks8 = nn.Sequential(*(ConvBlock(width, context=True) for _ in range(3)))
        self.head = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks1(self.stem(images))  # [B,D,8H,8W]
        x = self.blocks2(self.down2(x))  # [B,D,4H,4W]
        x = self.blocks4(self.down4(x))  # [B,D,2H,2W]
        x = self.blocks8(self.down8(x))  # [B,D,H,W]
        return self.head(x)  # [B,C,H,W]


class TAEF2Decoder(nn.Module):
    """Latents [B,C,H,W] to images [B,3,8H,8W], in about [0,1]: not clamped."""

    # As the encoder's; "" are layers without weights.
    LAYERS: Sequence[str] = (
        *("", "stem", "", "blocks8.0", "blocks8.1", "blocks8.2"),
        *("", "up4", "blocks4.0", "blocks4.1", "blocks4.2"),
        *("", "up2", "blocks2.0", "blocks2.1", "blocks2.2"),
        *("", "up1", "blocks1.0", "head"),
    )

    def __init__(self, width: int = 64, channels: int = 32):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks8 = nn.Sequential(*(ConvBlock(width, context=True) for _ in range(3)))
        self.up4 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.blocks4 = nn.Sequential(*(ConvBlock(width) for _ in range(3)))
        self.up2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.blocks2 = nn.Sequential(*(ConvBlock(width) for _ in range(3)))
        self.up1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.blocks1 = nn.Sequential(ConvBlock(width))
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = torch.tanh(latents / 3) * 3  # [B,C,H,W], within what the decoder was trained on
        x = self.blocks8(F.relu(self.stem(x)))  # [B,D,H,W]
        x = self.blocks4(self.up4(double(x)))  # [B,D,2H,2W]
        x = self.blocks2(self.up2(double(x)))  # [B,D,4H,4W]
        x = self.blocks1(self.up1(double(x)))  # [B,D,8H,8W]
        return self.head(x)  # [B,3,8H,8W]


def double(x: Tensor) -> Tensor:
    """[B,D,h,w] to [B,D,2h,2w], each pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


# The names of a block's parts in a file.
_PARTS = {
    "conv.0": "conv1",
    "conv.2": "conv2",
    "conv.4": "conv3",
    "pool.0": "context.up",
    "pool.1": "context.norm",
    "pool.3": "context.down",
}


def our_name(key: str, layers: Sequence[str]) -> str:
    """Translate a file's "11.pool.1.bias" to "blocks8.0.context.norm.bias". Raises KeyError for an unknown name."""
    # layer number, perhaps a part of a block, and weight or bias.
    number, *part, kind = key.split(".")
    if not number.isdecimal() or int(number) >= len(layers) or not layers[int(number)]:
        raise KeyError(key)
    return ".".join([layers[int(number)], *([_PARTS[".".join(part)]] if part else []), kind])


def load_encoder(tensors: Mapping[str, Tensor], where: str) -> TAEF2Encoder:
    """Build the encoder with the weights of a file, in float32.

    Raises:
        AtollError: the tensors are not those of a TAEF2 encoder; the message begins with `where`.
    """
    # The sizes follow from the weights; a wrong guess is reported when they are loaded.
    head = tensors.get("14.weight")
    channels = 32 if head is None else len(head)
    encoder = TAEF2Encoder(_width(tensors, "0.weight"), channels)
    _load(encoder, TAEF2Encoder.LAYERS, tensors, where)
    return encoder


def load_decoder(tensors: Mapping[str, Tensor], where: str) -> TAEF2Decoder:
    """Build the decoder with the weights of a file; see `load_encoder`."""
    stem = tensors.get("1.weight")
    channels = 32 if stem is None or stem.ndim != 4 else stem.shape[1]
    decoder = TAEF2Decoder(_width(tensors, "1.weight"), channels)
    _load(decoder, TAEF2Decoder.LAYERS, tensors, where)
    return decoder


def _width(tensors: Mapping[str, Tensor], stem: str) -> int:
    """The width of the stem's weights; an arbitrary one if there are none, since loading reports what is missing."""
    return len(tensors[stem]) if stem in tensors else 64


def _load(module: nn.Module, layers: Sequence[str], tensors: Mapping[str, Tensor], where: str) -> None:
    # Report a foreign or damaged file by what does not fit.
    kind = type(module).__name__.lower().removeprefix("taef2")
    try:
        module.load_state_dict({our_name(key, layers): tensor.float() for key, tensor in tensors.items()})
    except KeyError as error:
        raise AtollError(f"{where}: not a TAEF2 {kind} (it has a tensor {error}); give taef2_{kind}.pth") from None
    except RuntimeError as error:
        refuse_out_of_memory(error, where)
        problem = " ".join(str(error).split("\n", 2)[1:2]).strip()
        raise AtollError(f"{where}: not a TAEF2 {kind} ({problem:.200}); give taef2_{kind}.pth") from None
