"""Commands that load the cards of others take --allow-hub and --trust-paths, and pass them on."""

import pytest
import typer
from typer.testing import CliRunner

from atoll.cli import app
from atoll.encoders.trust import Trust
from atoll.launch.job import jobs_of
from atoll.manifest import load_manifest

# Each command, and the function that gets the manifest.
TRAIN = ["train", "expert", "0"]
COMMANDS = [
    (TRAIN, "atoll.train.expert.train_expert"),
    (["train", "router"], "atoll.train.router.train_router"),
    (["train", "router", "--extend"], "atoll.train.extend_router.extend_router"),
    (["train", "monolith"], "atoll.train.expert.train_monolith"),
    (["distil"], "atoll.train.distil.distil_run"),
    (["synthesize", "out"], "atoll.synthesize.synthesize_run"),
    (["statistics"], "atoll.evaluate.run_statistics.statistics_run"),
    (["cluster"], "atoll.cluster.cluster_run"),
    (["launch"], "atoll.launch.run.jobs_of"),
]
FLAGS = [[], ["--allow-hub"], ["--trust-paths"], ["--allow-hub", "--trust-paths"]]


class Reached(Exception):
    """The function was called."""


@pytest.mark.parametrize(("command", "function"), COMMANDS, ids=lambda value: " ".join(value))
def test_what_the_user_allows_reaches_the_function(run, monkeypatch, command, function) -> None:
    trusts: list[Trust] = []

    def stop(*arguments: object, **options: object) -> None:
        trusts.append(arguments[1].trust_in_cards(run))  # type: ignore[attr-defined]
        raise Reached

    monkeypatch.setattr(function, stop)
    for flags in FLAGS:
        done = CliRunner().invoke(app, [*command, "--run", str(run), *flags])
        assert isinstance(done.exception, Reached), done.output
    assert [trust.hub for trust in trusts] == [False, True, False, True]
    assert [trust.paths for trust in trusts] == [False, False, True, True]
    assert {trust.run for trust in trusts} == {run}


def test_several_processes_and_a_launch_get_the_same_options(run, monkeypatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("atoll.train.workers.train_together", lambda arguments, count: started.append(arguments))
    assert CliRunner().invoke(app, [*TRAIN, "--run", str(run), "--nproc", "2", "--allow-hub"]).exit_code == 0
    assert started == [[*TRAIN, "--run", str(run), "--allow-hub"]]
    manifest = load_manifest(run)
    for job in jobs_of(run, manifest.allowing(hub=False, paths=True)):
        assert "--trust-paths" in job.arguments
        assert "--allow-hub" not in job.arguments
    assert manifest.allowing(hub=True, paths=True).model_dump() == manifest.model_dump()  # the training's mark is equal


def test_the_options_have_one_text_everywhere() -> None:
    texts: dict[str, set[str | None]] = {}
    commands = [("", typer.main.get_command(app))]
    names: set[str] = set()
    while commands:
        path, command = commands.pop()
        for name, inner in getattr(command, "commands", {}).items():
            commands.append((f"{path} {name}".strip(), inner))
        for option in command.params:
            if option.name in ("allow_hub", "trust_paths"):
                texts.setdefault(option.name, set()).add(getattr(option, "help", None))
                names.add(path)
    assert {len(each) for each in texts.values()} == {1}
    expected = {"assemble", "calibrate", "cluster", "convert", "distil", "evaluate", "launch", "sample", "statistics"}
    assert names >= expected | {"synthesize", "train expert", "train router", "train monolith", "train student"}
