"""Training that starts from the weights of an expert, perhaps one of another size: `train.init`."""

import math
import warnings
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from atoll.encoders.codec.statistics import other_statistics
from atoll.encoders.weights import same
from atoll.errors import AtollError
from atoll.manifest import TrainSettings
from atoll.nn import DiTConfig, MMDiTConfig
from atoll.nn.positions import sincos_table
from atoll.objective import Objective
from atoll.storage.artifact import CARD, read_card, read_tensors
from atoll.storage.cards import ClusterShardsCard, ExpertCard, InitRecord
from atoll.storage.layout import MANIFEST, RunLayout
from atoll.train.denoiser_artifact import TrainingSpec

_NATIVE: dict[str, type[DiTConfig | MMDiTConfig]] = {"dit": DiTConfig, "mmdit": MMDiTConfig}
_FOREIGN = ("final", "text_layers", "mlp_eps", "time_period")  # atoll.yaml has no keys for these: taken from the expert
_SIZES = ("size", "base_size")  # may differ: the same weights compute any size, see `atoll.nn.positions`


class InitWeights:
    """An expert whose network and weights a training starts from.

    Attributes:
        about: the record of it in the new expert's card.

    Args:
        path: the expert's directory.

    Raises:
        AtollError: no expert, or a damaged one.
    """

    def __init__(self, path: Path):
        card = read_card(path, ExpertCard)
        self.path, self.about = path, InitRecord(name=card.name, sha256=card.weights_sha256)
        # A network of another kind is kept as it came; its config is not compared.
        self._card, native = card, _NATIVE.get(str(card.network.get("name")))
        self._is_kept = native is None
        if native is None:
            return
        # A card of a newer or older Atoll may have keys that this version lacks.
        try:
            self._config = native.model_validate(card.network).model_dump(mode="json")
        except ValidationError as error:
            raise AtollError(
                f"{path / CARD}: network: {error.errors()[0]['msg']}; update atoll, or convert it again"
            ) from None

    @classmethod
    def of(cls, spec: TrainingSpec, settings: TrainSettings) -> "InitWeights | None":
        """Return what a training starts from: the spec's base, else train.init; None if neither is set.

        Raises:
            AtollError: no expert is there, or a damaged one; the run's common model is not trained yet.
        """
        if spec.base is not None:
            return cls(spec.base)
        if not settings.init:
            return None
        init_weights = cls(init_path(spec.run, settings.init, spec.path))
        # A user who names a foreign expert chose its objective; the common model is one for all experts.
        if init_weights.path == RunLayout(spec.run).common:
            init_weights._compare(Objective(**spec.part.objective.model_dump()))
        return init_weights

    def config(self, requested: dict[str, Any], data: ClusterShardsCard, objective: Objective) -> dict[str, Any]:
        """Return the config of the network to train.

        Args:
            requested: the config that atoll.yaml asks for.
            data: the card of the shards to train on.
            objective: of the training.

        Returns:
            `requested` with the keys that only converted weights have; for data of another size than the expert's, also
            with its base size, by which its positions are scaled. For a network that is kept as it came (`atoll convert
            --keep`), its own config, whatever is requested.

        Raises:
            AtollError: the expert's network differs from `requested`, takes other latents or captions than the data, or
                knows latents of another size that are normalised otherwise.
        """
        self._check_statistics(data, is_resized=not self._is_kept and self._config["size"] != requested["size"])
        if self._is_kept:
            # A kept network reads the data as they are, so latents and captions must be of its kind.
            for key in ("latent_shape", "condition"):
                if not same(own := self._card.plain()[key], required := data.plain()[key]):
                    raise AtollError(
                        f"train.init: {self.path} has {key} {own}, the data {required}; "
                        "convert it for this run, or leave it out"
                    )
            return dict(self._card.network)
        # Compare the complete configs: what atoll.yaml cannot express is taken from the expert.
        merged = {**requested, **{key: self._config[key] for key in _FOREIGN if key in self._config}}
        complete = requested
        if requested["name"] == self._config["name"]:
            complete = _NATIVE[requested["name"]].model_validate(merged).model_dump(mode="json")
        # Each key that differs, with both values.
        differences = [
            f"{key} {self._config.get(key)} (here {value})"
            for key, value in complete.items()
            if key not in _SIZES and value != self._config.get(key)
        ]
        if differences:
            raise AtollError(
                f"train.init: {self.path} is a network with {', '.join(differences)}; make atoll.yaml's equal, or "
                "leave it out"
            )
        if self._config["size"] != requested["size"]:
            self._advise(requested["size"], data, objective)
        # The base stays that of the first weights, over any number of stages.
        base = self._config["base_size"] or self._config["size"]
        return merged if base == requested["size"] else {**merged, "base_size": base}

    def weights(self, config: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weights by the network's names.

        Args:
            config: of the network to train, from `config`.

        Raises:
            AtollError: the file is damaged; the network has another size, and the expert's positions serve one only.
        """
        # The card's hash is checked while the file is read.
        tensors = read_tensors(self.path, self._card)
        # The calibration's tensors stay behind: they belong to the old weights.
        weights = {name.removeprefix("network."): v for name, v in tensors.items() if name.startswith("network.")}
        # Positions that are added to the tokens are part of the weights, and belong to one size.
        if not self._is_kept and config["size"] != self._config["size"] and "positions" in weights:
            own, patch, width = self._config, config["patch"], config["width"]
            if not sincos_table(own["size"], own["base_size"], patch, width).has(weights["positions"]):
                raise AtollError(
                    f"train.init: {self.path} has positions of its own, for latents of {_sides(own['size'])} alone, "
                    f"the data have {_sides(config['size'])}; take data of its size, or an expert that Atoll trained"
                )
            weights["positions"] = sincos_table(config["size"], config.get("base_size"), patch, width).own()
        return weights

    def _compare(self, objective: Objective) -> None:
        """Warn if the network was trained to predict something else than this objective asks for.

        No conversion is possible: a prediction differs from another by a factor and a part of x that depend on the
        noise level, which no change of the weights expresses.
        """
        earlier = Objective(**self._card.objective)
        keys = ("prediction", "schedule", "time_scale")
        if any(earlier.config()[key] != objective.config()[key] for key in keys):
            warnings.warn(
                f"train.init: {self.path} predicts {_words(earlier)}, this training {_words(objective)}; it takes the "
                "weights as they are, so it starts from a network that predicts something else",
                stacklevel=4,
            )

    def _check_statistics(self, data: ClusterShardsCard, is_resized: bool) -> None:
        """Warn of data that are normalised by other statistics; refuse them if they have another size, too."""
        if (constants := other_statistics(self._card.codec, data.codec)) is None:
            return
        known = f"train.init: {self.path} knows latents normalised by {constants[0]}, the data's by {constants[1]}"
        if is_resized:
            raise AtollError(
                f"{known}; a stage of another size keeps the statistics of the first: `atoll cluster --like RUN "
                "--force` takes them from that expert's run"
            )
        warnings.warn(
            f"{known}; with codec.statistics: codec in atoll.yaml, `atoll cluster` leaves latents as the codec's own",
            stacklevel=5,
        )

    def _advise(self, size: list[int], data: ClusterShardsCard, objective: Objective) -> None:
        """Warn of what a stage of another size easily forgets: the same clusters, and a shift of the times."""
        card = self._card
        if card.assignment not in (None, data.assignment) and len(card.clusters) < card.k:
            warnings.warn(
                f"train.init: {self.path} knows cluster {', '.join(map(str, card.clusters))} of another clustering, "
                "whose images may be others than those of this run's; `atoll cluster --like RUN` takes its clusters",
                stacklevel=5,
            )
        # SD3 Eq. 23: the shift grows with the root of the number of tokens.
        before, now = (math.prod(one) // self._config["patch"] ** 2 for one in (self._config["size"], size))
        earlier = Objective(**card.objective)
        old, new = (1.0 if o.shift is None else o.shift.at(n) for o, n in ((earlier, before), (objective, now)))
        if now > before and math.isclose(old, new):
            warnings.warn(
                f"train.init: {self.path} was trained on {before} tokens an image, the data have {now}, and both "
                f"shift their times by {new:g}; noise hides less of a larger image, so consider objective.shift: "
                f"{old * math.sqrt(now / before):.3g} (SD3's rule), or a rule of tokens",
                stacklevel=5,
            )


def init_path(run: Path, init: str, part: Path) -> Path:
    """Return the directory of the expert that train.init names.

    Args:
        run: the run's directory.
        init: an expert's directory, or that of another run, relative to it.
        part: of this run, the artifact that is trained: another run's part of the same name is meant.

    Raises:
        AtollError: the run's common model is not trained yet.
    """
    # The word `common` is the path of the run's common model.
    path = run / init
    if (path / CARD).is_file():
        return path
    if (path / MANIFEST).is_file():
        return path / part.relative_to(run)
    if path == RunLayout(run).common:
        raise AtollError(
            f"train.init: common: {path} is not there yet; run `atoll train common` first, or copy it there"
        )
    return path


def _words(objective: Objective) -> str:
    """flow (linear, time scale 999)."""
    return f"{objective.prediction} ({objective.schedule.config()['name']}, time scale {objective.time_scale:g})"


def _sides(size: list[int]) -> str:
    return f"{size[0]} x {size[1]}"
