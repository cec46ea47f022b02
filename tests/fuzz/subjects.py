"""What is damaged, and the command that reads it: one subject per kind of file that comes from somebody else."""

import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tests.conftest import RUN
from tests.convert.conftest import random_weights

# Numbers and names that are the owner's to choose: another choice is another valid artifact, with other images.
SAMPLING = r"sampling.*|experts(\.clusters|\.name|)|router|stackings.*"
EXPERT = r"objective.*|calibration.*|condition.*|codec.*|clusters|name|network\.(heads|name|modulation|mlp_ratio)"


@dataclass(frozen=True)
class Subject:
    """A kind of artifact and the command that reads it.

    Attributes:
        files: patterns of the files to damage, below the root.
        arguments: of the command, run in the root. remove: what the command writes, removed before it.
        read: the command's result, to be compared with that of the undamaged files.
        owned: a regular expression of the JSON paths whose values are the owner's to choose. bytes_owned: whether
            bytes are, too (weights, images), once their hashes fit.
        efforts: the JSON paths that say how much is to be computed, of a file that the user writes.
    """

    files: tuple[str, ...]
    arguments: tuple[str, ...]
    read: Callable[[Path], object]
    owned: str = "$^"
    bytes_owned: bool = False
    remove: tuple[str, ...] = ()
    efforts: str = "$^"

    def paths(self, root: Path) -> list[Path]:
        """The files to damage, in order."""
        return sorted(path for pattern in self.files for path in root.glob(pattern) if path.is_file())

    def work(self, root: Path) -> None:
        """Run the command. For a forked process."""
        from atoll.cli import main

        os.chdir(root)
        for path in self.remove:
            shutil.rmtree(path, ignore_errors=True)
        if self.arguments[0] == "pipeline":
            sample_saved_pipeline(Path("saved"))
            return
        sys.argv = ["atoll", *self.arguments]
        main()


def image(path: str) -> Callable[[Path], object]:
    """Returns size and pixels of the image at `path`."""

    def read(root: Path) -> object:
        with Image.open(root / path) as opened:
            return opened.size, opened.tobytes()

    return read


