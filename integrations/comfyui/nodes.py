"""The nodes, in ComfyUI's V3 schema. Everything but the graph's types is `atoll.Pipeline`."""

import hashlib
from pathlib import Path
from typing import Any, get_args

import comfy.utils
import numpy as np
import torch
from comfy_api.latest import ComfyExtension, io

from atoll import Pipeline
from atoll.choices import Method
from atoll.ensemble import Alignment

Ensemble = io.Custom("ATOLL_ENSEMBLE")

DEFAULT = "ensemble's default"
MAX_SEED = 2**32 - 1  # the noise uses 32 bits
CARDS = ("ensemble.json", "card.json")


class LoadEnsemble(io.ComfyNode):
    """A directory to an ensemble."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtollLoadEnsemble",
            display_name="Load Atoll ensemble",
            category="Atoll",
            description="Loads an ensemble of `atoll assemble`, or a single expert.",
            inputs=[
                io.String.Input("path", tooltip="The directory, such as runs/demo/ensemble."),
                io.Combo.Input("alignment", options=list(get_args(Alignment)), default="snr", tooltip="snr is exact."),
                io.Combo.Input("weights", options=["as stored", "fp32", "bf16", "fp16", "int8"], default="as stored"),
                io.String.Input("memory_budget", default="", tooltip="Such as 8GB; empty: all experts stay loaded."),
            ],
            outputs=[Ensemble.Output(display_name="ensemble")],
        )

    @classmethod
    def fingerprint_inputs(cls, path: str, **_: Any) -> str:
        """Return what changes when the ensemble does, so that ComfyUI loads it again."""
        cards = [Path(path) / name for name in CARDS if (Path(path) / name).is_file()]
        return hashlib.sha256(b"".join(card.read_bytes() for card in cards)).hexdigest()

    @classmethod
    def execute(cls, path: str, alignment: Alignment, weights: Any, memory_budget: str) -> io.NodeOutput:
        """Load the ensemble."""
        pipe = Pipeline.from_pretrained(
            path,
            alignment=alignment,
            weights=None if weights == "as stored" else weights,
            memory_budget=memory_budget.strip() or None,
        )
        return io.NodeOutput(pipe)


class SampleEnsemble(io.ComfyNode):
    """A prompt to images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtollSampleEnsemble",
            display_name="Sample Atoll ensemble",
            category="Atoll",
            description="Samples images of one prompt. Image i has the seed `seed` + i.",
            inputs=[
                Ensemble.Input("ensemble"),
                io.String.Input("prompt", multiline=True),
                io.String.Input("negative_prompt", multiline=True, default="", tooltip="Empty: the null condition."),
                io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True),
                io.Int.Input("images", default=1, min=1, max=4096),
                io.Int.Input("steps", default=0, min=0, max=10_000, tooltip="0: the ensemble's default."),
                io.Float.Input("guidance", default=-1.0, min=-1.0, max=100.0, step=0.1, tooltip="-1: the default."),
                io.Float.Input("guidance_from", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="Time; 0 is data."),
                io.Float.Input("guidance_to", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Time; 1 is noise."),
                io.Combo.Input("method", options=[DEFAULT, *get_args(Method)], default=DEFAULT),
                io.String.Input("routing", default="", tooltip="top-1, top-2, full, ...; empty: the default."),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(
        cls,
        ensemble: Pipeline,
        prompt: str,
        negative_prompt: str,
        seed: int,
        images: int,
        steps: int,
        guidance: float,
        guidance_from: float,
        guidance_to: float,
        method: Any,
        routing: str,
    ) -> io.NodeOutput:
        """Sample images [B, H, W, 3] in [0, 1]."""
        # The hook of the progress bar raises when the user cancels.
        bar = comfy.utils.ProgressBar(1)
        output = ensemble(
            prompt,
            steps or None,
            None if guidance < 0 else guidance,
            seeds=[(seed + number) % (MAX_SEED + 1) for number in range(images)],
            images_per_prompt=images,
            negative_prompt=negative_prompt or None,
            method=None if method == DEFAULT else method,
            routing=routing.strip() or None,
            guidance_range=(guidance_from, guidance_to),
            callback=bar.update_absolute,
        )
        pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in output.images])
        return io.NodeOutput(torch.from_numpy(pixels))


class AtollExtension(ComfyExtension):
    """What ComfyUI asks for nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadEnsemble, SampleEnsemble]


async def comfy_entrypoint() -> ComfyExtension:
    """ComfyUI calls this once."""
    return AtollExtension()
