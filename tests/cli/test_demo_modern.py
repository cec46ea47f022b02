"""`atoll demo --recipe modern-tiny` from start to end, made short: built-in data, and images of one's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from atoll.manifest import recipe_path
from atoll.storage.shards import Shards


def short(path: Path) -> Path:
    """The recipe with a few steps of a small network; everything else as it is."""
    content = yaml.safe_load(recipe_path("modern-tiny").read_text())
    content["clusters"]["k"] = 2
    content["experts"] = content["experts"][:2]
    content["network"] |= {"width": 32, "depth": 1, "heads": 2}
    content["train"] |= {"steps": 10, "warmup": 2, "batch": 8}
    content["router"] = {
        "network": {**content["router"]["network"], "width": 16, "depth": 1},
        "train": {"steps": 10, "batch": 8},
    }
    content["sampling"]["steps"] = 3
    content["evaluate"] |= {"images": 32, "steps": 3, "prompts": content["evaluate"]["prompts"][:2]}
    # `--data` replaces values in place, so the text must have them.
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def check(run: Path) -> dict:
    """Both sizes are drawn; returns the report."""
    for name, (width, height) in (("samples", (24, 24)), ("samples-16x24", (16, 24))):
        with Image.open(run / f"{name}.png") as sheet:
            # Two images side by side, with gaps.
            assert abs(sheet.width / sheet.height - 2 * width / height) < 0.1
    report = json.loads((run / "report.json").read_text())
    assert list(report["grid"]["keys"]) == ["top-1", "top-2", "full", "top-2, 16x24"]
    assert "images of “latin capital letter a, mono bold” by top-2, 16x24" in (run / "report.html").read_text()
    return report


@pytest.mark.slow  # every stage, in several processes
def test_built_in_glyphs_of_two_shapes(atoll, tmp_path) -> None:
    code, _, error = atoll("demo", tmp_path / "run", "--recipe", short(tmp_path / "modern.yaml"), "-j", 1)
    assert code == 0, error
    check(tmp_path / "run")
    assert Shards(tmp_path / "run" / "encoded").shapes("latent") == ((3, 24, 24), (3, 24, 16))
    for k in range(2):
        assert len(Shards(tmp_path / "run" / "clusters" / f"cluster-{k:03d}").shapes("latent")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("portraits", [True, False])
def test_images_of_ones_own(atoll, tmp_path, portraits) -> None:
    folder, g = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(80):
        height, width = (40, 25) if portraits and number % 3 == 0 else (30, 33)
        pixels = g.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a {('red', 'grey', 'green')[number % 3]} carpet")
    recipe = short(tmp_path / "modern.yaml")
    code, text, error = atoll("demo", tmp_path / "run", "--recipe", recipe, "--data", folder, "-j", 1)
    assert code == 0, error
    check(tmp_path / "run")
    # A bucket that no image fills is one line, and so is drawing its size.
    empty = [line for line in text.splitlines() if "no image fills 16x24" in line]
    untrained = [line for line in error.splitlines() if "no expert was trained for images of 16x24" in line]
    assert (len(empty), len(untrained)) == ((0, 0) if portraits else (1, 1))
