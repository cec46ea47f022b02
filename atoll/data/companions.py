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
_SUFFIX = re.compile(rf"(.+)[-_. ]\(?({'|'.join(_WORDS)})\)?(?:[-_. ]?\d+)?", re.IGNORECASE | re.DOTALL)
_PREFIX = re.compile(r"(mask|masklabel|depth|seg|segmentation)[-_. ](.+)", re.IGNORECASE | re.DOTALL)
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
    """Split "cat_mask", "cat_mask_2" or "mask_cat" into ("cat", "mask"); None for a name without such a word."""
    if match := _SUFFIX.fullmatch(stem):
        return match[1], match[2].lower()
    match = _PREFIX.fullmatch(stem)
    return (match[2], match[1].lower()) if match else None


def is_always_companion(stem: str) -> bool:
    """Return whether a name always marks a companion, whatever is beside it."""
    pair = companion_suffix(stem)
    return pair is not None and pair[1] in _ALWAYS


def companions(images: Iterable[str], captioned: Collection[str]) -> dict[str, str]:
    """Find the images that belong to another image.

    An image is a companion if it has no caption of its own, and another image has its name without the suffix, or its
    name in a neighbouring folder that is not called after masks.

    Args:
        images: paths relative to the root, with slashes.
        captioned: those with a caption of their own.

    Returns:
        Each companion -> the word in its name that marks it.
    """
    stems: dict[str, set[str]] = defaultdict(set)  # folder -> names without extension
    near: dict[tuple[str, str], set[str]] = defaultdict(set)  # (folder above, name) -> folders that have it
    # First pass: index all names, since a companion may come before its image.
    names = list(images)
    for name in names:
        folder, stem = _parts(name)
        stems[folder].add(stem)
        near[posixpath.dirname(folder), stem].add(folder)
    words = {}
    for name in names:
        if name in captioned:
            continue
        folder, stem = _parts(name)
        pair = companion_suffix(stem)
        # A suffix in the same folder: cat_mask.png beside cat.jpg.
        if pair is not None and (pair[1] in _ALWAYS or pair[0] in stems[folder]):
            words[name] = pair[1]
        elif folder and (match := _FOLDER.fullmatch(posixpath.basename(folder))):
            # A folder of masks: the image has the same name in a neighbouring folder or the one above.
            above = posixpath.dirname(folder)
            others = {other for other in near[above, stem] if not _FOLDER.fullmatch(posixpath.basename(other))}
            if others or stem in stems[above] or _paired(stem, match[1], stems[above]):
                words[name] = match[1].lower()
    return words


def _paired(stem: str, word: str, stems: Collection[str]) -> bool:
    """Return whether a file in a folder of masks is named after an image above: mask/cat_mask.png for cat.jpg."""
    pair = companion_suffix(stem)
    return pair is not None and pair[0] in stems


def describe(words: Iterable[str]) -> str:
    """Count companions by word for a note: "40 masklabel, 2 depth"."""
    return ", ".join(f"{count:,} {word}" for word, count in Counter(words).most_common(5))


def _parts(name: str) -> tuple[str, str]:
    """Return folder and name without extension in canonical form: names that print alike are equal."""
    folder, file = posixpath.split(canonical(name))
    return folder, posixpath.splitext(file)[0]
