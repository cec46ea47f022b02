"""Four contributors make one model through a shared directory: `atoll demo --collective`.

Each is a process of its own with its own key and directory, and runs the commands that a person would type. Ada and
Cy train; Ben's machine dies and Ada continues from what it shared; Cy first hands in poisoned weights; Dee comes late.
"""

import base64
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch

from atoll.collective.checkpoints import CHECKPOINTS
from atoll.collective.connect import open_store
from atoll.collective.model import open_model
from atoll.collective.status import collective_status
from atoll.ensemble.loading import load_ensemble
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.randomness import cpu_generator
from atoll.report.page import document, table
from atoll.schedule import PATH
from atoll.storage.artifact import read_card, read_tensors, save_artifact, write_bytes
from atoll.storage.cards import EncodedCard, ExpertCard
from atoll.storage.layout import REPORT, RunLayout
from atoll.storage.shards import LATENTS, Shards, ShardWriter

RECIPE = "collective"
CONTRIBUTORS = ("ada", "ben", "cy", "dee")
LEASE_HOURS = 0.01  # 36 s: Ben's lease must end while one watches
_SECRET = 0.12  # of the training images: the admitter's probe
_ROWS = 32  # held-out latents of each cluster, for the model's error
_TIMES = (0.3, 0.5, 0.7, 0.9)
TellLine = Callable[[str], None]


@dataclass
class Story:
    """What happened, for the terminal and the page. started: by a monotonic clock."""

    tell: TellLine
    started: float = field(default_factory=time.monotonic)
    events: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, who: str, what: str) -> None:
        """Record an event."""
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        self.events.append((f"{minutes}:{seconds:02d}", who, what))
        self.tell(f"{minutes}:{seconds:02d} {who}: {what}")


@dataclass(frozen=True)
class ModelView:
    """The model at one time. experts: how many it has. images: a PNG file. error: of its velocity."""

    experts: int
    images: Path
    error: float


def run_demo(directory: Path, recipe: str | None, tell: TellLine) -> Path:
    """Play the story, and write report.html.

    Args:
        directory: where everything is written: the founder's run, the bucket, and each contributor's directory.
        recipe: of the founder's run; None: the recipe `collective`. It needs four clusters with an expert each.
        tell: called with each line of the story.

    Returns:
        The report.

    Raises:
        AtollError: the directory exists, or a command failed that should not.
    """
    if directory.exists():
        raise AtollError(f"{directory}: exists; the story of a collective starts in a new directory")
    story, world = Story(tell), World(directory)
    directory.mkdir(parents=True)
    world.run("init", world.founder, "--recipe", _named(recipe or RECIPE))
    if [one.cluster for one in load_manifest(world.founder).experts] != [0, 1, 2, 3]:
        shutil.rmtree(directory)
        raise AtollError(f"{recipe}: expected an expert for each of four clusters, in order")
    # The founder's part: data, clusters, router, and the collective itself.
    world.found(story)
    for name in CONTRIBUTORS:
        world.join(name)
    story.add("ada, ben, cy and dee", "make a key each, and join")

    # Three of them train. One of the machines dies, and one of the experts is poisoned.
    trainings = [world.claim_and_train("ada", 0), world.claim_and_train("ben", 1), world.claim_and_train("cy", 2)]
    story.add("ada, ben and cy", "claim clusters 0, 1 and 2, and train, each alone")
    world.kill_half_way(trainings[1], "ben", 1)
    story.add("ben", "the machine dies half-way; its last checkpoint is in the bucket")
    world.publish("ada", 0, trainings[0])
    story.add("ada", "publishes an expert of cluster 0")
    poison(world.expert("cy", 2, trainings[2]))
    world.publish("cy", 2)
    story.add("cy", "publishes an expert of cluster 2, whose weights were exchanged")
    world.admit(story)

    # Ada takes over what Ben began, from where he was. Cy tries again.
    again = world.claim_and_train("cy", 2, "--again", restart=True)
    world.wait_for_lease(1)
    story.add("ada", "ben's lease ended; ada takes over cluster 1, from his checkpoint")
    world.publish("ada", 1, world.claim_and_train("ada", 1, "--resume", resume=True))
    world.publish("cy", 2, again)
    story.add("ada and cy", "publish experts of clusters 1 and 2")
    world.admit(story)
    before = world.snapshot("before.png")
    story.add("anyone", f"samples the model: {before.experts} experts, error {before.error:.4f}")

    # Whoever comes late makes it better.
    world.publish("dee", 3, world.claim_and_train("dee", 3))
    story.add("dee", "comes late: trains cluster 3, and publishes")
    world.admit(story)
    after = world.snapshot("after.png")
    story.add("anyone", f"samples the model: {after.experts} experts, error {after.error:.4f}")
    write_bytes(directory / REPORT, render(world, story, before, after).encode())
    return directory / REPORT


