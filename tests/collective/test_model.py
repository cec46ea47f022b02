"""A collective's model is sampled from its store: verified, each expert fetched once and only if it is used."""

import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from atoll.collective.charter import Collective, read_collective
from atoll.collective.connect import open_store
from atoll.collective.index import append_index, read_index, read_submission, report_path
from atoll.collective.join import join_collective
from atoll.collective.keys import Key
from atoll.collective.model import CollectiveModel, is_collective, open_model
from atoll.collective.open import open_collective
from atoll.collective.publish import publish_expert
from atoll.collective.signed import sign
from atoll.collective.statements import AdmissionReport, Index, IndexedExpert, Position
from atoll.errors import AtollError
from atoll.pipeline import Pipeline
from atoll.storage.layout import WEIGHTS
from tests.collective.founding import FAR

PROMPTS = ["moss sand", "rain", "rust rust", "sand"]


class Reef:
    """A collective on a trained run, whose experts are published and admitted one by one."""

    def __init__(self, root: Path, trained_run: Path):
        self.root, self.run, self.url = root, root / "founder", str(root / "bucket")
        shutil.copytree(trained_run, self.run)
        (self.run / "clusters" / "centroids.safetensors").write_bytes(b"centroids")
        self.key = Key.generate()
        self.key.save(root / "founder.key")
        self.identity = open_collective(self.url, self.run, root / "founder.key")
        self.store = open_store(self.url)
        join_collective(self.url, root / "ada", root / "founder.key", name="ada")

    def admit(self, name: str) -> str:
        """Publish and admit an expert. Returns its submission."""
        shutil.copytree(self.run / "experts" / name, self.root / "ada" / "experts" / name)
        submission = publish_expert(self.root / "ada" / "experts" / name).submission
        collective = read_collective(self.store)
        signed = read_submission(self.store, collective, submission)
        report = AdmissionReport(submission=signed.sha256, charter=1, accepted=True, reasons=(), statistics={}, seed=0)
        data = sign(report, [self.key], collective.identity)
        self.store.create(report_path(submission, self.key.id), data)
        entry = IndexedExpert(
            submission=submission,
            sha256=signed.sha256,
            clusters=signed.statement.clusters,
            reports=(sha256(data).hexdigest(),),
        )
        self.append(collective, entry)
        return submission

    def append(self, collective: Collective, *new: IndexedExpert, expires: int = FAR) -> None:
        """Publish the next index, with these experts more."""
        latest = read_index(self.store, collective)
        index = Index(
            version=latest.position.version + 1 if latest else 1,
            previous=latest.position.sha256 if latest else None,
            charter=Position(version=1, sha256=self.identity),
            expires=expires,
            experts=(*(latest.index.experts if latest else ()), *new),
            retired=(),
        )
        append_index(self.store, collective, index, self.key)

    def model(self, **options: str) -> CollectiveModel:
        return open_model(self.url, cache=self.root / "cache", **options)

    def fetched(self) -> set[str]:
        """The submissions whose weights are in the cache."""
        return {file.parent.name for file in (self.root / "cache").rglob(WEIGHTS) if "experts" in file.parts}


@pytest.fixture
def reef(trained_run, tmp_path) -> Reef:
    return Reef(tmp_path, trained_run)


EXPERTS = ("0-eps-cosine", "1-flow-linear", "2-x0-linear-beta")


@pytest.mark.parametrize("options", [{}, {"memory_budget": "1MB"}, {"weights": "bf16"}, {"routing": "full"}])
def test_images_are_those_of_the_same_experts_on_disk(reef, options) -> None:
    for name in EXPERTS:
        reef.admit(name)
    model = reef.model()
    here = Pipeline.from_pretrained(model.directory, fetch=model.fetch, device="cpu", **options)
    there = Pipeline.from_pretrained(reef.run / "ensemble", device="cpu", **options)
    images = [pipe(PROMPTS, seeds=range(4)).latents for pipe in (here, there)]
    assert torch.equal(*images)


