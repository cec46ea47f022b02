"""Optional libraries: a missing one is one line, and quiet imports leave the settings as they were."""

import logging

import pytest

from atoll.errors import AtollError
from atoll.runtime.libraries import import_library, quiet


def test_a_missing_library_names_what_to_install() -> None:
    with pytest.raises(AtollError, match=r"no_such_library is needed: pip install 'atoll\[hub\]'"):
        import_library("no_such_library")


def test_quiet_restores_logging_even_after_an_error() -> None:
    before = logging.root.manager.disable
    verbosities = []

    def fail() -> None:
        with quiet("transformers") as transformers:
            verbosities.append(transformers.utils.logging.get_verbosity())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with quiet("transformers") as transformers:
        pass
    assert verbosities == [logging.ERROR]
    assert logging.root.manager.disable == before
    assert transformers.utils.logging.get_verbosity() == logging.WARNING