class World:
    """The directories of all who take part, and the commands that they run.

    Args:
        root: below which everything lies.
    """

    def __init__(self, root: Path):
        self.root = root.absolute()
        self.bucket, self.founder = str(self.root / "bucket"), self.root / "founder"
        self.probe = self.root / "probe"

    def found(self, story: Story) -> None:
        """The founder prepares the data, trains the router, and opens the collective."""
        self.run("encode", "-r", self.founder, "--quiet")
        hold_back(RunLayout(self.founder).encoded, self.root / "secret")
        self.run("cluster", "-r", self.founder, "--quiet")
        self.run("collective", "probe", self.root / "secret", "-r", self.founder, "-o", self.probe)
        self.run("train", "router", "-r", self.founder, "--quiet")
        key = self.root / "founder.key"
        self.run("collective", "key", key)
        self.run("collective", "open", self.bucket, "-r", self.founder, "--key", key, "--lease-hours", LEASE_HOURS)
        story.add("founder", "encodes and clusters the images, trains the router, and opens the collective")

    def join(self, name: str) -> None:
        """A contributor joins."""
        key = self.root / f"{name}.key"
        self.run("collective", "key", key)
        self.run("collective", "join", self.bucket, "-o", self.root / name, "--key", key)

    def claim_and_train(
        self, name: str, cluster: int, *options: str, resume: bool = False, restart: bool = False
    ) -> "subprocess.Popen[str]":
        """A contributor claims a cluster, and starts a training."""
        self.run(
            *("collective", "claim", self.bucket, "--cluster", cluster, "-r", self.root / name),
            *("--share-checkpoints", "--quiet", *options),
        )
        flags = ["--resume"] if resume else ["--restart"] if restart else []
        return self.start("train", "expert", cluster, "-r", self.root / name, "--quiet", *flags)

    def expert(self, name: str, cluster: int, training: "subprocess.Popen[str] | None" = None) -> Path:
        """The directory of a contributor's expert, once its training has ended."""
        if training is not None:
            _finish(training)
        run = self.root / name
        spec = load_manifest(run).experts[cluster]
        return RunLayout(run).expert(spec.full_name)

    def publish(self, name: str, cluster: int, training: "subprocess.Popen[str] | None" = None) -> None:
        """A contributor offers an expert, once its training has ended."""
        self.run("collective", "publish", self.expert(name, cluster, training), "--quiet")

    def admit(self, story: Story) -> None:
        """The founder judges what was offered."""
        printed = self.run("collective", "admit", self.bucket, "--probe", self.probe, "-r", self.founder, "--quiet")
        for line in printed.splitlines():
            # Without the id, which says nothing to people.
            story.add("founder", line.split(" ", 1)[1])

    def kill_half_way(self, training: "subprocess.Popen[str]", name: str, cluster: int) -> None:
        """Kill a training once a checkpoint of it is in the bucket."""
        store = open_store(self.bucket)
        # The signed statement comes after the file that it is about.
        while not any(entry.path.endswith(".json") for entry in store.list(f"{CHECKPOINTS}/{cluster}")):
            if training.poll() is not None:
                raise AtollError(f"{name}: its training ended before it shared a checkpoint; raise train.steps")
            time.sleep(0.2)
        os.kill(training.pid, signal.SIGKILL)
        training.communicate()

    def wait_for_lease(self, cluster: int) -> None:
        """Wait until the lease on a cluster has ended."""
        while True:
            status = collective_status(self.bucket)
            work = next(one for one in status.works if one.work == str(cluster))
            if work.state(status.now) != "held":
                return
            time.sleep(2)

    def snapshot(self, name: str) -> ModelView:
        """Sample the model as it is now, as anyone could, into a file; measure its error on held-out latents."""
        file = self.root / name
        prompts = load_manifest(self.founder).evaluate.prompts
        self.run("sample", self.bucket, *prompts, "-o", file, "--quiet")
        model = open_model(self.bucket, cache=self.root / "cache" / "atoll")
        loaded, errors = load_ensemble(model.directory, fetch=model.fetch), []
        generator = cpu_generator(0)
        for path in RunLayout(self.founder).existing_clusters():
            shards = Shards(path)
            rows = shards.rows("val", LATENTS[0])[:_ROWS]
            x0, condition = shards.read("latent", rows).float(), loaded.encoder(shards.captions_of(rows))
            # The same noise for every model.
            for level in _TIMES:
                t, eps = torch.full((len(x0),), level), torch.randn(x0.shape, generator=generator)
                with torch.inference_mode():
                    velocity = loaded.ensemble.velocity(PATH.diffuse(x0, eps, t), t, condition)
                errors.append((velocity - (eps - x0)).square().mean())
        return ModelView(len(loaded.ensemble.experts), file, float(torch.stack(errors).mean()))

    def run(self, *arguments: object) -> str:
        """Run a command of atoll to its end, and return what it prints."""
        return _finish(self.start(*arguments))

    def start(self, *arguments: object) -> "subprocess.Popen[str]":
        """Start a command of atoll."""
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.root / "cache")}
        command = [sys.executable, "-m", "atoll", *map(str, arguments)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.root, env=environment
        )


