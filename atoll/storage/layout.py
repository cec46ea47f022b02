"""The layout of a run on disk, the seeds of its parts, and the exit codes: every name and number in one place.

    atoll.yaml                   the manifest
    captions.jsonl               captions by key, from `atoll recaption`
    encoded/                     latents, captions and features; encoded.partial/ while encoding
    clusters/                    clusters.json, assignment.parquet, cluster-000/ ..., router/ (the router's sample)
    experts/3-flow/              one artifact per expert
    loras/3-flow/                low-rank updates of experts
    common/  generalist/  router/  monolith/  student/    artifacts
    <parent>/.train-<name>/      beside an artifact: the state of its training, see `TrainingLayout`
    ensemble/                    ensemble.json, stackings.safetensors
    evaluation/                  results that later evaluations reuse
    report.html, report.json     the evaluation
    collective.json              in a member's run: its collective, what it has seen of it, its leases

The names of files inside a directory of shards belong to `atoll.storage.shards`. Standard library only: the command
line imports this file at start.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from atoll.errors import AtollError

# Names that a run's root shares with other directories: a converted collection, a saved pipeline, a study.
MANIFEST = "atoll.yaml"
ENCODED, CLUSTERS, EXPERTS, ENSEMBLE, EVALUATION = "encoded", "clusters", "experts", "ensemble", "evaluation"
LORAS = "loras"  # low-rank updates of experts
# Directories, and names of the parts trained in them.
COMMON, ROUTER, MONOLITH, STUDENT = "common", "router", "monolith", "student"
GENERALIST = "generalist"

# Files that one stage writes and another reads.
CARD, WEIGHTS = "card.json", "weights.safetensors"  # in every artifact
REPORT = "report.html"  # of a clustering in clusters/, of an evaluation in the run's root
CLUSTERS_CARD, ASSIGNMENT = "clusters.json", "assignment.parquet"  # in clusters/
ENSEMBLE_CARD, STACKINGS = "ensemble.json", "stackings.safetensors"  # in ensemble/
COLLECTIVE = "collective.json"  # in the root of a run that joined a collective

# Exit codes of `atoll`, which scripts and schedulers act on.
EXIT_CRASH = 1  # not the user's error: another attempt may succeed
EXIT_USER_ERROR = 2  # an AtollError: another attempt would fail alike
EXIT_DEGRADED = 3  # done, without a part that failed
EXIT_OUT_OF_MEMORY = 4  # of a training: another attempt may succeed, where others use the same memory
EXIT_INTERRUPTED = 128 + 2  # by SIGINT, as shells count
EXIT_KILLED = 128 + 9  # by SIGKILL

_TRAINING_PREFIX = ".train-"
_PARTS_PER_RUN = 1000  # seeds of one run: experts count from 0 up, the other parts from the top down

CLUSTER_PREFIX = "cluster-"  # of the directories below clusters/


def cluster_name(number: int) -> str:
    """Return the name of a cluster's directory: 3 -> "cluster-003"."""
    return f"{CLUSTER_PREFIX}{number:03d}"


def cluster_number(name: str) -> int:
    """Return the number of a cluster from the name of its directory: "cluster-003" -> 3.

    Raises:
        AtollError: `name` is not the name of a cluster's directory.
    """
    # Comparing the round trip refuses second spellings of a number, such as cluster-0003.
    match = re.fullmatch(rf"{CLUSTER_PREFIX}([0-9]{{3,}})", name)
    if match is None or cluster_name(int(match[1])) != name:
        raise AtollError(f"{name!r} is not a cluster's directory; expected a name such as {cluster_name(0)}")
    return int(match[1])


def cluster_directories(clusters: Path) -> list[Path]:
    """List the directories of clusters in a directory, by number. Raises AtollError for other names like cluster-*."""
    return sorted(clusters.glob(f"{CLUSTER_PREFIX}*"), key=lambda path: cluster_number(path.name))


def cluster_path(clusters: Path, number: int) -> Path:
    """Return the directory of one cluster's shards, in a run's clusters/ or in a copy of it."""
    return clusters / cluster_name(number)


def temporary_of(path: Path) -> Path:
    """Return the path at which a file is written until it is complete. Only one process at a time may write it."""
    # Hidden, beside the file: a rename is atomic only within one file system.
    return path.with_name(f".{path.name}.tmp")


def expert_seed(seed: int, number: int) -> int:
    """Return the seed of the expert at position `number` in atoll.yaml, for a run with this seed."""
    # Runs with different seeds share no part's seed, as long as a run has fewer than `_PARTS_PER_RUN` parts.
    return seed * _PARTS_PER_RUN + number


def monolith_seed(seed: int) -> int:
    # The other parts count down from the end of the range.
    return seed * _PARTS_PER_RUN + 999


def router_seed(seed: int) -> int:
    return seed * _PARTS_PER_RUN + 998


def student_seed(seed: int) -> int:
    return seed * _PARTS_PER_RUN + 997


def common_seed(seed: int) -> int:
    return seed * _PARTS_PER_RUN + 996


def generalist_seed(seed: int) -> int:
    return seed * _PARTS_PER_RUN + 995


class _Below:
    """A path below a layout's root, read like an attribute."""

    def __init__(self, *parts: str):
        self._parts = parts

    def __get__(self, layout: "RunLayout | TrainingLayout", owner: type) -> Path:
        # A descriptor, so that each path below is one line and its name is known to editors.
        return layout.root.joinpath(*self._parts)


def _plain_name(name: str) -> str:
    # Names come from cards and manifests, which strangers may have written.
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise AtollError(f"expert {name!r}: expected a plain name such as 3-flow, since it names a directory")
    return name


