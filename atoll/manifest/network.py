"""The networks of a run: the experts' and the router's."""

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from atoll.choices import MLP_RATIOS
from atoll.manifest.base import Section

# What only one of the networks has, with the value that leaves it out.
_ONLY: dict[str, dict[str, object]] = {
    "dit": {"modulation": "single"},
    "mmdit": {"dual_blocks": 0, "size_embedding": False, "bottleneck": None},
}


class NetworkSettings(Section):
    """The network of the experts; the latent's shape and the text's width come from the data.

    Attributes:
        name: `dit` (DiT with PixArt's cross-attention) or `mmdit` (one attention over text and image tokens).
        mlp_ratio: hidden width of a block's MLP over the width; None: 4 for `dit`, 10/3 for the gated MLP of `mmdit`.
        modulation: of `dit`; `mmdit` has `single`.
        dual_blocks: of `mmdit`: the first blocks, which update the text as well.
        size_embedding: of `mmdit`: height and width of the latent enter the modulation.
        bottleneck: of `mmdit`: width between two layers that embed a patch, for pixels; None: one layer.
    """

    name: Literal["dit", "mmdit"] = "dit"
    patch: PositiveInt = 4
    width: PositiveInt = 128
    depth: PositiveInt = 4
    heads: PositiveInt = 4
    mlp_ratio: float | None = Field(None, gt=0)
    modulation: Literal["single", "per-block"] = "single"
    dual_blocks: NonNegativeInt = 0
    size_embedding: bool = False
    bottleneck: PositiveInt | None = None
    pooled: bool = True  # the condition's pooled vector enters the modulation

    @model_validator(mode="after")
    def _one_networks_keys(self) -> "NetworkSettings":
        for owner, keys in _ONLY.items():
            for key, without in keys.items():
                if owner != self.name and getattr(self, key) != without and self._refuses(key):
                    raise ValueError(f"{key} {getattr(self, key)}: only the network {owner} has it; leave it out")
        if self.dual_blocks >= self.depth:
            raise ValueError(f"dual_blocks {self.dual_blocks}: expected fewer than depth, {self.depth}")
        return self

    def _refuses(self, key: str) -> bool:
        """Whether a key of the other network is an error."""
        return True

    @property
    def ratio(self) -> float:
        """`mlp_ratio`, or the network's default."""
        return MLP_RATIOS[self.name] if self.mlp_ratio is None else self.mlp_ratio

    def config(self) -> dict[str, Any]:
        """The fields of the network's configuration that do not come from the data."""
        others = {key for owner, keys in _ONLY.items() if owner != self.name for key in keys}
        return {**self.model_dump(exclude={"pooled", *others}), "mlp_ratio": self.ratio}


class RouterNetworkSettings(NetworkSettings):
    """The router's sizes. pooled: it also reads the pooled vector, p(cluster | x_t, t, text); else x_t only (HDDM)."""

    width: PositiveInt = 64
    depth: PositiveInt = 2
    heads: PositiveInt = 2
    modulation: Literal["single", "per-block"] = "per-block"
    pooled: bool = False

    @model_validator(mode="after")
    def _reads_no_text(self) -> "RouterNetworkSettings":
        for key, without in _ONLY["mmdit"].items():
            if getattr(self, key) != without:
                raise ValueError(f"{key} {getattr(self, key)}: a router does not have it; leave it out")
        return self

    def _refuses(self, key: str) -> bool:
        # Its blocks have either modulation.
        return key != "modulation"

    def config(self) -> dict[str, Any]:
        """The fields of the router's configuration that do not come from the data."""
        choices = self.model_dump(exclude={"name", "pooled", *_ONLY["mmdit"]})
        block = {} if self.name == "dit" else {"block": self.name}
        return {**choices, "mlp_ratio": self.ratio, **block}