def tensors(*patterns: str) -> Callable[[Path], object]:
    """Returns every tensor in the safetensors files, as bytes; NaN is an error."""

    def read(root: Path) -> object:
        result = {}
        for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    tensor = file.get_tensor(name)
                    assert not tensor.is_floating_point() or tensor.isfinite().all(), name
                    result[f"{path.relative_to(root)}:{name}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert result, "nothing was written"
        return result

    return read


def sample_saved_pipeline(path: Path) -> None:
    """Load a saved diffusers pipeline, and sample. An AtollError is exit code 2, as of the command line."""
    from atoll.diffusers import AtollPipeline
    from atoll.errors import AtollError

    try:
        pipe = AtollPipeline.from_pretrained(path)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        pipe("moss sand", num_inference_steps=2, generator=generator).images[0].save("out.png")
    except AtollError as error:
        print(f"atoll: {error}", file=sys.stderr)
        sys.exit(2)


_CONVERT = (
    "-o",
    "converted",
    "--heads",
    "2",
    "--condition",
    "hash,dim=8,length=4,seed=0",
    "--codec",
    "pixels,channels=3",
)

SUBJECTS: dict[str, Subject] = {
    "ensemble": Subject(
        ("ensemble/*", "experts/*/*", "router/*"),
        ("sample", "ensemble", "moss sand", "rain", "-o", "out.png", "--quiet"),
        image("out.png"),
        f"{SAMPLING}|{EXPERT}",
        bytes_owned=True,
    ),
    "expert": Subject(
        ("monolith/*",), ("sample", "monolith", "moss", "--steps", "2", "-o", "out.png"), image("out.png"), EXPERT, True
    ),
    "clusters": Subject(
        ("clusters/clusters.json", "clusters/cluster-000/*"),
        ("train", "expert", "0", "--quiet"),
        tensors("experts/0-*/weights.safetensors"),
        r"card\.(condition|codec).*",
        bytes_owned=True,
        remove=("experts/0-eps-cosine", "experts/.train-0-eps-cosine"),
    ),
    "router": Subject(
        ("clusters/clusters.json", "clusters/cluster-*/*", "clusters/assignment.parquet"),
        ("train", "router", "--quiet"),
        tensors("router/weights.safetensors"),
        r"card\.(condition|codec).*",
        bytes_owned=True,
        remove=("router", ".train-router"),
    ),
    "checkpoint": Subject(
        ("experts/.train-0-eps-cosine/*",),
        ("train", "expert", "0", "--resume", "--quiet"),
        tensors("experts/0-*/weights.safetensors"),
        bytes_owned=True,
        remove=("experts/0-eps-cosine",),
    ),
    "encoded": Subject(
        ("encoded/*",),
        ("cluster", "--quiet"),
        tensors("clusters/cluster-*/*.safetensors"),
        r"card\..*",
        bytes_owned=True,
        remove=("clusters",),
    ),
    "manifest": Subject(
        ("atoll.yaml",),
        ("train", "expert", "0", "--quiet"),
        tensors("experts/0-*/weights.safetensors"),
        ".*",
        bytes_owned=True,
        remove=("experts/0-eps-cosine", "experts/.train-0-eps-cosine"),
        efforts=r"(train|network)(\..*)?",
    ),
    "assembly": Subject(
        ("experts/*/card.json", "router/card.json"), ("assemble",), lambda root: None, ".*", remove=("ensemble",)
    ),
    "folder": Subject(
        ("images/*",), ("encode", "-r", "folder-run", "--quiet"), lambda root: None, ".*", True, ("folder-run/encoded",)
    ),
    "tar": Subject(
        ("*.tar",), ("encode", "-r", "tar-run", "--quiet"), lambda root: None, ".*", True, ("tar-run/encoded",)
    ),
    "parquet": Subject(
        ("images.parquet",), ("encode", "-r", "parquet-run", "--quiet"), lambda root: None, ".*", True,
        ("parquet-run/encoded",),
    ),
    "checkpoint-pt": Subject(
        ("dit.pt",), ("convert", "dit.pt", *_CONVERT), lambda root: None, ".*", True, ("converted",)
    ),
    "checkpoint-safetensors": Subject(
        ("dit.safetensors",), ("convert", "dit.safetensors", *_CONVERT), lambda root: None, ".*", True, ("converted",)
    ),
    "pipeline": Subject(
        ("saved/*.json", "saved/*/*.json", "saved/ensemble/*/*/*", "saved/ensemble/*/*"), ("pipeline",),
        image("out.png"), f"{SAMPLING}|{EXPERT}|[a-z_]+", True,
    ),
}  # fmt: skip


def write_inputs(root: Path) -> None:
    """Beside a trained run: images in three containers with runs that encode them, and checkpoints to convert."""
    # Images and captions.
    generator = torch.Generator().manual_seed(1)
    (root / "images").mkdir()
    rows: list[dict[str, object]] = []
    for number in range(12):
        pixels = (torch.rand(12, 16, 3, generator=generator) * 255).byte().numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, ("PNG", "JPEG", "WEBP", "TIFF")[number % 4])
        rows.append({"image": {"bytes": buffer.getvalue()}, "caption": f"caption {number}"})
    suffixes = ("png", "jpg", "webp", "tif")
    lines = []
    with tarfile.open(root / "images.tar", "w") as tar:
        for number, row in enumerate(rows):
            data, name = row["image"]["bytes"], f"{number:02d}.{suffixes[number % 4]}"  # type: ignore[index]
            (root / "images" / name).write_bytes(data)
            lines.append(f'{{"file_name": "{name}", "text": "caption {number}"}}\n')
            for member, content in ((name, data), (f"{number:02d}.txt", f"caption {number}".encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (root / "images" / "metadata.jsonl").write_text("".join(lines))
    pq.write_table(pa.Table.from_pylist(rows), root / "images.parquet")

    # A run for each container.
    for kind, source, path in (
        ("folder", "folder", "images"), ("tar", "webdataset", "images.tar"), ("parquet", "parquet", "images.parquet"),
    ):  # fmt: skip
        (root / f"{kind}-run").mkdir()
        data = {"source": source, "path": str(root / path), "size": 8, "max_skipped": 0.5}
        settings = {**RUN, "data": data, "codec": {"name": "pixels", "channels": 3}, "feature": {"name": "hog"}}
        (root / f"{kind}-run" / "atoll.yaml").write_text(yaml.safe_dump(settings))

    # Checkpoints.
    weights = random_weights(channels=3)
    save_file(weights, root / "dit.safetensors")
    torch.save({"model": weights, "ema": weights, "steps": 3}, root / "dit.pt")


def remake_hashes(root: Path, changed: Path, old: bytes) -> None:
    """Replace the hash and size of a changed file in all JSON below the root, and so on for each JSON changed by it.

    A writer who damages an artifact on purpose remakes its hashes, since none of them is secret.
    """
    # Pairs of old and new content, until no file is changed any more.
    waiting = [(old, changed.read_bytes())]
    while waiting:
        before, after = waiting.pop()
        digests = [hashlib.sha256(data).hexdigest().encode() for data in (before, after)]
        for path in sorted(root.rglob("*.json")):
            content = path.read_bytes()
            remade = content.replace(*digests)
            if remade != content:
                # The size stands near the hash, in the same entry.
                pattern = rb'("bytes": )%d\b' % len(before)
                remade = re.sub(pattern, rb"\g<1>%d" % len(after), remade)
                path.write_bytes(remade)
                waiting.append((content, remade))
