"""Bounds of the values in cards.

A card may be untrusted. No value in it may make a reader allocate or compute more than a model needs. Each limit is far
above what published models use, and low enough that one value alone costs little. Types that are built
from a card (networks, schedules, encoders) take their limits from here too.
"""

import math
from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

# Numbers of parts, and the cost of sampling them.
MAX_CLUSTERS = 4096  # K. HDDM and DDM have 8; routing weights are [B, K], and each cluster has a directory
MAX_ANCESTORS = 1024  # older assignments of clusters that grew; each step adds one cluster
MAX_EXPERTS = 4096  # E. A replica or two per cluster; each expert is opened and hashed when an ensemble loads
MAX_STEPS = 10_000  # solver steps. DDPM has 1,000; each step evaluates every selected expert
MAX_SHIFT = 1000.0  # of times, and its inverse. SD3 takes 3
MAX_GUIDANCE = 1000.0  # scale, either sign. Published samplers use 1 to 20
MAX_LORA_SCALE = 100.0  # of a low-rank update, either sign. 1 is what was trained
# Sizes of tensors and networks.
MAX_CHANNELS = 1024  # C. Autoencoders have 4 to 128
MAX_SIDE = 16_384  # H or W of a latent, in latent pixels
MAX_SIZES = 64  # sizes of one data set's images. SDXL has 40
MAX_LATENT = 2**24  # numbers in one latent: 64 MiB in float32, 2048 x 2048 RGB pixels
MAX_DIM = 65_536  # width of a network, of text states, of a feature. The largest transformers have 18,432
MAX_DEPTH = 1024  # blocks of a network. FLUX has 57; each block is built in Python before its weights are compared
MAX_PATCHES = 65_536  # N. FLUX has 16,384 at 2048 x 2048 pixels; attention computes their square
MAX_TOKENS = 4096  # L, of a caption. T5 encoders read up to 512; attention computes their square
MAX_STATES = 2**22  # L x D, numbers in one caption's states: 16 MiB in float32. T5-XXL has 512 x 4096
MAX_LABELS = 65_536  # of a class-conditional network. ImageNet-21k has 21,841
MAX_INPUT = 4096  # pixels per side that a frozen network reads. DINOv2 reads 224 to 518
MAX_TARGET_DIMS = 64  # components per place of targets of representation. ReDi stores 8
MAX_TARGET_GRID = 64  # places per side of an image
MAX_RATIO = 64.0  # hidden width of an MLP over D. Networks have 4
MAX_TIME = 1e6  # scale of the time that a network reads. DDPM has 1,000
# Measured curves.
MAX_NODES = 1024  # log-SNR nodes of a calibration or a stacking. Atoll measures 19
MAX_LOG_SNR = 100.0  # either sign; beyond 88 exp() overflows in float32
MAX_ERROR = 1e30  # a mean squared error; squares of float32 stay finite below 3e38
# Text and files.
MAX_NAME = 255  # characters; experts' names are names of directories, which hold 255 bytes
MAX_CAPTION_BYTES = 1 << 16  # the longest prompt that a text encoder reads, 512 tokens, has some 3,000
MAX_TEXT = 65_536  # characters of any other string: one of 10,000 words
CARD_BYTES = 8 << 20  # of a card's file. A thousand experts with 19 stacking nodes take 1 MiB
JSON_BYTES = 64 << 20  # of any JSON file. The index of a billion rows takes 40 MiB
PLAIN_DEPTH = 12  # levels of lists and objects in a network's or an encoder's configuration. diffusers has 3

_WHOLE = 2**53  # JSON readers hold whole numbers exactly up to here

# Whole numbers. `strict` refuses strings, floats and booleans.
Count = Annotated[int, Field(strict=True, ge=0, le=_WHOLE)]
PositiveCount = Annotated[int, Field(strict=True, ge=1, le=_WHOLE)]
Seed = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]  # what torch.Generator takes
Steps = Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS)]
ClusterCount = Annotated[int, Field(strict=True, ge=1, le=MAX_CLUSTERS)]
Outputs = Annotated[int, Field(gt=0, le=MAX_CLUSTERS)]  # of a router
ClusterNumber = Annotated[int, Field(strict=True, ge=0, lt=MAX_CLUSTERS)]
Clusters = Annotated[tuple[ClusterNumber, ...], Field(min_length=1, max_length=MAX_CLUSTERS)]
GrowthSteps = Annotated[tuple[ClusterNumber | None, ...], Field(max_length=MAX_ANCESTORS)]  # of a router

# Sizes of networks. Not strict: configurations come from atoll.yaml and from scripts, too.
Channels = Annotated[int, Field(gt=0, le=MAX_CHANNELS)]
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
Width = Annotated[int, Field(gt=0, le=MAX_DIM)]
Depth = Annotated[int, Field(gt=0, le=MAX_DEPTH)]
DualBlocks = Annotated[int, Field(ge=0, le=MAX_DEPTH)]  # of the blocks
TokenCount = Annotated[int, Field(gt=0, le=MAX_TOKENS)]
TargetDims = Annotated[int, Field(strict=True, ge=1, le=MAX_TARGET_DIMS)]
TargetGrid = Annotated[int, Field(strict=True, ge=1, le=MAX_TARGET_GRID)]
InputSide = Annotated[int, Field(gt=0, le=MAX_INPUT)]  # of what a frozen network reads
MlpRatio = Annotated[float, Field(gt=0, le=MAX_RATIO, allow_inf_nan=False)]
TimeScale = Annotated[float, Field(gt=0, le=MAX_TIME, allow_inf_nan=False)]
Epsilon = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]  # of a norm

