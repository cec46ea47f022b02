"""Training that starts from the weights of an expert: `train.init`."""

import warnings
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from atoll.encoders.codec.statistics import other_statistics
from atoll.encoders.weights import same
from atoll.errors import AtollError
from atoll.nn import DiTConfig, MMDiTConfig
from atoll.storage.artifact import CARD, read_card, read_tensors
from atoll.storage.cards import ClusterShardsCard, ExpertCard, InitRecord

_NATIVE: dict[str, type[DiTConfig | MMDiTConfig]] = {"dit": DiTConfig, "mmdit": MMDiTConfig}
_FOREIGN = ("final", "text_layers", "mlp_eps", "time_period")  # atoll.yaml has no keys for these: taken from the expert


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

    def config(self, requested: dict[str, Any], data: ClusterShardsCard) -> dict[str, Any]:
        """Return the config of the network to train.

        Args:
            requested: the config that atoll.yaml asks for.
            data: the card of the shards to train on.

        Returns:
            `requested` with the keys that only converted weights have. For a network that is kept as it came (`atoll
            convert --keep`), its own config, whatever is requested.

        Raises:
            AtollError: the expert's network differs from `requested`, or takes other latents or captions than the data.
        """
        if constants := other_statistics(self._card.codec, data.codec):
            warnings.warn(
                f"train.init: {self.path} knows latents normalised by {constants[0]}, the data's by {constants[1]}; "
                "with codec.statistics: codec in atoll.yaml, `atoll cluster` leaves latents as the codec's own",
                stacklevel=4,
            )
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
            if value != self._config.get(key)
        ]
        if differences:
            raise AtollError(
                f"train.init: {self.path} is a network with {', '.join(differences)}; make atoll.yaml's equal, or "
                "leave it out"
            )
        return merged

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by the network's names. Raises AtollError if the file is damaged."""
        # The card's hash is checked while the file is read.
        tensors = read_tensors(self.path, self._card)
        # The calibration's tensors stay behind: they belong to the old weights.
        return {name.removeprefix("network."): v for name, v in tensors.items() if name.startswith("network.")}
