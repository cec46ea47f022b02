"""The words that distinguish a group of captions from all captions."""

from atoll.report.words import count_words, distinctive_words


def test_a_word_counts_once_per_caption_in_any_case() -> None:
    assert count_words(["Red red car", "a car"]) == {"red": 1, "car": 2, "a": 1}


def test_words_common_everywhere_do_not_distinguish() -> None:
    here, everywhere = ["a red car", "a red boat"], ["a red car", "a red boat", "a blue car", "a blue sea"]
    words = distinctive_words(count_words(here), len(here), count_words(everywhere), len(everywhere))
    assert words[0] == ("red", 1.0, 0.5)
    assert "a" not in [word for word, _, _ in words]
