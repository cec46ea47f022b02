"""A run whose networks are MMDiTs: trained, assembled, sampled and planned like any other."""

from pathlib import Path

import pytest
import torch
import yaml

import atoll
from atoll.assemble import assemble_run
from atoll.ensemble.loading import load_ensemble
from atoll.manifest import load_manifest
from atoll.nn import MMDiT, Router
from atoll.nn.joint_blocks import DualBlock, MMDiTBlock
from atoll.plan import plan
from atoll.train.expert import train_expert
from atoll.train.router import train_router
from tests.conftest import RUN, write_run


@pytest.fixture(scope="module")
def mmdit_run(tmp_path_factory) -> Path:
    """Experts with and without dual blocks, and a DiT among them; the router has the same blocks."""
    path = write_run(tmp_path_factory.mktemp("mmdit") / "run")
    network = {"name": "mmdit", "patch": 2, "width": 16, "depth": 2, "heads": 2}
    experts = [
        {**RUN["experts"][0], "network": {"dual_blocks": 1, "size_embedding": True}},
        {**RUN["experts"][1], "network": {"bottleneck": 3}},
        {**RUN["experts"][2], "network": {"name": "dit"}},
    ]
    router = {"network": {**network, "depth": 1, "pooled": True}}
    (path / "atoll.yaml").write_text(yaml.safe_dump({**RUN, "network": network, "experts": experts, "router": router}))
    manifest = load_manifest(path)
    for k in range(3):
        train_expert(path, manifest, str(k))
    train_router(path, manifest)
    assemble_run(path, manifest)
    return path


def test_it_trains_assembles_and_samples(mmdit_run: Path) -> None:
    loaded = load_ensemble(mmdit_run / "ensemble")
    networks = [expert.network for expert in loaded.ensemble.experts]
    assert [type(network).__name__ for network in networks] == ["MMDiT", "MMDiT", "DiT"]
    assert isinstance(networks[0], MMDiT)
    assert [type(block) for block in networks[0].blocks] == [DualBlock, MMDiTBlock]
    assert isinstance(loaded.ensemble.router, Router)
    assert isinstance(loaded.ensemble.router.blocks[0], MMDiTBlock)
    pipe = atoll.Pipeline.from_pretrained(mmdit_run / "ensemble")
    first, second = (
        pipe(["moss", "rain rust"], num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images
        for _ in range(2)
    )
    assert len(first) == 2
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def test_resume_is_bit_exact(mmdit_run: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(line: dict) -> None:
        if line["step"] >= 4:
            raise Stop

    path = write_run(tmp_path / "run")
    (path / "atoll.yaml").write_text((mmdit_run / "atoll.yaml").read_text())
    manifest = load_manifest(path)
    with pytest.raises(Stop):
        train_expert(path, manifest, "0", progress=stop)
    own = train_expert(path, manifest, "0", resume=True)
    whole = mmdit_run / "experts" / own.name
    assert (own / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


def test_the_plan_counts_what_was_trained(mmdit_run: Path) -> None:
    manifest = load_manifest(mmdit_run)
    planned = plan(manifest, latent=(1, 4, 8))
    loaded = load_ensemble(mmdit_run / "ensemble")
    for expert, part in zip(loaded.ensemble.experts, planned.experts, strict=True):
        assert sum(p.numel() for p in expert.network.parameters()) == part.parameters  # type: ignore[union-attr]
    router = loaded.ensemble.router
    assert sum(p.numel() for p in router.parameters()) == planned.router.parameters  # type: ignore[union-attr]
