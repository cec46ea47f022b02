"""The progress bar shows foreign names as they are: neither markup nor escape sequences."""

from atoll.cli.app import bar


def test_a_note_is_neither_markup_nor_an_escape_sequence(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "120")
    with bar("evaluate", "steps", quiet=False) as update:
        update(1, 2, "[/red]an expert\x1b[2J")
    shown = capsys.readouterr().err
    assert r"[/red]an expert\x1b[2J" in shown
    assert "\x1b[2J" not in shown
