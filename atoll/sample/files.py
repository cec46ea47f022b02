"""One PNG file per image, with its settings inside: resumable, and of any number of prompts."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from atoll import __version__
from atoll.choices import Method
from atoll.errors import AtollError
from atoll.image_settings import ImageSettings, encode_png, read_settings
from atoll.image_size import ImageSize
from atoll.pipeline import Pipeline
from atoll.sample.options import PromptImages
from atoll.sample.source import ModelSource
from atoll.storage.artifact import write_bytes
from atoll.storage.cards import EnsembleCard, parse_record
from atoll.storage.lock import hold
from atoll.time_shift import check_shift

BATCH = 16  # images sampled at a time: what a kill loses, and what is in memory
_LEFTOVER = re.compile(r"\.\d{6,}-(-?\d+)\.png\.\d+-\d+\.tmp")  # of a process that was killed while it wrote

Progress = Callable[[int, int, str], Any]  # (images done, all images, a note)


@dataclass(frozen=True)
class WrittenImages:
    """What `sample_to_files` did.

    Attributes:
        written: images sampled and written.
        skipped: images that were there already.
        dropped: the experts that were dropped while sampling, and why.
    """

    written: int
    skipped: int
    dropped: dict[str, str]


def image_name(number: int, seed: int) -> str:
    """Return the file name of an image: prompt 1, seed 7 -> 000001-7.png."""
    # Padded numbers, so that names sort by prompt.
    return f"{number:06d}-{seed}.png"


def sample_to_files(
    source: ModelSource,
    requests: Callable[[], Iterable[PromptImages]],
    directory: Path,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_range: tuple[float, float] = (0.0, 1.0),
    method: Method | None = None,
    size: ImageSize | None = None,
    shift: float | None = None,
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> WrittenImages:
    """Sample each prompt's images and write one PNG file per image, with its settings inside.

    Images that are there, whole and of the same settings, are skipped: call it again to resume, or with more seeds to
    add images. Memory does not grow with the number of prompts.

    Args:
        source: the ensemble or expert.
        requests: returns the prompts with their seeds; called several times: to check them, to compare them with the
            directory, and to sample. Each time it must return the same.
        directory: created if it is missing.
        steps: default: the ensemble's, like guidance and method.
        guidance: the guidance scale.
        guidance_range: as in `Pipeline`.
        method: as in `Pipeline`.
        size: of the images; None: the ensemble's main size.
        shift: as in `Pipeline`.
        batch_size: images sampled at a time.
        progress: called with (images done, all images, a note).

    Raises:
        AtollError: invalid prompts or settings; a directory that is not writable, or that holds an image of other
            settings or a damaged one under a name that is needed. Then nothing was sampled.
    """
    if batch_size < 1:
        raise AtollError(f"--batch is {batch_size}; expected a number of images from 1")
    # All prompts are checked before the ensemble is loaded, which takes longer.
    total = sum(len(request.seeds) for request in requests())
    report = progress or (lambda *_: None)
    _check_writable(directory)
    pipe = source.load()
    base = _settings(pipe, source, steps, guidance, guidance_range, method, size=size, shift=shift)
    # What no image can be sampled with is refused before the directory is created.
    for request in requests():
        if request.negative_prompt and base.guidance_scale == 1.0:
            raise AtollError(
                f"prompt {request.number}: its negative prompt changes nothing at guidance_scale 1; set --guidance, or "
                "leave it out"
            )
        if request.negative_prompt and source.weak is not None:
            raise AtollError(
                f"prompt {request.number}: its negative prompt has no effect with --weak, which takes its place; leave "
                "one out"
            )
        _of(base, request, request.seeds[-1])  # the largest, if they count up beyond 64 bits
    lock = _prepared(directory)
    try:
        # Compare with the images that are there.
        skipped = 0
        for request in requests():
            for seed in request.seeds:
                skipped += _is_there(directory / image_name(request.number, seed), _of(base, request, seed))

        # Sample what is missing, batch by batch, and write each batch at once.
        done = skipped
        report(done, total, "")
        for batch in _batches(requests(), directory, batch_size):
            _sample_batch(pipe, base, batch, directory, partial(report, done, total))
            done += sum(len(seeds) for _, seeds in batch)
            report(done, total, "")
    finally:
        lock.close()
    return WrittenImages(done - skipped, skipped, dict(pipe.sampler.dropped))


def _check_writable(directory: Path) -> None:
    """Raise AtollError if the directory cannot be written or created; nothing is created yet."""
    # Of a directory that is missing, the nearest one that exists decides.
    nearest = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise AtollError(f"{directory}: cannot be created, since {nearest} is no directory; name another directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise AtollError(f"{directory}: {nearest} is not writable; name another directory")


def _prepared(directory: Path) -> IO[str]:
    """Create the directory, lock it, and remove what a killed process left in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = hold(directory, "sampling")
        # Nobody else writes here now, so these have no process any more.
        for file in directory.iterdir():
            if _LEFTOVER.fullmatch(file.name):
                file.unlink(missing_ok=True)
    except OSError as error:
        raise AtollError(f"{directory}: cannot be written ({error.strerror}); name another directory") from None
    return lock


