"""Calibration of an expert that is trained already, here or elsewhere: `atoll calibrate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from atoll.calibration import Calibration
from atoll.encoders.text import TextEncoder, build_encoder
from atoll.encoders.weights import same
from atoll.ensemble.loading import load_expert
from atoll.errors import AtollError
from atoll.runtime.device import best_device
from atoll.schedule import PATH
from atoll.storage.artifact import read_card, read_tensors, save_artifact
from atoll.storage.cards import CalibrationRecord, ExpertCard
from atoll.storage.layout import RunLayout
from atoll.storage.shards import Shards
from atoll.train.batches import CaptionedLatents, Rows
from atoll.train.denoiser import CALIBRATION_ROWS, calibrate, split_holdout

Use = Literal["auto", "val", "all"]
UNKNOWN = "unknown"  # the name of a converted expert's codec or condition that nobody told


def calibrate_expert(
    path: Path,
    shards: Sequence[Path],
    *,
    out: Path | None = None,
    use: Use = "auto",
    rows: int = CALIBRATION_ROWS,
    seed: int | None = None,
    device: torch.device | None = None,
) -> Calibration:
    """Measures the calibration of the expert at `path` and writes it, with the weights as they were.

    Args:
        shards: directories of latents of its clusters.
        out: where the calibrated expert goes; None: in place of the old one.
        use: the latents that are used. "auto": those that its training held back, or the val split. "val"; "all":
            every row, for an expert that was not trained on these shards.
        rows: at most so many of them, chosen by the seed.
        seed: of the rows and the noise; None: that of the expert's training, as its own calibration had.
        device: None: a GPU where there is one.

    Raises:
        AtollError: the latents are of another shape, codec or assignment, or none is held out; captions cannot be
            encoded, since nothing says by what; `out` is there already.
    """
    if use not in get_args(Use):
        raise AtollError(f"--use {use}: expected one of {', '.join(get_args(Use))}")
    if out is not None and out.exists():
        raise AtollError(f"{out}: exists already; choose another place, or leave --out away to replace the old one")
    card = read_card(path, ExpertCard)
    if card.condition.get("name") == UNKNOWN:
        raise AtollError(f"{path}: nothing says what encodes its captions; convert it again with its condition")
    device = device or best_device()
    loaded = load_expert(path, device)
    expert, parts = loaded.expert, [Shards(place) for place in shards]
    for part in parts:
        _check(card, part)
    held_out, every, measured_on = _held_out(card, parts, use, build_encoder(card.condition), path)
    if seed is None:
        seed = card.training.seed if card.training else 0
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
    """The directories of the clusters of the expert at `path`, in the run that it lies in.

    Raises:
        AtollError: it lies in no run, or the run has not all of them.
    """
    card = read_card(path, ExpertCard)
    layouts = (RunLayout(parent) for parent in path.resolve().parents[:2])
    run = next((layout for layout in layouts if layout.clusters.is_dir()), None)
    if run is None:
        raise AtollError(f"{path}: lies in no run with clusters/; name the latents with --shards")
    found = [run.cluster(cluster) for cluster in card.clusters]
    if missing := [place for place in found if not place.is_dir()]:
        raise AtollError(f"{missing[0]}: not found; name the latents with --shards")
    return found


def _check(card: ExpertCard, shards: Shards) -> None:
    """Raises AtollError unless the shards hold latents that the expert could have been trained on."""
    found = {**shards.data_card.plain(), "latent_shape": list(shards.shape("latent"))}
    expected = {key: card.plain().get(key) for key in ("latent_shape", "codec", "assignment")}
    for key, value in expected.items():
        if value is None or (isinstance(value, dict) and value.get("name") == UNKNOWN):
            continue
        if not same(value, found.get(key)):
            raise AtollError(
                f"{shards.path}: its {key} is {found.get(key)}, the expert's {value}; name shards of the expert's data"
            )
    if (cluster := found.get("cluster")) is not None and cluster not in card.clusters:
        raise AtollError(f"{shards.path}: is cluster {cluster}, the expert is of {list(card.clusters)}; name its own")


def _held_out(
    card: ExpertCard, shards: list[Shards], use: Use, encoder: TextEncoder, path: Path
) -> tuple[CaptionedLatents, Rows, str]:
    """(latents to measure on, the cluster's training rows, what the former are)."""
    every, val = Rows.of(shards, "train"), Rows.of(shards, "val")
    training = card.training
    if use == "all":
        rows = Rows(shards, torch.arange(sum(map(len, shards))))
        return CaptionedLatents(rows, encoder), rows, "all"
    if use == "auto" and training is not None and training.calibration_holdout:
        trained, back, measured_on = split_holdout(shards, encoder, training.calibration_holdout)
        if len(trained) != training.rows:
            raise AtollError(
                f"{path}: was trained on {training.rows:,} rows, of these shards it would be {len(trained):,}: "
                "which of them it never saw cannot be told; take --use val, or other shards and --use all"
            )
        return back, trained.rows, measured_on
    if not len(val):
        raise AtollError(f"{shards[0].path}: no row is held out (split val); take other shards and --use all")
    return CaptionedLatents(val, encoder), every if len(every) else val, "val"


def table(calibration: Calibration) -> str:
    """The curves in text, a line per noise level, from clean to noisy."""
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
    """An image of the curves over t: the slope, and the errors before and after.

    Raises:
        AtollError: matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise AtollError("a plot needs matplotlib: pip install 'atoll[data]'") from None
    t = PATH.time_at(calibration.log_snr.double())
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    left.plot(t, calibration.slope, marker=".")
    left.set(xlabel="t (0 data, 1 noise)", ylabel="slope of x0 - m over its estimate", ylim=(-0.03, 1.05))
    right.semilogy(t, calibration.x0_mse_raw, marker=".", label="x0, raw")
    right.semilogy(t, calibration.x0_mse, marker=".", label="x0, corrected")
    right.semilogy(t, calibration.velocity_mse, marker=".", label="velocity, corrected")
    right.set(xlabel="t", ylabel="mean squared error")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
