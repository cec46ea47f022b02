"""The layout of a run: names round-trip, paths stay inside, seeds differ, and nobody else spells them."""

import ast
from pathlib import Path

import pytest

import atoll
from atoll.errors import AtollError
from atoll.storage import layout
from atoll.storage.layout import RunLayout, TrainingLayout, cluster_name, cluster_number


def paths_of(made: RunLayout | TrainingLayout) -> list[Path]:
    names = [name for name, value in vars(type(made)).items() if isinstance(value, layout._Below)]
    return [getattr(made, name) for name in names]


@pytest.mark.parametrize("number", [0, 7, 42, 999, 1000, 12345])
def test_cluster_names_round_trip(number) -> None:
    assert cluster_number(cluster_name(number)) == number


def test_cluster_names_sort_as_numbers_below_a_thousand() -> None:
    names = [cluster_name(number) for number in range(1000)]
    assert names == sorted(names)


@pytest.mark.parametrize(
    "name", ["", "cluster-", "cluster-3", "cluster-0003", "cluster--01", "cluster-003.txt", "cluster-abc", "003"]
)
def test_other_names_are_not_clusters(name) -> None:
    with pytest.raises(AtollError, match="expected a name such as cluster-000"):
        cluster_number(name)


def test_paths_of_a_run_differ_and_stay_inside(tmp_path) -> None:
    run = RunLayout(tmp_path)
    paths = [*paths_of(run), run.cluster(3), run.expert("3-flow")]
    assert len(paths) > 15
    assert len(set(paths)) == len(paths)
    assert all(path.resolve().is_relative_to(tmp_path) and path != tmp_path for path in paths)


@pytest.mark.parametrize("name", ["", ".", "..", "../3-flow", "3-a/b", "/etc", "3-a\\b"])
def test_expert_names_cannot_leave_the_run(tmp_path, name) -> None:
    with pytest.raises(AtollError, match="expected a plain name"):
        RunLayout(tmp_path).expert(name)


def test_training_state_lies_beside_its_artifact(tmp_path) -> None:
    artifact = RunLayout(tmp_path).expert("3-flow")
    training = TrainingLayout.of(artifact)
    assert training.root == tmp_path / "experts" / ".train-3-flow"
    assert training.name == "3-flow"
    paths = [*paths_of(training), training.sharded_checkpoint(300, 0), training.snapshot(300, 1), training.samples(300)]
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(training.root) for path in paths)


def test_every_part_of_a_run_has_its_own_seed() -> None:
    parts = (layout.monolith_seed, layout.router_seed, layout.student_seed)
    seeds = [part(seed) for part in parts for seed in range(3)]
    seeds += [layout.expert_seed(seed, number) for seed in range(3) for number in range(997)]
    assert len(set(seeds)) == len(seeds)


def test_seeds_are_those_of_the_recorded_results() -> None:
    assert [layout.expert_seed(2, number) for number in range(3)] == [2000, 2001, 2002]
    assert (layout.monolith_seed(2), layout.router_seed(2), layout.student_seed(2)) == (2999, 2998, 2997)


# What no other file spells: names of files and directories, clusters' names, seeds and exit codes.


def is_docstring(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    return isinstance(parents.get(node), ast.Expr)


def texts_of(node: ast.AST) -> list[str]:
    """A string's text; for an f-string, the text before its first placeholder."""
    if isinstance(node, ast.JoinedStr):
        return texts_of(node.values[0]) if node.values else []
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def spelt(source: str) -> list[str]:
    """Every place in a file's source that spells what the layout owns, as it stands there."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    bad: list[ast.AST] = []
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(op=ast.Div(), right=right) if any(text.split("/")[0] in NAMES for text in texts_of(right)):
                bad.append(node)  # run / "encoded"
            case ast.BinOp(op=ast.Mult()) if ast.unparse(node.left).endswith("manifest.seed"):
                bad.append(node)  # manifest.seed * 1000 + 3
            case ast.Constant() | ast.JoinedStr() if not is_docstring(node, parents):
                texts = texts_of(node)
                if any(("." in text and text in NAMES) or text.startswith(PREFIXES) for text in texts):
                    bad.append(node)  # "report.json", f"cluster-{number:03d}"
            case ast.Call(args=[ast.Constant(value=int(code)), *_]) if code and ast.unparse(node.func).endswith(EXITS):
                bad.append(node)  # sys.exit(2)
            case ast.Compare(comparators=[ast.Constant(value=int(code))]) if code and (
                ast.unparse(node.left).split(".")[-1] in ("code", "returncode") and isinstance(node.ops[0], ast.Eq)
            ):
                bad.append(node)  # ended.code == 2
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in bad]  # type: ignore[attr-defined]


def names_of_the_layout() -> set[str]:
    root = Path("/")
    paths = paths_of(RunLayout(root)) + paths_of(TrainingLayout(root))
    values = {value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
    return {part for path in paths for part in path.parts[1:]} | values


NAMES = names_of_the_layout()
PREFIXES = ("cluster-", ".train-", "checkpoint-")
EXITS = ("exit", "Exit", "SystemExit")
FILES = [file for file in sorted(Path(atoll.__file__).parent.rglob("*.py")) if file != Path(layout.__file__)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(Path(atoll.__file__).parent)))
def test_no_other_file_spells_the_layout(file) -> None:
    assert spelt(file.read_text()) == [], "take it from atoll.storage.layout"


@pytest.mark.parametrize(
    "source",
    [
        'run / "encoded"',
        'run / "clusters" / name',
        'run / f"experts/{name}"',
        'write(out, "report.json")',
        'path.with_name(f".train-{name}")',
        'f"cluster-{number:03d}"',
        'glob("cluster-*")',
        "seed = manifest.seed * 1000 + 7",
        "sys.exit(2)",
        "raise typer.Exit(3)",
        "os._exit(1)",
        "if ended.code == 2: pass",
    ],
)
def test_the_search_for_spelt_names_finds_them(source) -> None:
    assert spelt(source)


def test_the_search_leaves_prose_and_success_alone() -> None:
    source = "'''Writes report.json.'''\nprint(\"put it into atoll.yaml\", card[\"clusters\"])\nsys.exit(0)\nx / 2"
    assert spelt(source) == []
