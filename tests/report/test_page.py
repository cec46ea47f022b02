"""What HTML pages are made of: escaped text, readable numbers, image sheets as data URIs."""

import base64
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import atoll
from atoll.report.page import STYLE, document, image_sheet, number, table, weight_strip


def test_titles_are_escaped_and_nothing_is_loaded_from_elsewhere() -> None:
    page = document("a < b", "<p>lead</p>", [("R & D", "<p>content</p>")])
    assert "<title>a &lt; b</title>" in page
    assert "<h2>R &amp; D</h2>" in page
    assert "<p>content</p>" in page
    assert "http" not in page
    assert "<script" not in page


def test_a_table_is_in_a_container_that_scrolls() -> None:
    html = table("<tr><th>FD</th></tr>", "<tr><td>1</td></tr>", "scores of a & b", "text")
    assert re.fullmatch(r'<div class="wide text"[^>]*><table>.*<td>1</td>.*</table></div>', html)
    assert 'aria-label="scores of a &amp; b"' in html
    assert 'tabindex="0"' in html  # the keyboard can scroll it
    (rule,) = re.findall(r"^\.wide\{(.*?)\}", STYLE, flags=re.M | re.S)
    assert "overflow-x:auto" in rule
    assert "max-width:calc(100vw - " in rule


def test_no_page_writes_a_table_of_its_own() -> None:
    package = Path(atoll.__file__).parent
    assert [file.name for file in package.rglob("*.py") if "<table" in file.read_text()] == ["page.py"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (12.0, "12.0"), (123.4, "123"), (99999, "99999"), (1.5e6, "1.50e+06"), (None, "diverged")],
)
def test_numbers_read_well(value, text) -> None:
    assert number(value) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_words(value) -> None:
    assert number(value, missing="none") == "none"


def test_an_image_sheet_holds_the_images_in_their_places() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 4, 2)
    uri = image_sheet(images, columns=2, side=4)
    sheet = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert sheet.size == (2 * 2 + 1, 2 * 4 + 1)
    assert [sheet.getpixel(place) for place in ((0, 0), (3, 0), (0, 5))] == [
        (0, 0, 0, 255),
        (128, 128, 128, 255),
        (255, 255, 255, 255),
    ]
    assert sheet.getpixel((3, 5))[3] == 0  # there is no fourth image


def test_a_weight_strip_stacks_the_experts_of_a_step() -> None:
    strip = weight_strip(torch.tensor([[0.25, 0.75], [1.0, 0.0]]), "who <draws>")
    assert strip.count("<rect") == 3  # a weight of zero is not drawn
    assert 'y="0.250" width="1" height="0.750"' in strip
    assert 'aria-label="who &lt;draws&gt;"' in strip
