"""Quiet and late imports of heavy optional packages."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from atoll.errors import AtollError


def import_library(name: str, extra: str = "hub") -> ModuleType:
    """Import an optional library, which `pip install 'atoll[EXTRA]'` installs. Raises AtollError that says so."""
    try:
        return import_module(name)
    except ImportError as error:
        raise AtollError(f"the package {error.name or name} is needed: pip install 'atoll[{extra}]'") from None


@contextmanager
def quiet(name: str) -> Iterator[ModuleType]:
    """Import transformers or diffusers without warnings and progress bars inside the block; settings are restored.

    Raises:
        AtollError: the library is not installed.
    """
    # Importing them also imports other installed packages, which log too: silence all logging meanwhile.
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        # The library's own verbosity and progress bars.
        library = import_library(name)
        settings = import_module(f"{name}.utils.logging")
        level, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
        settings.set_verbosity_error()
        settings.disable_progress_bar()
        # Restore them even if the block raises.
        try:
            yield library
        finally:
            settings.set_verbosity(level)
            if bars:
                settings.enable_progress_bar()
    finally:
        logging.disable(disabled)
