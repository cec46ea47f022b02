"""The log of a training: what a resumed training reads of it."""

import pytest

from atoll.errors import AtollError
from atoll.train.track import Tracker, read_metrics


def test_a_last_line_that_a_crash_cut_off_is_left_out(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": NaN, "other": "x"}\n{"step": 2, "lo\xff')
    (line,) = read_metrics(tmp_path)
    assert (line["step"], line["other"]) == (1, "x")
    assert read_metrics(tmp_path / "elsewhere") == []


@pytest.mark.parametrize(
    "line",
    [b"[1]", b"3", b"{}", b'{"step": "x"}', b'{"step": 1, "val": {"-2": 1e999}}', b'{"step": 1\xff}', b"[" * 9999],
)
def test_another_line_that_training_never_wrote_is_named(tmp_path, line) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(AtollError, match=r"metrics\.jsonl: line 2 is not what training writes; remove this file"):
        read_metrics(tmp_path)


def test_a_validation_loss_that_is_not_finite_ends_the_training(manifest, tmp_path) -> None:
    tracker = Tracker(tmp_path, 0, manifest.train, mark="m", progress=None, quiet=False)
    tracker.validated(3, {"-2": 0.5})
    with pytest.raises(AtollError, match=r"the validation loss at \+2 is nan after step 4, expected a finite one"):
        tracker.validated(4, {"-2": 0.5, "+2": float("nan")})
