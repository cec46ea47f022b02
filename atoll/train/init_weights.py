"""Training that starts from weights that are there: `train.init`, the directory of an expert."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from atoll.encoders.weights import same
from atoll.errors import AtollError
from atoll.nn import DiTConfig
from atoll.storage.artifact import CARD, read_card, read_tensors
from atoll.storage.cards import ClusterShardsCard, ExpertCard, InitRecord

_FOREIGN = ("final", "text_layers", "mlp_eps", "time_period")  # what atoll.yaml cannot say: the expert's own


class InitWeights:
    """An expert to start from: its network's config and weights, and what the new card tells of it.

    Raises:
        AtollError: no expert, or one that is damaged.
    """

    def __init__(self, path: Path):
        card = read_card(path, ExpertCard)
        self.path, self.about = path, InitRecord(name=card.name, sha256=card.weights_sha256)
        self._card, self._is_kept = card, card.network.get("name") != "dit"
        if self._is_kept:
            return
        try:
            self._config = DiTConfig.model_validate(card.network).model_dump(mode="json")
        except ValidationError as error:
            raise AtollError(
                f"{path / CARD}: network: {error.errors()[0]['msg']}; update atoll, or convert it again"
            ) from None

    def config(self, wanted: dict[str, Any], data: ClusterShardsCard) -> dict[str, Any]:
        """The config `wanted`, with what only weights from elsewhere have; of a network that is kept as it came
        (`atoll convert --keep`), its own, whatever is wanted.

        Args:
            data: the card of the shards that are trained on.

        Raises:
            AtollError: the expert's network is another one; one that is kept takes other latents or captions.
        """
        if self._is_kept:
            for key in ("latent_shape", "condition"):
                if not same(mine := self._card.plain()[key], theirs := data.plain()[key]):
                    raise AtollError(
                        f"train.init: {self.path} has {key} {mine}, the data {theirs}; "
                        "convert it for this run, or leave it out"
                    )
            return dict(self._card.network)
        merged = {**wanted, **{key: self._config[key] for key in _FOREIGN}}
        whole = DiTConfig.model_validate(merged).model_dump(mode="json")
        other = [f"{key} {self._config[key]} (here {whole[key]})" for key in whole if whole[key] != self._config[key]]
        if other:
            raise AtollError(
                f"train.init: {self.path} is a network of {', '.join(other)}; make atoll.yaml's equal, or leave it out"
            )
        return merged

    def weights(self) -> dict[str, Tensor]:
        """By the network's names. Raises AtollError if the file is damaged."""
        tensors = read_tensors(self.path, self._card)
        return {name.removeprefix("network."): v for name, v in tensors.items() if name.startswith("network.")}
