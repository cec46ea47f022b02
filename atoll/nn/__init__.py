"""The networks, and how a card's configuration becomes one.

dit.py, router.py   the denoiser and the router that are trained here, of attention.py; block_cache.py
paris.py            Paris's, as released        foreign.py   diffusers' own, as they are
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from torch import nn

from atoll.errors import AtollError
from atoll.nn.dit import SIZES, DiT, DiTConfig
from atoll.nn.foreign import Foreign, ForeignConfig
from atoll.nn.paris import Paris, ParisConfig, ParisRouter, ParisRouterConfig
from atoll.nn.router import Router, RouterConfig

__all__ = [
    "SIZES",
    "DiT",
    "DiTConfig",
    "Foreign",
    "ForeignConfig",
    "Paris",
    "ParisConfig",
    "ParisRouter",
    "ParisRouterConfig",
    "Router",
    "RouterConfig",
    "build_network",
]


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """The network that `config` describes, by its "name", freshly initialised: "dit" and "router"; "paris" and
    "paris-router"; "diffusers", which imports that library.

    `network.config.model_dump(mode="json")` is such a configuration. Raises AtollError for an unknown name or
    key, a missing or wrong value, and sizes that do not fit each other.
    """
    name = config.get("name")
    try:
        if name == "dit":
            return DiT(DiTConfig.model_validate(dict(config)))
        if name == "router":
            return Router(RouterConfig.model_validate(dict(config)))
        if name == "paris":
            return Paris(ParisConfig.model_validate(dict(config)))
        if name == "paris-router":
            return ParisRouter(ParisRouterConfig.model_validate(dict(config)))
        if name == "diffusers":
            return Foreign(ForeignConfig.model_validate(dict(config)))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {describe(e)}" for e in error.errors())
        raise AtollError(f"network {name!r}: {problems}; correct these keys") from None
    foreign = "or one made elsewhere: 'paris', 'paris-router' or 'diffusers'"
    raise AtollError(f"network name: got {name!r}, expected 'dit' or 'router', {foreign}; correct the name")


def describe(error: ErrorDetails) -> str:
    """One of pydantic's errors in a few words, with the value that was got where there is one."""
    if error["type"] == "missing":
        return "missing"
    if error["type"] == "extra_forbidden":
        return "unknown key"
    return f"got {error['input']!r}, {error['msg'][0].lower()}{error['msg'][1:]}"