@dataclass(frozen=True)
class RunLayout:
    """The paths of a run. root: the directory that holds atoll.yaml."""

    root: Path

    # Data, in the order in which the stages write it.
    manifest = _Below(MANIFEST)
    captions = _Below("captions.jsonl")  # from `atoll recaption`
    encoded = _Below(ENCODED)
    encoded_partial = _Below(f"{ENCODED}.partial")
    synthesized_partial = _Below("synthesized.partial")
    clusters = _Below(CLUSTERS)
    clusters_card = _Below(CLUSTERS, CLUSTERS_CARD)
    assignment = _Below(CLUSTERS, ASSIGNMENT)
    router_sample = _Below(CLUSTERS, ROUTER)  # shards for the router; absent if it learns from all of encoded/
    # Trained parts, and the ensemble over them.
    experts = _Below(EXPERTS)
    loras = _Below(LORAS)
    common = _Below(COMMON)
    generalist = _Below(GENERALIST)
    router = _Below(ROUTER)
    monolith = _Below(MONOLITH)
    student = _Below(STUDENT)
    ensemble = _Below(ENSEMBLE)
    ensemble_card = _Below(ENSEMBLE, ENSEMBLE_CARD)
    # Results.
    evaluation = _Below(EVALUATION)
    report_html = _Below(REPORT)
    report_json = _Below("report.json")
    samples = _Below("samples.png")  # the grid of images that `atoll demo` draws
    slurm = _Below(".slurm")  # submitit's scripts and logs

    def cluster(self, number: int) -> Path:
        """Return the directory of one cluster's shards."""
        # Stages agree on the place of a cluster through this method.
        return cluster_path(self.clusters, number)

    def existing_clusters(self) -> list[Path]:
        """List the directories of all clusters, as `cluster_directories` does."""
        return cluster_directories(self.clusters)

    def part(self, name: str) -> Path:
        """Return the artifact of a part that a run has once, such as the router or the monolith, by name."""
        if name not in (COMMON, GENERALIST, ROUTER, MONOLITH, STUDENT):
            raise KeyError(name)
        return self.root / name

    def expert(self, name: str) -> Path:
        """Return the artifact of one expert.

        Args:
            name: its full name, such as "3-flow".

        Raises:
            AtollError: `name` would lead out of experts/.
        """
        return self.experts / _plain_name(name)

    def lora(self, name: str) -> Path:
        """Return the artifact of the low-rank update of one expert; as `expert`."""
        return self.loras / _plain_name(name)


@dataclass(frozen=True)
class TrainingLayout:
    """The paths of one training's state. root: its directory, beside the artifact that the training writes."""

    root: Path

    # Written by the training itself.
    checkpoint = _Below("checkpoint.safetensors")
    before_decay = _Below("before-decay")  # a checkpoint of the state before the learning rate's decay
    metrics = _Below("metrics.jsonl")
    summary = _Below("summary.json")
    sharded_temporary = _Below(".checkpoint.dcp.tmp")
    tensorboard = _Below("tensorboard")
    ema = _Below("ema")
    validation = _Below("validation")  # images of the user's own prompts
    validation_page = _Below("validation.html")  # the page that shows them
    # Written by `atoll launch`.
    output = _Below("output.log")  # output of the current start
    output_before = _Below("output-before.log")  # output of the previous start
    lock = _Below("lock")  # held by the process while it lives
    starts = _Below("starts")  # one line per start of a queued job
    stop = _Below("stop")  # while it exists, a queued job saves its state and ends
    slurm_job = _Below("slurm.json")  # the job's id in Slurm's queue

    @staticmethod
    def of(artifact: Path) -> "TrainingLayout":
        """Return the layout of the training that writes this artifact: experts/3-flow -> experts/.train-3-flow."""
        # Beside the artifact, which is replaced as a whole.
        return TrainingLayout(artifact.with_name(f"{_TRAINING_PREFIX}{artifact.name}"))

    @property
    def name(self) -> str:
        """The name of the trained part, such as "3-flow"."""
        return self.root.name.removeprefix(_TRAINING_PREFIX)

    def sharded_checkpoint(self, step: int, rollbacks: int) -> Path:
        """Return the directory of a sharded checkpoint, named by its step and the number of rollbacks before it."""
        # Padded numbers, so that names sort by step.
        return self.root / f"checkpoint-{step:09d}-{rollbacks}.dcp"

    def sharded_checkpoints(self) -> list[Path]:
        """List the complete sharded checkpoints, in no particular order."""
        return list(self.root.glob("checkpoint-*.dcp"))

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint, of either kind."""
        return self.checkpoint.exists() or bool(self.sharded_checkpoints())

    def snapshot(self, step: int, profile: int) -> Path:
        """Return the file of one profile's EMA weights at one step. profile: its position in train.ema_profiles."""
        return self.ema / f"{step:09d}-{profile}.safetensors"

    def validation_image(self, strip: str, step: int, weights: str) -> Path:
        """Return the file of one prompt's validation images.

        Args:
            strip: the name of the prompt's directory.
            step: of the training.
            weights: that drew them, "ema" or "trained".
        """
        return self.validation / strip / f"{step:09d}-{weights}.png"

    def validation_images(self, strip: str) -> list[tuple[int, str]]:
        """List the (step, weights) of a prompt's validation images, by step."""
        names = [file.stem.split("-", 1) for file in (self.validation / strip).glob("[0-9]*-*.png")]
        return sorted((int(step), weights) for step, weights in names)

    def samples(self, step: int) -> Path:
        """Return the file of the sample images drawn at one step."""
        return self.root / f"samples-{step:07d}.png"