# Real numbers, always finite.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Deviation = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Ratio = Annotated[float, Field(strict=True, ge=0, le=MAX_CLUSTERS)]  # of a cluster's size to the mean
Guidance = Annotated[float, Field(strict=True, ge=-MAX_GUIDANCE, le=MAX_GUIDANCE)]
LoraScale = Annotated[float, Field(strict=True, ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)]
Shift = Annotated[float, Field(strict=True, ge=1 / MAX_SHIFT, le=MAX_SHIFT)]
Seconds = Annotated[float, Field(strict=True, ge=0, le=1e10)]  # 300 years
_LogSNR = Annotated[float, Field(strict=True, ge=-MAX_LOG_SNR, le=MAX_LOG_SNR)]
# Rounding of a difference of sums leaves exact estimates with an error slightly below 0.
SquaredError = Annotated[float, Field(strict=True, ge=-1e-3, le=MAX_ERROR)]
StackingWeight = Annotated[float, Field(strict=True, ge=0, le=1e12)]  # of an estimate that may be as small as 1e-12


def _increasing(nodes: tuple[float, ...]) -> tuple[float, ...]:
    # Curves are interpolated between neighbouring nodes, so two equal ones would divide by zero.
    if any(a >= b for a, b in pairwise(nodes)):
        raise ValueError("expected log-SNR nodes that increase")
    return nodes


Nodes = Annotated[tuple[_LogSNR, ...], Field(min_length=2, max_length=MAX_NODES), AfterValidator(_increasing)]


def _printable(name: str) -> str:
    # Otherwise an expert's name could control the terminal that shows it.
    if not name.isprintable():
        raise ValueError(f"got {name!r:.60}, expected a name without control characters")
    return name


# Text. A name is never empty.
Name = Annotated[str, Field(strict=True, min_length=1, max_length=MAX_NAME)]
PartName = Annotated[Name, AfterValidator(_printable)]  # of an expert: shown on terminals and pages
FreeText = Annotated[str, Field(strict=True, max_length=MAX_TEXT)]
Sha256 = Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")]
# In the card's own directory: no slash, and no leading dot.
FileName = Annotated[str, Field(strict=True, max_length=MAX_NAME, pattern="^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


def _latent_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    # Each side may be within its own limit and the product still fill the memory.
    if math.prod(shape) > MAX_LATENT:
        raise ValueError(f"a latent of {math.prod(shape):,} numbers, expected at most {MAX_LATENT:,}")
    return shape


# Shapes of latents and of columns.
_Channels = Annotated[int, Field(strict=True, ge=1, le=MAX_CHANNELS)]
_Side = Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE)]
LatentShape = Annotated[tuple[_Channels, _Side, _Side], AfterValidator(_latent_shape)]  # (C, H, W)
_Extent = Annotated[int, Field(strict=True, ge=0, le=MAX_LATENT)]
RowShape = Annotated[tuple[_Extent, ...], Field(max_length=8), AfterValidator(_latent_shape)]  # of a column, per row


def plain(value: Any, depth: int = PLAIN_DEPTH) -> Any:
    """Copy a plain value and check its bounds. Tuples become lists.

    Args:
        value: a value that JSON can represent.
        depth: the largest number of nested lists and objects, default 12.

    Returns:
        The copy.

    Raises:
        ValueError: deeper nesting, a number that is not finite or beyond 64 bits, a long string, another type.
    """
    # Scalars. bool comes before int, of which it is a subclass.
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ValueError("a whole number beyond 64 bits")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value}, expected a finite number")
        return value
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(f"a string of {len(value):,} characters, expected at most {MAX_TEXT:,}")
        return value
    # Containers, one level deeper.
    if depth == 0:
        raise ValueError(f"more than {PLAIN_DEPTH} levels of lists and objects")
    if isinstance(value, dict):
        if not all(isinstance(key, str) and len(key) <= MAX_NAME for key in value):
            raise ValueError(f"a key that is no string of at most {MAX_NAME} characters")
        return {key: plain(one, depth - 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, depth - 1) for one in value]
    raise ValueError(f"a value of type {type(value).__name__}, which JSON does not hold")


# A path would let a stranger's card read any file of this machine.
LABELS_IN_CARDS = "labels is no list; expected the labels: write the card again, with the list in place of a path"


def _condition(value: Any) -> Any:
    if isinstance(value, dict) and value.get("name") == "label" and not isinstance(value.get("labels"), list | tuple):
        raise ValueError(LABELS_IN_CARDS)
    return plain(value)


PlainValue = Annotated[Any, BeforeValidator(plain)]
# The configuration of a network, an objective or an encoder, whose class checks the content.
Plain = Annotated[dict[str, Any], BeforeValidator(plain)]
ConditionConfig = Annotated[dict[str, Any], BeforeValidator(_condition)]  # of a text encoder
