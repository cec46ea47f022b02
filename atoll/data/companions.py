"""Masks and other companions of images: files named after an image that are no images to train on.

OneTrainer keeps `NAME-masklabel.png` and `NAME-condlabel.png` beside `NAME.jpg`; kohya and SimpleTuner keep masks and
conditioning images under the same names in a folder of their own.
"""

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

from atoll.data.names import canonical

_WORDS = (
    *("mask", "masks", "masked", "masklabel", "masklabels", "condlabel", "cond", "conditioning", "conditioning_image"),
    *("control", "controlnet", "depth", "depthmap", "seg", "segm", "segmentation", "semantic", "label", "labels"),
    *(
        "matte",
        "alpha",
        "trimap",
        "normal",
        "normals",
        "canny",
        "edge",
        "edges",
        "hed",
        "lineart",
        "scribble",
        "sketch",
    ),
    *("pose", "openpose", "saliency"),
)
_ALWAYS = ("masklabel", "condlabel")  # OneTrainer never trains on these, with or without an image
_SUFFIX = re.compile(rf"(.+)[-_. ]({'|'.join(_WORDS)})", re.IGNORECASE | re.DOTALL)
# Fewer words for folders: normal/, control/ and sketch/ are classes of medical and drawing data sets.
_FOLDER_WORDS: tuple[str, ...] = (
    "masks?",
    "masklabels?",
    "condlabels?",
    "conditioning(?:_data|_images?)?",
    "controlnet",
)
_FOLDER_WORDS += ("depth_?maps?", "segmentations?", "seg_?maps?", "trimaps?", "mattes?")
_FOLDER = re.compile(rf"(?:.*[-_. ])?({'|'.join(_FOLDER_WORDS)})", re.IGNORECASE | re.DOTALL)


def companion_suffix(stem: str) -> tuple[str, str] | None:
    """("cat", "mask") for "cat_mask"; None for a name without such a suffix."""
    match = _SUFFIX.fullmatch(stem)
    return (match[1], match[2].lower()) if match else None


def is_always_companion(stem: str) -> bool:
    """Whether a name is a companion's, whatever lies beside it."""
    pair = companion_suffix(stem)
    return pair is not None and pair[1] in _ALWAYS


def companions(images: Iterable[str], captioned: Collection[str]) -> dict[str, str]:
    """The images that belong to another image.

    An image is a companion if it has no caption of its own, and another image has its name without the suffix, or its
    name in a neighbouring folder that is not called after masks.

    Args:
        images: paths relative to the root, with slashes.
        captioned: those with a caption of their own.

    Returns:
        Each companion -> the word in its name that tells.
    """
    stems: dict[str, set[str]] = defaultdict(set)  # folder -> names without extension
    near: dict[tuple[str, str], set[str]] = defaultdict(set)  # (folder above, name) -> folders that have it
    names = list(images)
    for name in names:
        folder, stem = _parts(name)
        stems[folder].add(stem)
        near[posixpath.dirname(folder), stem].add(folder)
    found = {}
    for name in names:
        if name in captioned:
            continue
        folder, stem = _parts(name)
        pair = companion_suffix(stem)
        if pair is not None and (pair[1] in _ALWAYS or pair[0] in stems[folder]):
            found[name] = pair[1]
        elif folder and (match := _FOLDER.fullmatch(posixpath.basename(folder))):
            above = posixpath.dirname(folder)
            others = {other for other in near[above, stem] if not _FOLDER.fullmatch(posixpath.basename(other))}
            if others or stem in stems[above] or _paired(stem, match[1], stems[above]):
                found[name] = match[1].lower()
    return found


def _paired(stem: str, word: str, stems: Collection[str]) -> bool:
    """Whether a file in a folder of masks is named after an image above it: mask/cat_mask.png for cat.jpg."""
    pair = companion_suffix(stem)
    return pair is not None and pair[0] in stems


def describe(words: Iterable[str]) -> str:
    """What was left out, for a note: "40 masklabel, 2 depth"."""
    return ", ".join(f"{count:,} {word}" for word, count in Counter(words).most_common(5))


def _parts(name: str) -> tuple[str, str]:
    """Folder and name without extension, in letters that compare equal where they print alike."""
    folder, file = posixpath.split(canonical(name))
    return folder, posixpath.splitext(file)[0]
