"""Errors are one printable line."""

from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import AtollError


@given(st.text())
def test_an_error_is_one_line_whatever_it_quotes(text) -> None:
    message = str(AtollError(f"got {text}"))
    assert message.isprintable()
    assert not text.isprintable() or message == f"got {text}"
