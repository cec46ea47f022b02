"""An ensemble's directory as a component of a diffusers pipeline, loaded and saved in Atoll's own format."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atoll.encoders.weights import WANTED, also_found_in, find_weights
from atoll.ensemble import Alignment, Sampler
from atoll.ensemble.loading import FROZEN, load_ensemble
from atoll.ensemble.offload import WeightDtype
from atoll.ensemble.prompt_cache import PromptCache
from atoll.errors import AtollError
from atoll.runtime.libraries import quiet
from atoll.storage.artifact import CARD, WEIGHTS, sha256_file, whole_directory, write_card
from atoll.storage.cards import EnsembleCard, ExpertEntry, RouterEntry
from atoll.storage.layout import ENSEMBLE_CARD, EXPERTS, ROUTER, STACKINGS

with quiet("diffusers"):
    from diffusers.models.modeling_utils import ModelMixin as ModelMixin

_WEIGHTS: dict[torch.dtype | None, WeightDtype | None] = {
    None: None,
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


class AtollEnsemble(ModelMixin):
    """An ensemble (or one expert) of Atoll's as a component of a diffusers pipeline.

    Args:
        path: its directory.
        weights: what the experts' weights are rounded to (fp32, bf16, fp16, int8); None: as they are stored.

    Attributes:
        loaded: the ensemble with its text encoder and codec; these two follow what they are given to its device.

    Raises:
        AtollError: as `load_ensemble` does.
    """

    def __init__(self, path: str | os.PathLike[str], weights: WeightDtype | None = None):
        super().__init__()  # type: ignore[no-untyped-call]
        self.path = Path(path)
        self.loaded = load_ensemble(self.path, weights=weights)
        own = self.loaded.ensemble
        used = (*(expert.network for expert in own.experts), own.router)
        # What .to() moves and casts; the ensemble's other tensors follow x.
        self.networks = nn.ModuleList(network for network in used if isinstance(network, nn.Module))

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the base class has nothing but keywords
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        torch_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "AtollEnsemble":
        """The ensemble at a local path.

        Args:
            torch_dtype: float32, bfloat16 or float16, what the experts' weights are rounded to; None: as stored.
            options: what `DiffusionPipeline.from_pretrained` hands to models of its own; most mean nothing here.

        Raises:
            AtollError: as `load_ensemble` does; another dtype; a device_map or a variant, which would be ignored.
        """
        if torch_dtype not in _WEIGHTS:
            raise AtollError(f"dtype {torch_dtype}: expected torch.float32, torch.bfloat16 or torch.float16")
        if unknown := [name for name in ("device_map", "variant") if options.get(name) is not None]:
            raise AtollError(
                f"{unknown[0]}: an ensemble of Atoll's has none; load it without, and move it by .to(device)"
            )
        return cls(pretrained_model_name_or_path, _WEIGHTS[torch_dtype])

    def forward(
        self,
        sampler: Sampler,
        x: Tensor,
        t: Tensor,
        prompt_cache: PromptCache,
        guidance_scale: float,
        guidance_range: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """Return the velocity [B, C, H, W] of a sampler (from `sampler`) for x [B, C, H, W] at times t [B] in [0, 1].

        A call of the module, and not of the sampler, runs the hooks that diffusers puts on its components.
        """
        return sampler.velocity(
            x, t, guidance_scale=guidance_scale, guidance_range=guidance_range, prompt_cache=prompt_cache
        )

    def sampler(
        self, routing: str | None = None, alignment: Alignment | None = None, replicas: str | None = None
    ) -> Sampler:
        """Return a sampler of the ensemble under other options (None: its own).

        Raises:
            AtollError: an unknown routing, alignment or way to combine replicas.
        """
        own = self.loaded.ensemble
        return Sampler(
            replace(
                own,
                routing=routing or own.routing,
                alignment=alignment or own.alignment,
                replicas=replicas or own.replicas,
            )
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:  # type: ignore[override]
        """Copies what it was loaded from, with every part and the frozen networks inside; whole or not at all.

        Weights are written as they were read, not as `.to(dtype)` made them. `options` are those of diffusers' own
        models (safe_serialization, max_shard_size): what is written is safetensors and JSON, whatever they say.

        Raises:
            AtollError: a part is gone or was changed since it was loaded, frozen weights that are pickled, a full disk.
        """
        with whole_directory(Path(save_directory)) as directory:
            if isinstance(self.loaded.card, EnsembleCard):
                self._copy_ensemble(self.loaded.card, directory)
            else:
                _copy_part(self.path, directory)
            self._copy_frozen(directory / FROZEN)

    def _copy_ensemble(self, card: EnsembleCard, directory: Path) -> None:
        """Copy the parts that are there into the directory, and write the card that names them."""
        there = [entry for entry in card.experts if (self.path / entry.url / CARD).is_file()]
        experts = [entry.model_copy(update={"url": f"{EXPERTS}/{number:03d}"}) for number, entry in enumerate(there)]
        changes: dict[str, Any] = {"experts": tuple(experts)}
        parts: list[tuple[ExpertEntry | RouterEntry, ExpertEntry | RouterEntry]] = [*zip(there, experts, strict=True)]
        if card.router is not None:
            changes["router"] = card.router.model_copy(update={"url": ROUTER})
            parts.append((card.router, changes["router"]))
        for old, new in parts:
            _copy_part(self.path / old.url, directory / new.url)
            if sha256_file(directory / new.url / CARD) != old.sha256:
                raise AtollError(f"{self.path / old.url / CARD}: was changed since it was loaded; load it again")
        if card.stackings is not None:
            _copy_file(self.path / card.stackings.file, directory / STACKINGS)
            changes["stackings"] = card.stackings.model_copy(update={"file": STACKINGS})
        write_card(directory / ENSEMBLE_CARD, card.model_copy(update=changes))

    def _copy_frozen(self, directory: Path) -> None:
        """The weights of the text encoders and the codec, each under the last part of the name that cards call it."""
        configs = (self.loaded.codec.config(), *self.loaded.encoder.configs())
        names = dict[str, str]()
        for config in (config for config in configs if "weights" in config):
            given, subfolder = config["weights"], config.get("subfolder", "")
            name = Path(given).name
            if not name.strip("."):
                raise AtollError(
                    f"weights {given!r}: no name to save them under; load from their directory's whole path"
                )
            if names.setdefault(name, given) != given:
                raise AtollError(f"weights {given!r} and {names[name]!r}: both would be saved as {name}; rename one")
            tokenizer = subfolder if config.get("tokenizer") is None else config["tokenizer"]
            folders = list(dict.fromkeys((subfolder, tokenizer)))
            with also_found_in(self.path / FROZEN):
                root = find_weights(given, folders)
            for folder in folders:
                files = {file for pattern in WANTED for file in (root / folder).glob(pattern)}
                if folder == subfolder and not any(file.suffix == ".safetensors" for file in files):
                    raise AtollError(f"{root / folder}: no safetensors to save; convert these weights to safetensors")
                (directory / name / folder).mkdir(parents=True, exist_ok=True)
                for file in files:
                    shutil.copyfile(file, directory / name / folder / file.name)


def _copy_part(source: Path, directory: Path) -> None:
    """Copies a card and its weights, and nothing else that lies there."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (CARD, WEIGHTS):
        _copy_file(source / name, directory / name)


def _copy_file(source: Path, target: Path) -> None:
    if not source.is_file():
        raise AtollError(f"{source}: is gone since it was loaded; what was loaded from there cannot be saved")
    shutil.copyfile(source, target)
