"""The networks, one file each, and `build_network`, which makes one from a card's configuration.

dit.py, mmdit.py    the denoisers that Atoll trains, built from attention.py
router.py           the router, of the blocks of either
paris.py            the networks of the Paris release
foreign.py          diffusers' own networks, unchanged; foreign_calls.py: how each is called
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from torch import nn

from atoll.errors import AtollError
from atoll.nn.dit import SIZES, DiT, DiTConfig
from atoll.nn.foreign import Foreign, ForeignConfig
from atoll.nn.mmdit import MMDIT_SIZES, MMDiT, MMDiTConfig
from atoll.nn.paris import Paris, ParisConfig, ParisRouter, ParisRouterConfig
from atoll.nn.router import Router, RouterConfig

__all__ = [
    "MMDIT_SIZES",
    "SIZES",
    "DiT",
    "DiTConfig",
    "Foreign",
    "ForeignConfig",
    "MMDiT",
    "MMDiTConfig",
    "Paris",
    "ParisConfig",
    "ParisRouter",
    "ParisRouterConfig",
    "Router",
    "RouterConfig",
    "build_network",
    "patch_of",
]


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """Build the network that `config` describes, freshly initialised.

    Args:
        config: as `network.config.model_dump(mode="json")` returns it. Its "name" is "dit", "mmdit", "router",
            "paris", "paris-router" or "diffusers" (which imports that library).

    Raises:
        AtollError: an unknown name or key, a missing or wrong value, or sizes that do not fit each other.
    """
    # A fixed list of classes: a card never names one by import path.
    name = config.get("name")
    try:
        if name == "dit":
            return DiT(DiTConfig.model_validate(dict(config)))
        if name == "mmdit":
            return MMDiT(MMDiTConfig.model_validate(dict(config)))
        if name == "router":
            return Router(RouterConfig.model_validate(dict(config)))
        if name == "paris":
            return Paris(ParisConfig.model_validate(dict(config)))
        if name == "paris-router":
            return ParisRouter(ParisRouterConfig.model_validate(dict(config)))
        if name == "diffusers":
            return Foreign(ForeignConfig.model_validate(dict(config)))
    except ValidationError as error:
        # All problems in one line.
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {describe(e)}" for e in error.errors())
        raise AtollError(f"network {name!r}: {problems}; correct these keys") from None
    foreign = "or one made elsewhere: 'paris', 'paris-router' or 'diffusers'"
    raise AtollError(f"network name: got {name!r}, expected 'dit', 'mmdit' or 'router', {foreign}; correct the name")


def patch_of(config: Mapping[str, Any]) -> int:
    """Return the side of a token in latent pixels, which divides the sides of every latent, of a network's config."""
    if config.get("name") == "diffusers":
        return ForeignConfig.model_validate(dict(config)).token_side
    side = config.get("patch", 1)
    return side if isinstance(side, int) and side > 0 else 1


def describe(error: ErrorDetails) -> str:
    """Describe one of pydantic's errors in a few words, with the value if there is one."""
    if error["type"] == "missing":
        return "missing"
    if error["type"] == "extra_forbidden":
        return "unknown key"
    return f"got {error['input']!r}, {error['msg'][0].lower()}{error['msg'][1:]}"