def test_only_experts_that_are_used_are_fetched_and_each_once(reef, monkeypatch) -> None:
    submissions = {name: reef.admit(name) for name in EXPERTS}
    model = reef.model()
    assert reef.fetched() == set()
    downloads: list[str] = []
    download = type(reef.store).download
    monkeypatch.setattr(
        type(reef.store), "download", lambda self, path, *rest: (downloads.append(path), download(self, path, *rest))
    )
    # The prompts of this routing need one expert only.
    for _ in range(2):
        pipe = Pipeline.from_pretrained(model.directory, routing="oracle-1", fetch=model.fetch, device="cpu")
        pipe(PROMPTS, seeds=range(4))
    assert reef.fetched() == {submissions["1-flow-linear"]}
    assert downloads == [f"submissions/{submissions['1-flow-linear']}/{WEIGHTS}"]
    # A newer index adds to what is there.
    assert open_model(reef.url, cache=reef.root / "cache").version == 3
    assert reef.fetched() == {submissions["1-flow-linear"]}


def test_weights_that_were_exchanged_in_the_store_are_not_sampled(reef) -> None:
    submission = reef.admit("1-flow-linear")
    file = Path(reef.url) / "submissions" / submission / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    model = reef.model()
    pipe = Pipeline.from_pretrained(model.directory, routing="full", fetch=model.fetch, device="cpu")
    with pytest.raises(AtollError, match=r"weights\.safetensors: sha256 is .* was not kept"):
        pipe(PROMPTS[:1])
    assert reef.fetched() == set()


def test_what_is_not_right_is_refused_before_anything_is_fetched(reef, tmp_path) -> None:
    with pytest.raises(AtollError, match="no expert was admitted yet; `atoll collective status`"):
        reef.model()
    reef.admit("1-flow-linear")
    with pytest.raises(AtollError, match=r"the collective .* expected 0000"):
        reef.model(identity="0" * 64)
    assert reef.model(identity=reef.identity).version == 1
    # An older state of the bucket, and another collective at the same address.
    reef.admit("0-eps-cosine")
    reef.model()
    (Path(reef.url) / "index" / "000002.json").unlink()
    with pytest.raises(AtollError, match="the index was rolled back"):
        reef.model()
    shutil.rmtree(reef.url)
    other = Reef.__new__(Reef)
    other.root, other.key = tmp_path / "other", Key.generate()
    other.root.mkdir()
    other.key.save(other.root / "key")
    (reef.run / "collective.json").unlink()
    open_collective(reef.url, reef.run, other.root / "key")
    with pytest.raises(AtollError, match="it was exchanged, or the address is of another collective"):
        reef.model()


def test_a_router_without_a_card_is_one_line(trained_run, tmp_path) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    (tmp_path / "run" / "router" / "card.json").unlink()
    reef = Reef(tmp_path, tmp_path / "run")
    reef.admit("1-flow-linear")
    with pytest.raises(AtollError, match=r"has router/weights.safetensors without card.json"):
        reef.model()


def test_an_index_that_expired_is_refused(reef) -> None:
    reef.admit("1-flow-linear")
    reef.append(read_collective(reef.store), expires=1)
    with pytest.raises(AtollError, match="index 2 has expired"):
        reef.model()


def test_atoll_sample_takes_the_address(reef, atoll, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(reef.root / "caches"))
    reef.admit("1-flow-linear")
    assert is_collective(reef.url)
    assert is_collective("s3://bucket/reef")
    assert not is_collective(str(reef.run))
    code, out, err = atoll("sample", reef.url, "moss", "-o", "out.png", "--identity", reef.identity)
    assert (code, out) == (0, "out.png written\n"), err
    assert (reef.root / "out.png").is_file()
    code, _, err = atoll("sample", reef.run / "ensemble", "moss", "--identity", reef.identity)
    assert (code, "is no collective; leave it out" in err) == (2, True)
