"""Averages whose width is chosen after training: EDM2's formulas, snapshots on disk, and kills."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from atoll.ensemble.loading import load_expert
from atoll.errors import AtollError
from atoll.manifest import Manifest, load_manifest
from atoll.storage.artifact import WEIGHTS, read_card
from atoll.storage.cards import ExpertCard
from atoll.train.ema import WIDEST, decay, gamma_of, products, solve
from atoll.train.expert import train_expert
from atoll.train.snapshots import reconstruct_expert, snapshots_of

NAME, WIDTHS = "1-flow-linear", (0.05, 0.15)


def profile(gamma: float, steps: int, length: int) -> np.ndarray:
    """The weight of each of `length` steps after `steps` updates, computed by the updates themselves."""
    weights = np.zeros(length)
    for step in range(1, steps + 1):
        beta = decay(gamma, step)
        weights *= beta
        weights[step - 1] += 1 - beta
    return weights


@given(st.floats(0.01, 0.28))
def test_the_exponent_has_the_width(width) -> None:
    g = gamma_of(width)
    assert (g + 1) ** 0.5 / (g + 2) / (g + 3) ** 0.5 == pytest.approx(width, rel=1e-6)  # EDM2, appendix C


def test_exponents_of_published_widths() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.1) == pytest.approx(6.94, abs=0.01)
    assert gamma_of(WIDEST - 1e-9) == pytest.approx(0, abs=1e-6)
    for wrong in (0.0, -0.1, 0.3):
        with pytest.raises(AtollError, match="plain mean"):
            gamma_of(wrong)


def test_the_updates_follow_the_profile() -> None:
    """Standard deviation over length is sigma_rel, and scalar products equal the closed form."""
    length, time = 2000, np.arange(2000) + 0.5
    first, second = profile(gamma_of(0.1), 2000, length), profile(gamma_of(0.2), 1500, length)
    assert first.sum() == pytest.approx(1)
    mean = first @ time
    assert np.sqrt(first @ (time - mean) ** 2) / length == pytest.approx(0.1, rel=1e-3)
    for a, b in ((first, first), (first, second)):
        t_a, t_b = (np.array([2000.0 if x is first else 1500.0]) for x in (a, b))
        g_a, g_b = (np.array([gamma_of(0.1 if x is first else 0.2)]) for x in (a, b))
        assert products(t_a, g_a, t_b, g_b)[0, 0] == pytest.approx(a @ b, rel=1e-3)
        assert products(t_b, g_b, t_a, g_a)[0, 0] == pytest.approx(a @ b, rel=1e-3)


def test_reconstructed_averages_are_close_to_direct_ones() -> None:
    """Over a synthetic trajectory, a drifting curve with noise; a tracked width is reproduced."""
    length, every = 4096, 256
    g = torch.Generator().manual_seed(0)
    drift = torch.linspace(0, 1, length, dtype=torch.float64)[:, None] ** torch.tensor([0.5, 1.0, 2.0])
    path = (drift + 0.3 * torch.randn(length, 3, generator=g)).numpy()
    steps = [s for s in range(every, length + 1, every) for _ in WIDTHS]
    gammas = [gamma_of(width) for _ in range(every, length + 1, every) for width in WIDTHS]
    snapshots = np.stack([profile(g, s, length) @ path for s, g in zip(steps, gammas, strict=True)])
    exact = solve(steps, gammas, length, gamma_of(WIDTHS[1])) @ snapshots
    assert exact == pytest.approx(snapshots[-1], abs=1e-6)
    for width in (0.06, 0.1, 0.2):
        direct = profile(gamma_of(width), length, length) @ path
        assert solve(steps, gammas, length, gamma_of(width)) @ snapshots == pytest.approx(direct, abs=2e-3)
        assert abs(snapshots[-1] - direct).max() > 5e-3  # a tracked average alone is not close


def tracked(run: Path) -> Manifest:
    text = (run / "atoll.yaml").read_text()
    profiles = f"steps: 8\n  ema_profiles: {list(WIDTHS)}\n  ema_snapshot_every: 2"
    (run / "atoll.yaml").write_text(text.replace("steps: 8", profiles))
    return load_manifest(run)


def files(run: Path) -> list[str]:
    return [snapshot.file.name for snapshot in snapshots_of(run / f"experts/.train-{NAME}/ema")]


ALL = [f"{step:09d}-{number}.safetensors" for step in (2, 4, 6, 8) for number in (0, 1)]


def test_an_expert_is_reconstructed_with_another_width(run, tmp_path) -> None:
    manifest = tracked(run)
    expert = train_expert(run, manifest, "1")
    assert files(run) == ALL
    out = reconstruct_expert(expert, WIDTHS[0], tmp_path / "out")
    mine, last = load_file(out / WEIGHTS), load_file(run / f"experts/.train-{NAME}/ema" / ALL[-2])
    assert last.keys() == dict(load_expert(out).expert.network.named_parameters()).keys()
    for name, tensor in last.items():
        torch.testing.assert_close(mine[f"network.{name}"], tensor, rtol=1e-5, atol=1e-7)
    card = read_card(out, ExpertCard).plain()
    assert card["calibration"] is None
    assert card["training"]["ema"]["sigma_rel"] == WIDTHS[0]
    other = load_file(reconstruct_expert(expert, 0.1, tmp_path / "other") / WEIGHTS)
    assert not torch.equal(other["network.final.weight"], mine["network.final.weight"])
    with pytest.raises(AtollError, match="exists"):
        reconstruct_expert(expert, 0.1, tmp_path / "other")


def test_snapshots_are_bit_exact_after_a_kill(run, tmp_path) -> None:
    class Stop(Exception):
        pass

    def stop(line):
        if line["step"] == 6:  # the last checkpoint is of step 6, and the snapshot of step 8 does not exist yet
            raise Stop

    whole = shutil.copytree(run, tmp_path / "whole")
    train_expert(whole, tracked(whole), "1")
    manifest = tracked(run)
    with pytest.raises(Stop):
        train_expert(run, manifest, "1", progress=stop)
    directory = run / f"experts/.train-{NAME}/ema"
    left = load_file(whole / f"experts/.train-{NAME}/ema" / ALL[-1])
    save_file({name: tensor + 1 for name, tensor in left.items()}, directory / "000000007-0.safetensors")
    train_expert(run, manifest, "1", resume=True)
    assert files(run) == ALL
    for name in ALL:
        mine, other = load_file(directory / name), load_file(whole / f"experts/.train-{NAME}/ema" / name)
        assert all(torch.equal(mine[key], other[key]) for key in other)


def test_one_changed_byte_of_a_snapshot_is_noticed(run, tmp_path) -> None:
    expert = train_expert(run, tracked(run), "1")
    file = snapshots_of(run / f"experts/.train-{NAME}/ema")[0].file
    data = bytearray(file.read_bytes())
    data[-6] ^= 1
    file.write_bytes(data)
    with pytest.raises(AtollError, match=rf"{file.name}: damaged .*remove it to use the others"):
        reconstruct_expert(expert, 0.1, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    file.unlink()
    assert reconstruct_expert(expert, 0.1, tmp_path / "out").is_dir()


def test_missing_and_foreign_snapshots_are_named(run, trained_run, tmp_path) -> None:
    with pytest.raises(AtollError, match=r"no snapshots.*ema_profiles"):
        reconstruct_expert(trained_run / "experts" / NAME, 0.1, tmp_path / "out")
    expert = train_expert(run, tracked(run), "1")
    shutil.rmtree(expert)
    shutil.copytree(trained_run / "experts" / NAME, expert)
    with pytest.raises(AtollError, match="belongs to another training"):
        reconstruct_expert(expert, 0.1, tmp_path / "out")
    assert not (tmp_path / "out").exists()
