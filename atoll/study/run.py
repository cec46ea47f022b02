"""The whole of `atoll study`: every run of every seed, from images to a report."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from atoll.assemble import assemble_run
from atoll.cluster import cluster_run
from atoll.data.encode import encode_run
from atoll.errors import AtollError
from atoll.evaluate import evaluate_run
from atoll.launch.run import launch_run
from atoll.manifest import Manifest, load_manifest
from atoll.storage.artifact import CARD, write_bytes, write_json
from atoll.storage.layout import CLUSTERS, ENCODED, EVALUATION, EXPERTS, MONOLITH, ROUTER, STUDENT, RunLayout
from atoll.study.recipe import Study, run_path
from atoll.study.table import write_results
from atoll.synthesize import synthesize_run

# What a run was trained and measured for: where that has not changed, it need not be looked at again.
_TRAINED, _EVALUATED = ".trained.json", ".evaluated.json"
_OF_ENCODING = ("data", "codec", "condition", "feature")

Tell = Callable[[str], None]


def run_study(
    study: Study,
    out: Path,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    tell: Tell = lambda what: None,
) -> Path:
    """Trains and measures every run of every seed, seed by seed; returns the path of the table.

    What is done is not done again, what was interrupted goes on.

    Args:
        out: the study's directory; see `atoll.study.recipe`.
        seeds: instead of the study's.
        jobs: trainings at a time; None: as many as this machine has room for.
        tell: hears in a line what is done next.

    Raises:
        AtollError: as the stages; or `launch` was stopped.
    """
    seeds = tuple(seeds or study.seeds)
    for seed in seeds:
        for name in study.runs:
            tell(f"seed {seed}, {name}: training")
            run = train_one(study, name, seed, out, jobs)
            manifest = load_manifest(run)
            mark = {**_mark(manifest), "evaluate": manifest.evaluate.model_dump(mode="json")}
            if not _is_done(run / _EVALUATED, mark):
                tell(f"seed {seed}, {name}: evaluating")
                evaluate_run(run, manifest.evaluate, store=out / EVALUATION)
                write_json(run / _EVALUATED, mark)
                write_results(study, out, seeds)
    return write_results(study, out, seeds)


def train_one(study: Study, name: str, seed: int, out: Path, jobs: int | None) -> Path:
    """One run up to its ensemble; returns its directory."""
    run, manifest = run_path(out, seed, name), study.manifest_of(name, seed)
    layout = RunLayout(run)
    run.mkdir(parents=True, exist_ok=True)
    write_bytes(layout.manifest, yaml.safe_dump(study.content_of(name, seed), sort_keys=False).encode())
    manifest = load_manifest(run)
    like = study.runs[name].like
    if like is None:
        _link(layout.encoded, RunLayout(encode_once(manifest, out)).encoded)
        cluster_run(run, manifest)
    else:
        for part in (ENCODED, CLUSTERS, EXPERTS):
            _link(run / part, run.parent / like / part)
        missing = [e.full_name for e in manifest.experts if not (layout.expert(e.full_name) / CARD).is_file()]
        if missing:
            raise AtollError(f"study {study.name}: run {like} has no expert {', '.join(missing)}, which {name} takes")
    drawn = study.runs[name].drawn
    mark = {**_mark(manifest), **({"drawn": drawn} if drawn else {})}
    if not _is_done(run / _TRAINED, mark):
        if drawn is None:
            only = None if like is None else [ROUTER, *([MONOLITH] if manifest.monolith else [])]
            _train(run, manifest, jobs, only)
        else:
            _train_on_draws(run, manifest, jobs, drawn)
        write_json(run / _TRAINED, mark)
    return run


def _train(run: Path, manifest: Manifest, jobs: int | None, only: Sequence[str] | None) -> None:
    _launch(run, jobs, only)
    assemble_run(run, manifest)
    if manifest.student is not None:
        _launch(run, jobs, [STUDENT])


def _launch(run: Path, jobs: int | None, only: Sequence[str] | None) -> None:
    if not launch_run(run, jobs=jobs, only=only):
        raise AtollError(f"{run}: stopped; what was trained is saved, and the same command goes on")


def _train_on_draws(run: Path, manifest: Manifest, jobs: int | None, images: int) -> None:
    """Router and student, below drawn/, on latents that the experts draw; they are linked beside the real data."""
    drawn = run / "drawn"
    synthesize_run(run, manifest, drawn, images=images, resume=True)
    _train(drawn, manifest, jobs, [ROUTER])
    for part in (ROUTER, *([STUDENT] if manifest.student else [])):
        _link(run / part, drawn / part)
    assemble_run(run, manifest)


def encode_once(manifest: Manifest, out: Path) -> Path:
    """Encodes the manifest's data where no run of the study has; returns the directory that holds encoded/."""
    content = manifest.model_dump(mode="json", include=set(_OF_ENCODING))
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    run = out / ENCODED / name
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "what.json", content)
    encode_run(run, manifest, resume=True)
    return run


def _mark(manifest: Manifest) -> dict[str, object]:
    """All of a manifest that its training and assembly depend on."""
    return manifest.model_dump(mode="json", exclude={"name", "evaluate"})


def _is_done(file: Path, mark: dict[str, object]) -> bool:
    return file.is_file() and json.loads(file.read_text()) == mark


def _link(link: Path, target: Path) -> None:
    """A relative link, so that the study may be moved as a whole."""
    relative = os.path.relpath(target, link.parent)
    if link.is_symlink() and os.readlink(link) == relative:
        return
    if link.is_symlink() or link.exists():
        raise AtollError(
            f"{link}: is not the link to {relative} that the study makes; remove it, or name another --out"
        )
    link.symlink_to(relative, target_is_directory=True)
