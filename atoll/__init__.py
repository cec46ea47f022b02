"""Atoll: one diffusion model, trained on many machines that never talk to each other."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from atoll.diffusers import AtollPipeline
    from atoll.ensemble import Ensemble, Expert
    from atoll.objective import Objective
    from atoll.pipeline import Pipeline

__all__ = ["AtollPipeline", "Ensemble", "Expert", "Objective", "Pipeline", "__version__"]

_HOMES = {
    "AtollPipeline": "atoll.diffusers",
    "Ensemble": "atoll.ensemble",
    "Expert": "atoll.ensemble",
    "Objective": "atoll.objective",
    "Pipeline": "atoll.pipeline",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: `import atoll` and the command line stay light, torch takes seconds."""
    import importlib

    # Public names first, then modules of the package.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    # A submodule is imported when it is first used.
    try:
        return importlib.import_module(f"atoll.{name}")
    except ModuleNotFoundError as error:
        # An import error inside the module is the caller's to see.
        if error.name != f"atoll.{name}":
            raise
        raise AttributeError(f"module 'atoll' has no attribute {name!r}") from None