def _settings(
    pipe: Pipeline,
    source: ModelSource,
    steps: int | None,
    guidance: float | None,
    guidance_range: tuple[float, float],
    method: Method | None,
    *,
    size: ImageSize | None,
    shift: float | None,
) -> ImageSettings:
    """Return the settings of all images, completed by the ensemble's defaults; prompt and seed are placeholders."""
    loaded = pipe.loaded
    ensemble, card, defaults = loaded.ensemble, loaded.card, loaded.sampling
    # Experts that were missing when it was loaded make other images.
    names = {expert.name for expert in ensemble.experts}
    missing = [one.name for one in card.experts if one.name not in names] if isinstance(card, EnsembleCard) else []
    size = loaded.sizes.choose(*(size or ()))
    values = {
        "prompt": "",
        "seed": 0,
        "steps": defaults.steps_or(50) if steps is None else steps,
        "guidance_scale": float(defaults.guidance_or(1.0) if guidance is None else guidance),
        "guidance_range": tuple(map(float, guidance_range)),
        "method": method or defaults.method or "euler",
        "routing": ensemble.routing,
        "alignment": ensemble.alignment,
        "replicas": ensemble.replicas,
        "weights": source.weights,
        "shift": loaded.shift(size) if shift is None else check_shift(shift),
        "size": (size.width, size.height),
        "ensemble": source.shown_name(),
        "ensemble_sha256": source.sha256(),
        **source.weak_settings(),
        "missing_experts": tuple(missing),
        "version": __version__,
    }
    return parse_record(ImageSettings, values, "sampling settings")


def _of(base: ImageSettings, request: PromptImages, seed: int, dropped: Sequence[str] = ()) -> ImageSettings:
    """Return one image's settings, validated, so that what is written can be read back."""
    own = {"prompt": request.prompt, "negative_prompt": request.negative_prompt, "seed": seed}
    values = {**base.model_dump(), **own, "dropped_experts": tuple(dropped)}
    return parse_record(ImageSettings, values, f"prompt {request.number}")


def _is_there(file: Path, settings: ImageSettings) -> bool:
    """Whether an image is there, whole and of these settings. Raises AtollError for another file of its name."""
    if not os.path.lexists(file):
        return False
    # Never overwritten: it may be somebody's work.
    remedy = "name another directory, or remove it"
    try:
        differences = read_settings(file, whole=True).differences(settings)
    except AtollError as error:
        raise AtollError(f"{error}; {remedy}") from None
    if differences:
        raise AtollError(f"{file}: is an image of other settings ({', '.join(differences)}); {remedy}")
    return True


def _batches(
    requests: Iterable[PromptImages], directory: Path, size: int
) -> Iterator[list[tuple[PromptImages, list[int]]]]:
    """Return the missing images: batches of prompts with some of their seeds, at most `size` images each."""
    batch: list[tuple[PromptImages, list[int]]] = []
    room = size
    for request in requests:
        missing = [seed for seed in request.seeds if not (directory / image_name(request.number, seed)).exists()]
        # A prompt of many images continues in the next batch.
        while missing:
            batch.append((request, missing[:room]))
            missing, room = missing[room:], room - len(missing[:room])
            if room == 0:
                yield batch
                batch, room = [], size
    if batch:
        yield batch


def _sample_batch(
    pipe: Pipeline,
    base: ImageSettings,
    batch: Sequence[tuple[PromptImages, list[int]]],
    directory: Path,
    note: Callable[[str], Any],
) -> None:
    """Sample a batch and write its files."""
    negatives = [request.negative_prompt for request, _ in batch]
    output = pipe(
        [request.prompt for request, _ in batch],
        num_inference_steps=base.steps,
        guidance_scale=base.guidance_scale,
        seeds=[seed for _, seeds in batch for seed in seeds],
        # Without any, the ensemble's own null condition.
        negative_prompt=negatives if any(negatives) else None,
        images_per_prompt=[len(seeds) for _, seeds in batch],
        method=base.method,
        guidance_range=base.guidance_range,
        width=base.size[0],
        height=base.size[1],
        shift=base.shift,
        batch_size=sum(len(seeds) for _, seeds in batch),
        callback=lambda done, steps: note(f"step {done}/{steps}"),
    )
    # Each file appears whole, under its final name.
    owners = [(request, seed) for request, seeds in batch for seed in seeds]
    for image, (request, seed) in zip(output.images, owners, strict=True):
        settings = _of(base, request, seed, tuple(output.dropped))
        write_bytes(directory / image_name(request.number, seed), encode_png(image, settings))
