"""`atoll study` as one function: every run of every seed, from images to a report."""

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
from atoll.storage.artifact import CARD, read_json, write_bytes, write_json
from atoll.storage.layout import (
    CLUSTERS,
    COMMON,
    ENCODED,
    EVALUATION,
    EXPERTS,
    GENERALIST,
    MONOLITH,
    ROUTER,
    STUDENT,
    RunLayout,
)
from atoll.study.recipe import Study, run_path
from atoll.study.table import write_results
from atoll.synthesize import synthesize_run

# In a run's directory: the settings it was trained and evaluated with. While they are the same, the work is skipped.
_TRAINED, _EVALUATED = ".trained.json", ".evaluated.json"
_ENCODING_SECTIONS = ("data", "codec", "condition", "feature")

Log = Callable[[str], None]


def run_study(
    study: Study,
    out: Path,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    log: Log = lambda line: None,
) -> Path:
    """Train and evaluate every run of every seed, seed by seed. Completed work is skipped, interrupted work resumes.

    Args:
        study: from `load_study`.
        out: the study's directory; see `atoll.study.recipe`.
        seeds: None: the study's.
        jobs: trainings at a time; None: as many as fit on this machine.
        log: called with a line before each step.

    Returns:
        The path of the table.

    Raises:
        AtollError: a stage failed, or the launch was stopped.
    """
    seeds = tuple(seeds or study.seeds)
    for seed in seeds:
        for name in study.runs:
            # Train up to the ensemble; what is trained already is skipped.
            log(f"seed {seed}, {name}: training")
            run = train_one(study, name, seed, out, jobs)
            manifest = load_manifest(run)

            # Evaluate, unless these very settings are evaluated already; the table grows with every run.
            settings = {**_training_settings(manifest), "evaluate": manifest.evaluate.model_dump(mode="json")}
            if not _is_done(run / _EVALUATED, settings):
                log(f"seed {seed}, {name}: evaluating")
                evaluate_run(
                    run,
                    manifest.evaluate,
                    store=out / EVALUATION,
                    trust=manifest.trust_in_cards(run),
                    skip=manifest.train.skip,
                )
                write_json(run / _EVALUATED, settings)
                write_results(study, out, seeds)
    return write_results(study, out, seeds)


def train_one(study: Study, name: str, seed: int, out: Path, jobs: int | None) -> Path:
    """Make one run up to its ensemble, and return its directory.

    Args:
        study: from `load_study`.
        name: which run of it.
        seed: of the run.
        out: the study's directory.
        jobs: trainings at a time; None: as many as fit on this machine.

    Raises:
        AtollError: a stage failed, or the launch was stopped.
    """
    run, manifest = run_path(out, seed, name), study.manifest_of(name, seed)
    layout = RunLayout(run)
    # The recipe may have changed since the last time: its manifest is written anew.
    run.mkdir(parents=True, exist_ok=True)
    write_bytes(layout.manifest, yaml.safe_dump(study.content_of(name, seed), sort_keys=False).encode())
    manifest = load_manifest(run)

    # Data, clusters and experts: its own, or those of the run that it is like.
    like = study.runs[name].like
    if like is None:
        _link(layout.encoded, RunLayout(encode_once(manifest, out)).encoded)
        cluster_run(run, manifest)
    else:
        for part in (ENCODED, CLUSTERS, EXPERTS):
            _link(run / part, run.parent / like / part)
        missing = [e.full_name for e in manifest.experts if not (layout.expert(e.full_name) / CARD).is_file()]
        if missing:
            raise AtollError(
                f"study {study.name}: run {like} has no expert {', '.join(missing)}, which run {name} needs"
            )
        # Its monolith or student may start from the common model; the generalist is in its ensemble.
        other = RunLayout(run.parent / like)
        for part, word in _shared_parts(manifest):
            if not (other.part(part) / CARD).is_file():
                raise AtollError(f"study {study.name}: run {like} has no {word}, which run {name} names")
            _link(layout.part(part), other.part(part))

    # Train what is left, unless these very settings are trained already.
    drawn = study.runs[name].drawn
    settings = {**_training_settings(manifest), **({"drawn": drawn} if drawn else {})}
    if not _is_done(run / _TRAINED, settings):
        if drawn is None:
            # A run that is like another has its experts already.
            only = None if like is None else [ROUTER, *([MONOLITH] if manifest.monolith else [])]
            _train(run, manifest, jobs, only)
        else:
            _train_on_draws(run, manifest, jobs, drawn)
        write_json(run / _TRAINED, settings)
    return run


def _shared_parts(manifest: Manifest) -> list[tuple[str, str]]:
    """List the models of all clusters that go with the experts: (name, in words)."""
    words = {COMMON: "common model", GENERALIST: "generalist"}
    return [(part, word) for part, word in words.items() if getattr(manifest, part) is not None]


def _train(run: Path, manifest: Manifest, jobs: int | None, only: Sequence[str] | None) -> None:
    _launch(run, jobs, only)
    assemble_run(run, manifest)
    # The student learns from the ensemble, which exists only now.
    if manifest.student is not None:
        _launch(run, jobs, [STUDENT])


def _launch(run: Path, jobs: int | None, only: Sequence[str] | None) -> None:
    if not launch_run(run, jobs=jobs, only=only):
        raise AtollError(f"{run}: stopped; all progress is saved; run the same command to resume")


def _train_on_draws(run: Path, manifest: Manifest, jobs: int | None, images: int) -> None:
    """Train router and student in drawn/, on latents that the experts draw; link them beside the real data."""
    # drawn/ is a run of its own, whose experts are linked to this run's.
    drawn = run / "drawn"
    synthesize_run(run, manifest, drawn, images=images, resume=True)
    for part, _ in _shared_parts(manifest):
        _link(drawn / part, run / part)
    _train(drawn, manifest, jobs, [ROUTER])
    # Assemble once more beside the real data, which the evaluation needs.
    for part in (ROUTER, *([STUDENT] if manifest.student else [])):
        _link(run / part, drawn / part)
    assemble_run(run, manifest)


def encode_once(manifest: Manifest, out: Path) -> Path:
    """Encode the manifest's data unless another run of the study did; return the run that holds encoded/."""
    # The settings that determine encoded/, and nothing else.
    content = manifest.model_dump(mode="json", include=set(_ENCODING_SECTIONS))
    # Runs that agree in these sections share one encoding, across seeds.
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    run = out / ENCODED / name
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "what.json", content)
    encode_run(run, manifest, resume=True)
    return run


def _training_settings(manifest: Manifest) -> dict[str, object]:
    """Everything in a manifest that training and assembly depend on."""
    return manifest.model_dump(mode="json", exclude={"name", "evaluate"})


def _is_done(file: Path, settings: dict[str, object]) -> bool:
    return file.is_file() and read_json(file) == settings


def _link(link: Path, target: Path) -> None:
    """Make a link, relative, so that the study may be moved as a whole."""
    relative = os.path.relpath(target, link.parent)
    # The link exists from an earlier call.
    if link.is_symlink() and os.readlink(link) == relative:
        return
    # Never replace data: a directory here was not made by a study.
    if link.is_symlink() or link.exists():
        raise AtollError(
            f"{link}: exists, and is not the study's link to {relative}; remove it, or choose another --out"
        )
    link.symlink_to(relative, target_is_directory=True)
