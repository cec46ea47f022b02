from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import AtollError


@given(st.text())
def test_an_error_is_one_line_whatever_it_quotes(text) -> None:
    told = str(AtollError(f"got {text}"))
    assert told.isprintable()
    assert not text.isprintable() or told == f"got {text}"
