"""Judge what was offered: `atoll collective admit`."""

import math
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.collective.charter import Collective
from atoll.collective.entry import update_index, whole_submissions
from atoll.collective.files import FileProgress, fetch_files
from atoll.collective.gate.check import Check
from atoll.collective.gate.judge import PROBE_ROWS, ClusterReference, judge
from atoll.collective.gate.probe import Probe
from atoll.collective.index import SUBMISSIONS, read_index, read_submission, report_path
from atoll.collective.keys import Key, hex_of
from atoll.collective.member import changing
from atoll.collective.run_files import PublishedRun, read_run
from atoll.collective.signed import Signed, sign
from atoll.collective.statements import AdmissionReport, Index, Submission
from atoll.collective.store import Store
from atoll.encoders.text import TextEncoder, build_encoder
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.runtime.device import best_device
from atoll.storage.artifact import read_card
from atoll.storage.bounds import CARD_BYTES
from atoll.storage.cards import ExpertCard, Lineage
from atoll.storage.layout import CARD, WEIGHTS, RunLayout
from atoll.storage.memory import one_line
from atoll.storage.shards import Shards

Tell = Callable[["Judgement"], None]
_MOST = 1e30  # an infinite statistic in a report


@dataclass(frozen=True)
class Judgement:
    """What happened to a submission.

    Attributes:
        submission: its id.
        name: of the expert; "" if the submission is broken.
        accepted: the judgement; None if there is none, and no report.
        reasons: one sentence each.
        entered: whether the expert is in the index now.
    """

    submission: str
    name: str
    accepted: bool | None
    reasons: tuple[str, ...]
    entered: bool = False


def admit_submissions(
    directory: Path,
    probe: Path,
    *,
    submissions: Sequence[str] = (),
    key_file: Path | None = None,
    rows: int = PROBE_ROWS,
    progress: FileProgress | None = None,
    tell: Tell | None = None,
) -> list[Judgement]:
    """Judge submissions, write a signed report on each, and let in those that enough admitters accepted.

    Args:
        directory: the admitter's, which joined or opened the collective.
        probe: secret shards, laid out as clusters/ is; nothing of them is uploaded.
        submissions: ids; none: all without a report of this key.
        key_file: the admitter's key, if it is not the one that joined.
        rows: secret rows per expert.
        progress: called before each file that is fetched.
        tell: called with each outcome before the next expert is judged.

    Returns:
        The outcomes. A broken submission is one of them: anybody can leave junk.

    Raises:
        AtollError: the key is no admitter's, the probe is of another clustering, a named submission has a report of
            this key already, or the store fails. Reports that were written stay, and the same command continues.
    """
    with changing(directory, "admitting") as member:
        store, key = member.open(), member.key() if key_file is None else Key.load(key_file)
        collective = member.read(store)
        _check_admitter(store, collective, key)
        manifest = load_manifest(directory)
        run = read_run(store, collective)
        encoder = build_encoder(manifest.condition, manifest.trust_in_cards(directory))
        references = _References(run, directory, Probe(probe, run.lineage), encoder, progress)
        # Judge one after the other. A report is there for good before the next expert is looked at.
        latest = read_index(store, collective, member.record.index, publishing=True)
        known = _weights_in(store, collective, latest.index) if latest else {}
        outcomes = []
        for name in _wanted(store, key, submissions):
            outcome = _judge_one(store, collective, key, name, references=references, known=known, rows=rows)
            outcomes.append(outcome)
            if tell is not None:
                tell(outcome)
        # Also those that an earlier call, or another admitter, left at the threshold.
        latest, changes = update_index(store, collective, key, whole_submissions(store))
        if latest is not None:
            member.update(index=latest.position)
    return [
        Judgement(one.submission, one.name, one.accepted, one.reasons, one.submission in changes.entered)
        for one in outcomes
    ]


def _check_admitter(store: Store, collective: Collective, key: Key) -> None:
    """Raise AtollError unless the key may write reports now."""
    if key.id not in collective.charter.roles.admitters:
        raise AtollError(f"{collective.name_of(key.id)} is no admitter of {collective.charter.name!r}")
    collective.check_date(store.now(hex_of(key.id)))


def _wanted(store: Store, key: Key, submissions: Sequence[str]) -> list[str]:
    """The submissions to judge."""
    whole = whole_submissions(store)
    if unknown := [name for name in submissions if name not in whole]:
        raise AtollError(f"{unknown[0]:.40}: no whole submission of this id; `atoll collective status` lists them")
    without = [name for name in submissions or whole if not store.exists(report_path(name, key.id))]
    if submissions and len(without) < len(submissions):
        judged = next(name for name in submissions if name not in without)
        raise AtollError(f"{judged}: has a report of this key already, and reports stay; another admitter may differ")
    return without