def hold_back(encoded: Path, secret: Path) -> None:
    """Move a part of some encoded images to another directory, before anybody clusters or publishes them.

    Args:
        encoded: output of `atoll encode`; it is written anew without them.
        secret: the new directory.
    """
    shards = Shards(encoded)
    # Of the training images alone: a probe must be like the data that the experts learn.
    train = shards.rows("train")
    chosen = train[torch.randperm(len(train), generator=cpu_generator(0))[: int(_SECRET * len(train))]]
    is_secret = torch.zeros(len(shards), dtype=torch.bool)
    is_secret[chosen] = True
    card, columns = shards.card(EncodedCard), shards.columns
    for out, here in ((secret, is_secret), (encoded, ~is_secret)):
        rows = here.nonzero().flatten()
        keys, splits = ([texts[row] for row in rows.tolist()] for texts in (shards.keys, shards.splits))
        content = {name: shards.read(name, rows).clone() for name in columns}
        with ShardWriter(out, card) as writer:
            writer.append(keys, shards.captions_of(rows), splits, content)


def poison(expert: Path) -> None:
    """Replace the weights of an expert by others, and its hashes too: the card stays as honest as it was."""
    card = read_card(expert, ExpertCard)
    tensors = dict(read_tensors(expert, card))
    generator = cpu_generator(1)
    for name, value in tensors.items():
        if name.startswith("network.blocks.") and value.ndim > 1:
            tensors[name] = value.std() * torch.randn(value.shape, generator=generator)
    save_artifact(expert, card, tensors)


def _finish(process: "subprocess.Popen[str]") -> str:
    """Wait for a command, and return what it printed. Raises AtollError if it failed."""
    out, err = process.communicate()
    if process.returncode != 0:
        said = err.strip().splitlines()[-1:] or ["nothing"]
        raise AtollError(f"{' '.join(map(str, process.args[3:6]))} ended with {process.returncode}: {said[0]}")  # type: ignore[index]
    return out


def _named(recipe: str) -> str:
    """Return a recipe's name, or its path from any directory."""
    return str(Path(recipe).absolute()) if Path(recipe).is_file() else recipe


def render(world: World, story: Story, before: ModelView, after: ModelView) -> str:
    """The story as one HTML document."""
    rows = "".join(
        f"<tr><th scope=row>{when}</th><td>{escape(who)}</td><td>{escape(what)}</td></tr>"
        for when, who, what in story.events
    )
    prompts = load_manifest(world.founder).evaluate.prompts
    sections = [("What happened", table("<tr><th>time</th><th>who</th><th>what</th></tr>", rows, "the story", "text"))]
    for name, one in (("Before the late one", before), ("After", after)):
        sheet = f"data:image/png;base64,{base64.b64encode(one.images.read_bytes()).decode()}"
        sections.append(
            (
                name,
                f"<p>{one.experts} experts; mean squared error of the velocity on held-out images of all clusters: "
                f'{one.error:.4f}.</p><p><img src="{sheet}" alt="{escape("; ".join(prompts))}"></p>',
            )
        )
    lead = "<p>Four contributors who exchange nothing but files in one directory made one model.</p>"
    return document("A collective", lead, sections)
