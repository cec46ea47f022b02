"""A downloaded ensemble opens no file outside its directory; one's own run goes on working."""

import json
import os
import shutil
from pathlib import Path

import pytest

from atoll.ensemble.loading import load_ensemble, load_expert
from atoll.errors import AtollError
from atoll.storage.artifact import CARD, WEIGHTS


@pytest.fixture
def outside(trained_run, tmp_path) -> Path:
    """Experts and a router that are no part of the ensemble."""
    for part in ("experts", "router"):
        shutil.copytree(trained_run / part, tmp_path / "outside" / part)
    return tmp_path / "outside"


@pytest.fixture
def ensemble(trained_run, tmp_path) -> Path:
    """An ensemble with all its parts inside."""
    path = tmp_path / "downloaded"
    for part in ("experts", "router"):
        shutil.copytree(trained_run / part, path / part)
    shutil.copytree(trained_run / "ensemble", path, dirs_exist_ok=True)
    text = (path / "ensemble.json").read_text()
    (path / "ensemble.json").write_text(text.replace("../", ""))
    return path


def points_to(ensemble: Path, part: str, url: str) -> None:
    file = ensemble / "ensemble.json"
    card = json.loads(file.read_text())
    (card["router"] if part == "router" else card["experts"][0])["url"] = url
    file.write_text(json.dumps(card))


def test_an_ensemble_with_all_parts_inside_loads(ensemble) -> None:
    assert len(load_ensemble(ensemble).ensemble.experts) == 3


@pytest.mark.parametrize("again", ["experts/1-flow-linear", "./experts/../experts/1-flow-linear", "link"])
def test_an_expert_that_is_named_twice_is_refused(ensemble, again) -> None:
    (ensemble / "link").symlink_to("experts/1-flow-linear")
    points_to(ensemble, "experts", again)
    card = json.loads((ensemble / "ensemble.json").read_text())
    card["experts"][0]["sha256"] = card["experts"][1]["sha256"]
    (ensemble / "ensemble.json").write_text(json.dumps(card))
    with pytest.raises(AtollError, match=r"ensemble\.json: names .*1-flow-linear twice"):
        load_ensemble(ensemble)


@pytest.mark.parametrize("part", ["experts/0-eps-cosine", "router"])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_path_that_leads_out_is_refused_unless_the_user_trusts_it(ensemble, outside, part, absolute) -> None:
    url = str(outside / part) if absolute else f"experts/../../outside/{part}"
    points_to(ensemble, part, url)
    with pytest.raises(AtollError, match=r"ensemble\.json: names .*leads out of .*--trust-paths \(trust_paths=True\)"):
        load_ensemble(ensemble)
    assert len(load_ensemble(ensemble, trust_paths=True).ensemble.experts) == 3


def test_a_refusal_does_not_tell_whether_a_file_exists(ensemble, outside) -> None:
    messages = []
    for name in ("experts/0-eps-cosine", "experts/nothing-here"):
        points_to(ensemble, "experts", str(outside / name))
        with pytest.raises(AtollError, match="leads out of") as refused:
            load_ensemble(ensemble)
        messages.append(str(refused.value).replace(name, ""))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "link", ["experts", "experts/0-eps-cosine", f"experts/0-eps-cosine/{CARD}", f"router/{WEIGHTS}", "ensemble.json"]
)
def test_a_link_that_leads_out_is_refused(ensemble, outside, link) -> None:
    place, target = ensemble / link, outside / link
    if link == "ensemble.json":
        shutil.copy(place, target)
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(target)
    with pytest.raises(AtollError, match="leads out of"):
        load_ensemble(ensemble)
    assert len(load_ensemble(ensemble, trust_paths=True).ensemble.experts) == 3


def test_a_link_out_of_a_single_expert_is_refused(ensemble, outside) -> None:
    expert = ensemble / "experts" / "0-eps-cosine"
    (expert / WEIGHTS).unlink()
    (expert / WEIGHTS).symlink_to(outside / "experts" / "0-eps-cosine" / WEIGHTS)
    for load in (load_expert, load_ensemble):
        with pytest.raises(AtollError, match="leads out of"):
            load(expert)


def test_a_directory_that_the_user_names_may_be_a_link(ensemble, tmp_path) -> None:
    (tmp_path / "link").symlink_to(ensemble)
    assert len(load_ensemble(tmp_path / "link").ensemble.experts) == 3


def test_a_snapshot_in_the_hubs_cache_is_inside(ensemble, tmp_path) -> None:
    """There every file is a link to the blobs beside the snapshots; another link does not pass for one."""
    repository = tmp_path / "models--owner--name"
    snapshot = shutil.copytree(ensemble, repository / "snapshots" / "0123abc")
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(file for file in snapshot.rglob("*") if file.is_file())):
        blob = file.rename(repository / "blobs" / str(number))
        file.symlink_to(os.path.relpath(blob, file.parent))
    assert len(load_ensemble(snapshot).ensemble.experts) == 3
    (repository / "blobs").rename(tmp_path / "elsewhere")
    (repository / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AtollError, match="leads out of"):
        load_ensemble(snapshot)


def test_ones_own_run_is_sampled_without_a_flag(trained_run, tmp_path, atoll) -> None:
    code, _, error = atoll("sample", trained_run / "ensemble", "moss", "--steps", "1", "-o", "a.png")
    assert (code, error) == (0, "")


def test_the_command_takes_the_flag(ensemble, outside, atoll) -> None:
    points_to(ensemble, "router", str(outside / "router"))
    arguments = ("sample", ensemble, "moss", "--steps", "1", "-o", "a.png")
    code, _, error = atoll(*arguments)
    assert code == 2
    assert "--trust-paths" in error
    assert atoll(*arguments, "--trust-paths")[0] == 0