class _References:
    """What experts are compared with, for each set of clusters; their shards are fetched when they are needed.

    Args:
        run: the collective's run.
        directory: the admitter's.
        probe: the secret rows.
        encoder: of captions.
        progress: called before each file.
    """

    def __init__(
        self, run: PublishedRun, directory: Path, probe: Probe, encoder: TextEncoder, progress: FileProgress | None
    ):
        self.run, self.directory, self.probe, self.encoder, self.progress = run, directory, probe, encoder, progress
        self._known: dict[tuple[int, ...], ClusterReference] = {}

    def __call__(self, clusters: tuple[int, ...]) -> ClusterReference:
        """Return the reference for some clusters of today."""
        if clusters not in self._known:
            shards = tuple(map(self._shards, clusters))
            self._known[clusters] = ClusterReference(clusters, self.probe, shards, self.encoder, self.run.lineage)
        return self._known[clusters]

    def _shards(self, cluster: int) -> Shards:
        """Return the collective's shards of a cluster, fetched if they are not there."""
        directory = self.directory
        # Those of before a split stay where they are: a training may be reading them.
        if self.run.holds_other(cluster, directory):
            directory = directory / f".reference-{self.run.collective.charter.files.sha256[:12]}"
        self.run.fetch(self.run.cluster(cluster), directory, self.progress)
        return Shards(RunLayout(directory).cluster(cluster))


def _judge_one(
    store: Store,
    collective: Collective,
    key: Key,
    name: str,
    *,
    references: _References,
    known: dict[str, str],
    rows: int,
) -> Judgement:
    """Fetch a submission, judge it, and write the report."""
    try:
        signed = read_submission(store, collective, name)
        statement = signed.statement
        collective.check_may_work(next(iter(signed.signers)))
        _check_files(statement)
        if max(statement.clusters) >= collective.charter.founded.clusters:
            raise AtollError(f"names cluster {max(statement.clusters)}, which does not exist")
    except AtollError as error:
        return Judgement(name, "", None, (str(error),))
    seed = secrets.randbits(63)
    with tempfile.TemporaryDirectory(dir=references.directory, prefix=".admit-") as place:
        try:
            fetch_files(store, f"{SUBMISSIONS}/{name}", statement.files, Path(place), references.progress)
        # Not what was signed, or not there: nothing was judged.
        except AtollError as error:
            return Judgement(name, statement.name, None, (str(error),))
        # The probe or the shards may lack a cluster; that is no fault of the expert. Others can be judged with a probe
        # that is older than the cluster.
        clusters = _clusters_now(Path(place), statement, references.run.lineage)
        if problem := references.probe.outgrown(clusters):
            return Judgement(name, statement.name, None, (problem,))
        about = references(clusters)
        try:
            checks = judge(
                Path(place),
                about,
                name=statement.name,
                seed=seed,
                clusters=statement.clusters,
                known=known,
                rows=rows,
                device=best_device(),
            )
        # It may be too large for this machine, and not for another; those that wait are judged all the same.
        except (RuntimeError, MemoryError) as error:
            reason = one_line(error) or f"cannot be judged ({' '.join(str(error).split())[:200]})"
            return Judgement(name, statement.name, None, (reason,))
    report = report_of(signed, collective, checks, seed)
    if not store.create(report_path(name, key.id), sign(report, [key], collective.identity)):
        raise AtollError(f"{store.place(report_path(name, key.id))}: something else is at its place; remove it")
    if report.accepted:
        known[statement.files[WEIGHTS].sha256] = f"{statement.name}, which is in already"
    return Judgement(name, statement.name, report.accepted, report.reasons)


def report_of(
    submission: Signed[Submission], collective: Collective, checks: Sequence[Check], seed: int
) -> AdmissionReport:
    """Return the report that follows from the checks: the reasons of what failed, or of everything that passed."""
    failed = [check for check in checks if not check.passed]
    statistics: dict[str, float] = {}
    for check in checks:
        values = {"": check.statistic, ".threshold": check.threshold, ".worst": check.worst}
        statistics |= {f"{check.name}{part}": _finite(value) for part, value in values.items() if not math.isnan(value)}
    return AdmissionReport(
        submission=submission.sha256,
        charter=collective.position.version,
        accepted=not failed,
        reasons=tuple(f"{check.name}: {check.reason}"[:1000] for check in failed or checks),
        statistics=statistics,
        seed=seed,
    )


def _finite(value: float) -> float:
    # JSON holds no infinity.
    return min(max(float(value), -_MOST), _MOST)


def _check_files(statement: Submission) -> None:
    """Raise AtollError unless the files are an artifact's, and the card is no larger than a card may be."""
    if extra := set(statement.files) - {CARD, WEIGHTS}:
        raise AtollError(f"holds {min(extra)!r:.60}; expected {CARD} and {WEIGHTS} alone")
    if statement.files[CARD].size > CARD_BYTES:
        raise AtollError(f"{CARD} has {statement.files[CARD].size:,} bytes, expected at most {CARD_BYTES:,}")


def _weights_in(store: Store, collective: Collective, index: Index) -> dict[str, str]:
    """Experts with their state, by the hash of their weights: those that are in, and those that were retired."""
    known = {}
    for experts, state in ((index.retired, "which was retired"), (index.experts, "which is in already")):
        for expert in experts:
            statement = read_submission(store, collective, expert.submission).statement
            known[statement.files[WEIGHTS].sha256] = f"{statement.name}, {state}"
    return known


def _clusters_now(expert: Path, statement: Submission, lineage: Lineage) -> tuple[int, ...]:
    """What the clusters of a submission are now; as it names them if its card does not fit, which the gate refuses."""
    try:
        return lineage.now(read_card(expert, ExpertCard).assignment, statement.clusters)
    except (AtollError, ValueError):
        return statement.clusters
