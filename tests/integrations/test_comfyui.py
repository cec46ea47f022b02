"""The ComfyUI nodes, against ComfyUI's own `comfy_api` if it is importable, else against its documented interface."""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from atoll.errors import AtollError
from atoll.pipeline import Pipeline

NODES = Path(__file__).parents[2] / "integrations" / "comfyui"


class Place:
    """An input or output of a node: its id and its options."""

    def __init__(self, id: str | None = None, **options: object):
        self.id, self.options = id, options


def documented() -> dict[str, ModuleType]:
    """The documented part of comfy_api and comfy.utils that the nodes use."""
    kind = SimpleNamespace(Input=Place, Output=Place)
    io = SimpleNamespace(
        ComfyNode=object,
        Schema=SimpleNamespace,
        NodeOutput=lambda *args: SimpleNamespace(args=args),
        Custom=lambda name: kind,
        **dict.fromkeys(("String", "Int", "Float", "Combo", "Image"), kind),
    )
    names = ("comfy_api", "comfy_api.latest", "comfy", "comfy.utils")
    modules = {name: ModuleType(name) for name in names}
    modules["comfy_api.latest"].io, modules["comfy_api.latest"].ComfyExtension = io, object
    modules["comfy"].utils = modules["comfy.utils"]
    return modules


class Bar:
    """ComfyUI's progress bar; its hook raises when the user cancels."""

    values: list[tuple[int, int]] = []  # noqa: RUF012  # the test reads it
    cancel_at: int | None = None

    def __init__(self, total: int):
        pass

    def update_absolute(self, value: int, total: int) -> None:
        self.values.append((value, total))
        if value == self.cancel_at:
            raise InterruptedError("cancelled")


@pytest.fixture
def nodes(monkeypatch):
    # A real ComfyUI on the path is used as it is.
    if importlib.util.find_spec("comfy_api") is None:
        for name, module in documented().items():
            monkeypatch.setitem(sys.modules, name, module)
    import comfy.utils

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar, raising=False)
    monkeypatch.setattr(Bar, "values", [])
    spec = importlib.util.spec_from_file_location(
        "comfyui_atoll", NODES / "__init__.py", submodule_search_locations=[str(NODES)]
    )
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "comfyui_atoll", package)
    spec.loader.exec_module(package)
    extension = asyncio.run(package.comfy_entrypoint())
    yield asyncio.run(extension.get_node_list())
    sys.modules.pop("comfyui_atoll.nodes", None)


def inputs(node) -> list[Place]:
    return node.define_schema().inputs


def load(nodes, path: Path) -> Pipeline:
    return nodes[0].execute(str(path), "snr", "as stored", "").args[0]


def sample(nodes, pipe: Pipeline, **changes: object) -> torch.Tensor:
    arguments = {
        "ensemble": pipe, "prompt": "moss", "negative_prompt": "", "seed": 3, "images": 2, "steps": 4, "guidance": 2.0,
        "guidance_from": 0.0, "guidance_to": 1.0, "method": "heun", "routing": "full",
    }  # fmt: skip
    return nodes[1].execute(**arguments | changes).args[0]


def test_each_node_takes_what_its_schema_says(nodes) -> None:
    schemas = [node.define_schema() for node in nodes]
    assert [schema.node_id for schema in schemas] == ["AtollLoadEnsemble", "AtollSampleEnsemble"]
    for node in nodes:
        names = node.execute.__func__.__code__.co_varnames[1 : node.execute.__func__.__code__.co_argcount]
        assert [one.id for one in inputs(node)] == list(names)


def test_images_are_those_of_the_pipeline(nodes, trained_run) -> None:
    pipe = load(nodes, trained_run / "ensemble")
    images = sample(nodes, pipe, negative_prompt="rain", guidance_from=0.2)
    own = pipe(
        "moss", 4, 2.0, seeds=[3, 4], images_per_prompt=2, negative_prompt="rain", method="heun", routing="full",
        guidance_range=(0.2, 1.0),
    )  # fmt: skip
    expected = np.stack([np.asarray(image.convert("RGB")) for image in own.images])
    assert images.shape == (2, 4, 8, 3)
    assert images.dtype == torch.float32
    assert ((images * 255).round().to(torch.uint8).numpy() == expected).all()
    assert Bar.values == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_empty_fields_are_the_ensembles_defaults(nodes, trained_run) -> None:
    pipe = load(nodes, trained_run / "ensemble")
    images = sample(nodes, pipe, images=1, steps=0, guidance=-1.0, method="ensemble's default", routing="")
    expected = np.asarray(pipe("moss", seeds=[3]).images[0].convert("RGB"))
    assert ((images[0] * 255).round().to(torch.uint8).numpy() == expected).all()


def test_cancelling_ends_the_sampling(nodes, trained_run, monkeypatch) -> None:
    monkeypatch.setattr(Bar, "cancel_at", 2)
    with pytest.raises(InterruptedError):
        sample(nodes, load(nodes, trained_run / "ensemble"))
    assert Bar.values[-1] == (2, 4)


def test_an_ensemble_that_changed_is_loaded_again_and_a_wrong_path_is_named(nodes, tmp_path) -> None:
    (tmp_path / "ensemble.json").write_text("{}")
    before = nodes[0].fingerprint_inputs(str(tmp_path), alignment="snr")
    (tmp_path / "ensemble.json").write_text("{ }")
    assert nodes[0].fingerprint_inputs(str(tmp_path), alignment="snr") != before
    with pytest.raises(AtollError, match="nowhere"):
        load(nodes, tmp_path / "nowhere")
