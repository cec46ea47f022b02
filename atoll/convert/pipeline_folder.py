"""What a diffusers pipeline's directory says about its transformer: text encoder, codec, scheduler, size."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.convert.kind import CheckpointKind
from atoll.encoders.codec.diffusers import KINDS
from atoll.errors import AtollError
from atoll.storage.artifact import read_json

INDEX = "model_index.json"
# The pipelines whose text encoder Atoll computes as they do: _class_name in the index -> the condition's name.
CONDITIONS = {
    "PRXPipeline": "prx",
    "StableDiffusion3Pipeline": "sd3",
    "SanaPipeline": "sana",
    "Lumina2Pipeline": "lumina2",
    "Lumina2Text2ImgPipeline": "lumina2",
    "FluxPipeline": "flux",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2-klein",
}
CODECS = {kind.cls: name for name, kind in KINDS.items()}
# Pipelines whose samples do not follow the path x = (1 - t) x0 + t eps with eps of unit variance.
REFUSED = {
    "PRXPixelPipeline": "its noise has a standard deviation of 2",
    "SanaSprintPipeline": "its output is no velocity on a fixed path",
}
PIXELS = 1024  # per side, of the images that FLUX and FLUX.2 were made for


@dataclass(frozen=True)
class PipelineFolder:
    """A directory with model_index.json, or any other source, about which nothing is known.

    Attributes:
        root: the directory; None without an index.
        index: the content of model_index.json.
    """

    root: Path | None
    index: Mapping[str, Any]

    @classmethod
    def read(cls, source: Path) -> "PipelineFolder":
        """Read the index of the pipeline at `source`, or above it if `source` is its transformer/.

        Raises:
            AtollError: the index is damaged, or is that of a pipeline that is no expert.
        """
        roots = [source, source.parent] if source.name == "transformer" else [source]
        root = next((root for root in roots if (root / INDEX).is_file()), None)
        if root is None:
            return cls(None, {})
        index = read_json(root / INDEX)
        if not isinstance(index, dict):
            raise AtollError(f"{root / INDEX}: holds {type(index).__name__}; expected a JSON object")
        if (reason := REFUSED.get(str(index.get("_class_name")))) is not None:
            raise AtollError(f"{root}: a {index['_class_name']} is no expert of an ensemble: {reason}")
        return cls(root, index)

    def condition(self) -> dict[str, Any] | None:
        """Return the config of the text encoder; None if unknown."""
        name = CONDITIONS.get(str(self.index.get("_class_name")))
        if self.root is None or name is None or not (self.root / "text_encoder").is_dir():
            return None
        return {"name": name, "weights": str(self.root.resolve())}

    def codec(self) -> dict[str, Any] | None:
        """Return the config of the codec; None if there is none.

        Raises:
            AtollError: a codec that Atoll does not have.
        """
        if self.root is None or not (self.root / "vae" / "config.json").is_file():
            return None
        cls = _object(self.root / "vae" / "config.json").get("_class_name")
        if cls not in CODECS:
            raise AtollError(
                f"{self.root / 'vae'}: a {cls}; name the codec (--codec), one of {', '.join(CODECS.values())}"
            )
        return {"name": CODECS[cls], "weights": str(self.root.resolve()), "subfolder": "vae"}

    def check_scheduler(self) -> None:
        """Raise AtollError unless the scheduler samples a velocity on the linear path, as the kept networks predict."""
        file = None if self.root is None else self.root / "scheduler" / "scheduler_config.json"
        if file is None or not file.is_file():
            return
        config = _object(file)
        name, prediction = str(config.get("_class_name")), config.get("prediction_type")
        if not name.startswith("FlowMatch") and prediction != "flow_prediction":
            raise AtollError(
                f"{file}: {name} with prediction_type {prediction!r}; expected a flow: say what the network predicts "
                "(--objective, --schedule)"
            )

    def latent_side(self, kind: CheckpointKind, factor: int) -> int | None:
        """Return the side of the latents that a network without a sample_size was made for; None if unknown.

        Args:
            kind: of the network.
            factor: pixels of an image per latent pixel.
        """
        pixels = self.index.get("default_sample_size") if kind == "prx" else PIXELS
        return pixels // factor if isinstance(pixels, int) and not isinstance(pixels, bool) else None


def _object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise AtollError(f"{file}: holds {type(content).__name__}; expected a JSON object")
    return content
