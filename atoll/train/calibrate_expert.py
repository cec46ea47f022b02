"""Calibrates a trained or converted expert: `atoll calibrate`."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from atoll.calibration import Calibration
from atoll.encoders.codec.statistics import refuse_other_statistics
from atoll.encoders.text import TextEncoder, build_encoder
from atoll.encoders.trust import STRANGER, Trust
from atoll.encoders.weights import same
from atoll.ensemble.loading import load_expert
from atoll.errors import AtollError
from atoll.runtime.device import best_device
from atoll.schedule import PATH
from atoll.storage.artifact import read_card, read_tensors, save_artifact, write_bytes
from atoll.storage.cards import CalibrationRecord, ExpertCard
from atoll.storage.layout import RunLayout
from atoll.storage.shards import Shards, SkipList
from atoll.train.batches import CaptionedLatents, Rows
from atoll.train.calibrate import CALIBRATION_ROWS, calibrate
from atoll.train.denoiser import split_holdout
from atoll.train.skipped import left_out

Use = Literal["auto", "val", "all"]
UNKNOWN = "unknown"  # the name of a converted expert's codec or condition that was not specified


def calibrate_expert(
    path: Path,
    shards: Sequence[Path],
    *,
    out: Path | None = None,
    use: Use = "auto",
    rows: int = CALIBRATION_ROWS,
    skip: Path | None = None,
    seed: int | None = None,
    device: torch.device | None = None,
    trust: Trust = STRANGER,
) -> Calibration:
    """Measure the calibration of the expert at `path` and write it, with unchanged weights.

    Args:
        path: the expert's directory.
        shards: directories of latents of its clusters.
        out: the directory of the calibrated expert; None to replace the old one.
        use: which latents to measure on. "auto": those that its training held out, or the val split. "val": the val
            split. "all": every row, for an expert that was not trained on these shards.
        rows: latents at most, chosen by the seed.
        skip: a list of keys whose rows are left out: that of the expert's training, if it had one.
        seed: of rows and noise; None for the seed of the expert's training, which its own calibration used.
        device: None for a GPU if there is one.
        trust: what the expert's card may reach.

    Returns:
        The calibration.

    Raises:
        AtollError: the latents have another shape, codec or assignment, or none is held out; the text encoder of the
            expert is unknown; `out` exists already.
    """
    # Refuse bad arguments before the expert is loaded.
    if use not in get_args(Use):
        raise AtollError(f"--use {use}: expected one of {', '.join(get_args(Use))}")
    if out is not None and out.exists():
        raise AtollError(f"{out}: exists already; choose another directory, or omit --out to replace the old one")
    card = read_card(path, ExpertCard)
    if card.condition.get("name") == UNKNOWN:
        raise AtollError(f"{path}: its text encoder is unknown; convert it again with its condition")
    # Load the expert, and check that the latents fit it.
    device = device or best_device()
    loaded = load_expert(path, device, trust=trust)
    expert, parts = loaded.expert, [Shards(directory) for directory in shards]
    for part in parts:
        _check(card, part)
    parts = _without_skipped(card, parts, skip, path)
    held_out, every, measured_on = _held_out(card, parts, use, build_encoder(card.condition, trust), path)
    # The seed of the training reproduces its own calibration.
    if seed is None:
        seed = card.training.seed if card.training else 0
    # Measure, and write the expert with the new calibration and its old weights.
    calibration = calibrate(
        expert.network, expert.objective, held_out, mean=every.mean(), seed=seed, device=device, rows=rows
    )
    record = CalibrationRecord(
        **calibration.config(), measured_on=measured_on, rows=min(rows, len(held_out)), seed=seed
    )
    tensors = {k: v for k, v in read_tensors(path, card).items() if not k.startswith("calibration.")}
    tensors |= {f"calibration.{name}": value for name, value in calibration.tensors().items()}
    save_artifact(out or path, card.model_copy(update={"calibration": record}), tensors)
    return calibration


def shards_of(path: Path) -> list[Path]:
    """Return the directories of the expert's clusters in the run that contains `path`.

    Raises:
        AtollError: no run contains it, or the run lacks one of them.
    """
    card = read_card(path, ExpertCard)
    # An expert is in <run>/experts/<name>, a monolith or student in <run>/<name>.
    layouts = (RunLayout(parent) for parent in path.resolve().parents[:2])
    run = next((layout for layout in layouts if layout.clusters.is_dir()), None)
    if run is None:
        raise AtollError(f"{path}: is in no run with clusters/; name the latents with --shards")
    directories = [run.cluster(cluster) for cluster in card.clusters]
    if missing := [directory for directory in directories if not directory.is_dir()]:
        raise AtollError(f"{missing[0]}: not found; name the latents with --shards")
    return directories


def _check(card: ExpertCard, shards: Shards) -> None:
    """Raise AtollError unless the expert could have been trained on the latents of the shards."""
    actual = {**shards.data_card.plain(), "latent_shape": list(shards.shape("latent"))}
    expected = {key: card.plain().get(key) for key in ("latent_shape", "codec", "assignment")}
    for key, value in expected.items():
        # A converted expert may not know its codec or assignment.
        if value is None or (isinstance(value, dict) and value.get("name") == UNKNOWN):
            continue
        refuse_other_statistics(shards.path, actual.get(key), "the expert", value)
        if not same(value, actual.get(key)):
            raise AtollError(
                f"{shards.path}: its {key} is {actual.get(key)}, the expert's {value}; name shards of the expert's data"
            )
    # The latents of another cluster would give a curve for images that the expert never sees.
    if (cluster := actual.get("cluster")) is not None and cluster not in card.clusters:
        raise AtollError(
            f"{shards.path}: is cluster {cluster}, the expert's clusters are {list(card.clusters)}; name one of them"
        )


def _without_skipped(card: ExpertCard, shards: list[Shards], skip: Path | None, path: Path) -> list[Shards]:
    """Leave out the rows that a list names. Raises AtollError if it is not the list of the expert's training."""
    trained = card.training.skip if card.training else None
    if skip is None:
        if trained is not None:
            raise AtollError(
                f"{path}: was trained without {trained.keys:,} rows of its data; name the list of their keys by --skip"
            )
        return shards
    keys = SkipList(skip).keys
    parts = [part.without(keys) for part in shards]
    record = left_out([key for part in parts for key in part.left_out_keys])
    if trained is not None and trained != record:
        count = 0 if record is None else record.keys
        raise AtollError(
            f"{skip}: leaves {count:,} rows out, and not the {trained.keys:,} rows that {path} was trained without; "
            "name the list of its training"
        )
    return parts


