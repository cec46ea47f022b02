"""An ensemble's directory as a component of a diffusers pipeline, loaded and saved in Atoll's own format."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atoll.diffusers.options import check_options, weight_dtype
from atoll.encoders.text.joint import folders_of
from atoll.encoders.trust import Trust
from atoll.encoders.weights import WANTED, also_found_in, find_weights
from atoll.ensemble import Alignment, Sampler
from atoll.ensemble.loading import FROZEN, load_ensemble
from atoll.ensemble.offload import WeightDtype
from atoll.ensemble.prompt_cache import PromptCache
from atoll.errors import AtollError
from atoll.runtime.libraries import quiet
from atoll.storage.artifact import CARD, WEIGHTS, sha256_file, whole_directory, write_card
from atoll.storage.cards import EnsembleCard, ExpertEntry, LoraEntry, RouterEntry
from atoll.storage.layout import ENSEMBLE_CARD, EXPERTS, LORAS, ROUTER, STACKINGS

with quiet("diffusers"):
    from diffusers.hooks.group_offloading import apply_group_offloading
    from diffusers.models.modeling_utils import ModelMixin as ModelMixin


_Entry = ExpertEntry | RouterEntry | LoraEntry


class AtollEnsemble(ModelMixin):
    """An ensemble (or a single expert) as a component of a diffusers pipeline.

    Args:
        path: its directory.
        weights: the dtype that the experts' weights are rounded to (fp32, bf16, fp16, int8); None: as stored.
        allow_hub: as in `load_ensemble`.
        trust_paths: likewise.

    Attributes:
        loaded: the ensemble with its text encoder and codec; these two compute on the device of their input.

    Raises:
        AtollError: as `load_ensemble` does.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        weights: WeightDtype | None = None,
        *,
        allow_hub: bool = False,
        trust_paths: bool = False,
    ):
        # A module must be initialised before it gets submodules.
        super().__init__()  # type: ignore[no-untyped-call]
        # Load it on the CPU; diffusers moves it.
        self.path = Path(path)
        self._trust = Trust(hub=allow_hub, paths=trust_paths)
        self.loaded = load_ensemble(self.path, weights=weights, trust=self._trust)
        own = self.loaded.ensemble
        used = (*(expert.network for expert in own.experts), own.router)
        # The modules that .to() moves and casts; the ensemble's other tensors follow x.
        self.networks = nn.ModuleList(network for network in used if isinstance(network, nn.Module))

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the base class has only keywords
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        torch_dtype: Any = None,
        allow_hub: bool = False,
        trust_paths: bool = False,
        dtype: Any = None,
        **options: Any,
    ) -> "AtollEnsemble":
        """Load the ensemble at a local path.

        Args:
            pretrained_model_name_or_path: its directory.
            torch_dtype: float32, bfloat16 or float16, which the experts' weights are rounded to; None: as stored. Or a
                dictionary by component: "ensemble", "default".
            allow_hub: as in `load_ensemble`.
            trust_paths: likewise.
            dtype: the new name of torch_dtype in diffusers.
            options: those of diffusers' models; accepted where they change nothing.

        Raises:
            AtollError: as `load_ensemble` does; another dtype; an option that would be ignored (device_map, variant).
        """
        check_options(options, ("torch_dtype", "dtype", "allow_hub", "trust_paths"))
        weights = weight_dtype(torch_dtype, dtype)
        return cls(pretrained_model_name_or_path, weights, allow_hub=allow_hub, trust_paths=trust_paths)

    def forward(
        self,
        sampler: Sampler,
        x: Tensor,
        t: Tensor,
        prompt_cache: PromptCache,
        guidance_scale: float,
        *,
        guidance_range: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """Return the sampler's velocity [B, C, H, W].

        Calling the module instead of the sampler runs the hooks that diffusers adds to its components.

        Args:
            sampler: from `sampler`.
            x: samples [B, C, H, W].
            t: their times [B] in [0, 1].
            prompt_cache: of B rows.
            guidance_scale: as in `Ensemble.velocity`.
            guidance_range: likewise.
        """
        # The sampler may have other options than the ensemble itself.
        return sampler.velocity(
            x, t, guidance_scale=guidance_scale, guidance_range=guidance_range, prompt_cache=prompt_cache
        )

    @property
    def group_offloaded(self) -> bool:
        """Whether layers are moved to the device by groups, each at its `forward`."""
        # diffusers keeps its hooks under this name.
        return any(hasattr(module, "_diffusers_hook") for module in self.networks.modules())

    def enable_group_offload(  # type: ignore[override]  # the base class names all options of diffusers' function
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        *,
        offload_to_disk_path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        """Move layers to the device in groups when they are evaluated, in each network by itself.

        Which networks are evaluated, and in which order, differs from step to step; so no group, and no prefetching,
        may reach from one network into the next.

        Args:
            onload_device: where the networks are evaluated.
            offload_device: where the weights are otherwise.
            offload_type: "block_level" or "leaf_level".
            num_blocks_per_group: for "block_level".
            offload_to_disk_path: an empty directory for the weights, in place of the offload device.
            options: the others of diffusers' `apply_group_offloading`.

        Raises:
            AtollError: the directory is not empty: diffusers would take the weights from the files in it.
        """
        folder = None if offload_to_disk_path is None else Path(offload_to_disk_path)
        if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise AtollError(f"offload_to_disk_path {folder}: not an empty directory; name an empty or a new one")
        for number, network in enumerate(self.networks):
            # A directory for each network: diffusers names the files by the layers alone.
            apply_group_offloading(
                network,
                onload_device=onload_device,
                offload_device=offload_device,
                offload_type=offload_type,
                num_blocks_per_group=num_blocks_per_group,
                offload_to_disk_path=None if folder is None else str(folder / str(number)),
                **options,
            )

    def enable_layerwise_casting(self, *arguments: Any, **options: Any) -> None:
        """Raise AtollError: the networks compute in the dtype of their weights, which this would set to a storage's."""
        raise AtollError(
            "layerwise casting: the experts compute in the dtype of their weights; load with AtollEnsemble(path, "
            "weights='int8') to store them in 8 bits"
        )

    def sampler(
        self, routing: str | None = None, alignment: Alignment | None = None, replicas: str | None = None
    ) -> Sampler:
        """Return a sampler of the ensemble with other options (None: its own).

        Args:
            routing: a name of `atoll.ensemble.routing`.
            alignment: "snr" or "native".
            replicas: how replicas are combined.

        Raises:
            AtollError: an unknown routing, alignment or way to combine replicas.
        """
        # The ensemble is immutable: other options are another ensemble of the same networks.
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
        """Copy the files that it was loaded from, with every part and the frozen networks; all of them or none.

        Weights are written as they were read, not as `.to(dtype)` cast them.

        Args:
            save_directory: is replaced.
            options: those of diffusers' models (safe_serialization, max_shard_size); ignored, the files are always
                safetensors and JSON. A variant is refused: the files' names are those of the cards.

        Raises:
            AtollError: a variant; a part is gone or has changed since it was loaded, frozen weights that are pickled, a
                full disk.
        """
        check_variant(options.get("variant"))
        # A copy that fails leaves no half directory.
        with whole_directory(Path(save_directory)) as directory:
            if isinstance(self.loaded.card, EnsembleCard):
                self._copy_ensemble(self.loaded.card, directory)
            else:
                _copy_part(self.path, directory)
            self._copy_frozen(directory / FROZEN)

    def _copy_ensemble(self, card: EnsembleCard, directory: Path) -> None:
        """Copy the parts that are there into the directory, and write the card that names them."""
        # The card's entries with their new places.
        present = [entry for entry in card.experts if (self.path / entry.url / CARD).is_file()]
        experts = [_renumbered(entry, number) for number, entry in enumerate(present)]
        changes: dict[str, Any] = {"experts": tuple(experts)}
        parts: list[tuple[_Entry, _Entry]] = [*zip(present, experts, strict=True)]
        parts += [(old.lora, new.lora) for old, new in zip(present, experts, strict=True) if old.lora and new.lora]
        if card.router is not None:
            changes["router"] = card.router.model_copy(update={"url": ROUTER})
            parts.append((card.router, changes["router"]))

        # The parts; their hash must be that of the loaded card.
        for old, new in parts:
            _copy_part(self.path / old.url, directory / new.url)
            if sha256_file(directory / new.url / CARD) != old.sha256:
                raise AtollError(f"{self.path / old.url / CARD}: was changed since it was loaded; load it again")
        # Stackings are part of the ensemble, not of an expert.
        if card.stackings is not None:
            _copy_file(self.path / card.stackings.file, directory / STACKINGS)
            changes["stackings"] = card.stackings.model_copy(update={"file": STACKINGS})
        write_card(directory / ENSEMBLE_CARD, card.model_copy(update=changes))

    def _copy_frozen(self, directory: Path) -> None:
        """Copy the weights of the text encoders and the codec, each to a directory with the last part of its name."""
        # The codec's weights may be in the same repository as a text encoder's.
        configs = (self.loaded.codec.config(), *self.loaded.encoder.configs())
        names = dict[str, str]()
        for config in (config for config in configs if "weights" in config):
            # The name under which `find_weights` will find them again.
            weights = config["weights"]
            name = Path(weights).name
            if not name.strip("."):
                raise AtollError(
                    f"weights {weights!r}: no name to save them under; load from their directory's whole path"
                )
            if names.setdefault(name, weights) != weights:
                raise AtollError(f"weights {weights!r} and {names[name]!r}: both would be saved as {name}; rename one")

            # Their files, safetensors and JSON only.
            folders = folders_of(config)
            with also_found_in(self.path / FROZEN):
                root = find_weights(
                    weights, [*folders], self._trust, sha256=config.get("sha256"), revision=config.get("revision")
                )
            for folder, has_network in folders.items():
                files = {file for pattern in WANTED for file in (root / folder).glob(pattern)}
                if has_network and not any(file.suffix == ".safetensors" for file in files):
                    raise AtollError(f"{root / folder}: no safetensors to save; convert these weights to safetensors")
                (directory / name / folder).mkdir(parents=True, exist_ok=True)
                for file in files:
                    shutil.copyfile(file, directory / name / folder / file.name)


def check_variant(variant: str | None) -> None:
    """Raise AtollError for a variant to save: there is one set of weights, under the names in the cards."""
    if variant is not None:
        raise AtollError(
            f"variant {variant!r:.60}: an ensemble is saved with the weights and file names it was loaded with; leave "
            "variant out"
        )


def _renumbered(entry: ExpertEntry, number: int) -> ExpertEntry:
    """An expert's entry with its place, and that of its low-rank update, in a copy of the ensemble."""
    lora = entry.lora and entry.lora.model_copy(update={"url": f"{LORAS}/{number:03d}"})
    return entry.model_copy(update={"url": f"{EXPERTS}/{number:03d}", **({"lora": lora} if lora else {})})


def _copy_part(source: Path, directory: Path) -> None:
    """Copy a card and its weights, and no other file of the directory."""
    # A directory of experts may hold checkpoints and logs too.
    directory.mkdir(parents=True, exist_ok=True)
    for name in (CARD, WEIGHTS):
        _copy_file(source / name, directory / name)


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file that was there when the ensemble was loaded."""
    # A deleted file would leave a directory that cannot be loaded.
    if not source.is_file():
        raise AtollError(f"{source}: is gone since it was loaded; put it back, or load the ensemble again")
    shutil.copyfile(source, target)
