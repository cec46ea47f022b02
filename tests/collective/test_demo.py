"""The story of a collective: four contributors, one who dies, one who is refused, one who comes late."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from atoll.collective.demo import ModelView, Story, World, poison, render, run_demo
from atoll.ensemble.loading import load_expert
from atoll.errors import AtollError
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard


def test_poisoned_weights_load_under_a_card_that_says_the_same(trained_run, tmp_path) -> None:
    name = "1-flow-linear"
    shutil.copytree(trained_run / "experts" / name, tmp_path / name)
    before, card = load_expert(tmp_path / name), read_card(tmp_path / name, ExpertCard)
    poison(tmp_path / name)
    after = load_expert(tmp_path / name)
    assert read_card(tmp_path / name, ExpertCard).calibration == card.calibration
    pairs = zip(before.expert.network.parameters(), after.expert.network.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["there", "--collective"], "there: exists; the story of a collective starts in a new directory"),
        (["new", "--collective", "--recipe", "tiny.yaml"], "expected an expert for each of four clusters, in order"),
        (["new", "--collective", "--jobs", "2"], "takes neither --data nor --jobs"),
    ],
)
def test_what_the_story_cannot_use_is_refused_in_one_line(atoll, tmp_path, arguments, problem) -> None:
    (tmp_path / "there").mkdir()
    shutil.copy(Path(__file__).parents[1] / "tiny.yaml", tmp_path)
    code, _, err = atoll("demo", *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert problem in err
    assert not (tmp_path / "new").exists()


def test_the_page_shows_what_happened_as_text_and_both_models(tmp_path) -> None:
    world = World(tmp_path)
    world.run("init", "founder", "--recipe", "collective")
    lines: list[str] = []
    story = Story(lines.append)
    story.add("ada", "publishes <b>")
    (tmp_path / "x.png").write_bytes(b"png")
    page = render(world, story, *(ModelView(n, tmp_path / "x.png", error) for n, error in ((3, 0.5), (4, 0.25))))
    assert lines == ["0:00 ada: publishes <b>"]
    assert "publishes &lt;b&gt;" in page
    assert re.findall(r"(\d) experts; mean squared error .*?: ([\d.]+)\.<", page) == [("3", "0.5000"), ("4", "0.2500")]


@pytest.mark.slow
def test_the_whole_story(tmp_path) -> None:
    recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "collective.yaml").read_text())
    recipe["train"] |= {"steps": 300}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines: list[str] = []
    page = run_demo(tmp_path / "reef", str(tmp_path / "recipe.yaml"), lines.append)
    told = "\n".join(lines)
    assert page.is_file()
    assert len(re.findall("accepted, and in", told)) == 4
    assert len(re.findall("2-flow-linear refused", told)) == 1
    errors = [float(error) for error in re.findall(r"experts, error ([\d.]+)", told)]
    assert errors[1] < errors[0]
    with pytest.raises(AtollError, match="exists; the story"):
        run_demo(tmp_path / "reef", None, lines.append)