def _held_out(
    card: ExpertCard, shards: list[Shards], use: Use, encoder: TextEncoder, path: Path
) -> tuple[CaptionedLatents, Rows, str]:
    """(latents to measure on, the cluster's training rows, the kind of the former)."""
    every, val = Rows.of(shards, "train"), Rows.of(shards, "val")
    training = card.training
    # Foreign experts were trained on none of these rows.
    if use == "all":
        rows = Rows.of(shards, None)
        return CaptionedLatents(rows, encoder), rows, "all"
    # The rows that training held out are determined by their keys, so they can be selected again.
    if use == "auto" and training is not None and training.calibration_holdout:
        trained, holdout, measured_on = split_holdout(shards, encoder, training.calibration_holdout)
        # Other shards would hold out other rows, some of which the expert has seen.
        if len(trained) != training.rows:
            raise AtollError(
                f"{path}: was trained on {training.rows:,} rows, these shards have {len(trained):,}, so the rows "
                "that it never saw are unknown; take --use val, or other shards and --use all"
            )
        return holdout, trained.rows, measured_on
    # The val split, which no training reads.
    if not len(val):
        raise AtollError(f"{shards[0].path}: no row is held out (split val); take other shards and --use all")
    return CaptionedLatents(val, encoder), every if len(every) else val, "val"


def table(calibration: Calibration) -> str:
    """Return the curves as text, one line per noise level, from clean to noisy."""
    # The nodes increase in log-SNR, so clean comes first when they are read backwards.
    lines = ["    t  log-SNR   slope  x0 error, raw -> corrected  velocity error"]
    for i in range(len(calibration.log_snr) - 1, -1, -1):
        level = calibration.log_snr[i]
        lines.append(
            f"{float(PATH.time_at(level[None].double())):.3f} {float(level):+8.2f} {float(calibration.slope[i]):7.3f}"
            f" {float(calibration.x0_mse_raw[i]):14.4f} -> {float(calibration.x0_mse[i]):<9.4f}"
            f" {float(calibration.velocity_mse[i]):15.4f}"
        )
    return "\n".join(lines)


def plot(calibration: Calibration, file: Path, title: str) -> None:
    """Plot the curves over t into an image file: the slope, and the errors before and after the correction.

    Raises:
        AtollError: matplotlib is not installed, it does not know the format, or the file cannot be written.
    """
    # Matplotlib is optional: only this function needs it.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise AtollError("a plot needs matplotlib: pip install 'atoll[data]'") from None
    t = PATH.time_at(calibration.log_snr.double())
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    # The slope on the left, the errors on the right.
    left.plot(t, calibration.slope, marker=".")
    left.set(xlabel="t (0 data, 1 noise)", ylabel="slope of x0 - m over its estimate", ylim=(-0.03, 1.05))
    right.semilogy(t, calibration.x0_mse_raw, marker=".", label="x0, raw")
    right.semilogy(t, calibration.x0_mse, marker=".", label="x0, corrected")
    right.semilogy(t, calibration.velocity_mse, marker=".", label="velocity, corrected")
    right.set(xlabel="t", ylabel="mean squared error")
    right.legend()
    # A grid makes values readable at the noise levels between.
    for axes in (left, right):
        axes.grid(alpha=0.3)
    encoded = io.BytesIO()
    try:
        figure.savefig(encoded, format=file.suffix.removeprefix(".") or "png", dpi=110)
    except ValueError as error:
        raise AtollError(f"{file}: {error}; name a .png file") from None
    write_bytes(file, encoded.getvalue())
