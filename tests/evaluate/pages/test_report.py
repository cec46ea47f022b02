"""The report page: well-formed, self-contained, safe with any caption; images and charts show their numbers."""

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.evaluate.measure import EvaluateSettings
from atoll.evaluate.metrics.frechet import DenoisingError
from atoll.evaluate.pages.report import ClusterInfo, ExpertInfo, Grid, Report, Usage, to_html, to_json
from atoll.evaluate.types import Results, Score, Space
from atoll.report.charts import Line, _log_ticks, _ticks, line_chart
from atoll.report.page import colour, image_sheet, number, weight_strip

EVIL = "<script>alert('x')</script> & \"q\" “é”"
VOID = {"meta", "img", "br"}


class Parsed(HTMLParser):
    """Tags that must nest, every attribute, and the text. Every table must be in a container that scrolls."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            assert self.open[-1] == "div"
            assert "wide" in self.tags[-1][1]["class"].split()
        self.tags.append((tag, {key: value or "" for key, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def score(name: str, frechet: float | None = 1.25, error: float = 0.5) -> Score:
    denoising = DenoisingError((0.25, 0.75), (error, 2 * error), 1.5 * error, 0.01)
    metrics = {"FD-pca48 [cdcdcdcd]": frechet, "recall-pca48 [cdcdcdcd]": None if frechet is None else 0.875}
    diverged = 0 if frechet is not None else 7
    return Score(name, f"made by {name}", 3, "euler", 1.0, {}, metrics, diverged, denoising, 12.5, 0.037)


def make_report(text: str = "a prompt") -> Report:
    names = ("top-1", "full", text, "monolith", "native")
    images = torch.linspace(0, 1, 2 * 3 * 4 * 6).reshape(2, 3, 1, 4, 6)
    weights = torch.tensor([[0.25, 0.75]]).expand(2, 5, 2)
    return Report(
        title=text,
        provenance={"machine": text},
        settings=EvaluateSettings(prompts=(text,)).model_dump(),
        hashes=(("encoded", "ab" * 32),),
        results=Results(
            (Space("pca48", 48, "cd" * 32, 0.9),),
            12,
            30,
            6,
            {"FD-pca48 [cdcdcdcd]": 0.75, "recall-pca48 [cdcdcdcd]": 0.5},
            2,
            "0123",
            (f"{text}: too few",),
            tuple(map(score, names)),
        ),
        groups={"ensemble": ("top-1", "full"), "expert": (text,), "monolith": ("monolith",)},
        alignment=(("native", "native"), ("snr + calibration", "top-1")),
        experts=(
            ExpertInfo(text, "eps on cosine", (0,), (0.0, 1.0), (1.0, 0.0)),
            ExpertInfo("b", "flow on linear", (1,)),
        ),
        grid=Grid((text, "other"), (0, 1, 2), (("top-1", images), ("full", images)), (images[0, :1], None), text),
        usages=(Usage("full", (1.0, 0.8, 0.6, 0.4, 0.2), weights),),
        clusters=(ClusterInfo(0, 11, 0.55, images[0], ((text, 0.5, 0.25),)),),
        clustered_by=text,
    )


class TestPage:
    @given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1) | st.just(EVIL))
    @settings(max_examples=30)
    def test_any_text_is_escaped(self, text: str) -> None:
        parsed = Parsed(to_html(make_report(text)))
        assert not parsed.all("script")
        assert text in parsed.text
        assert f"3 images of “{text}” by full" in [image["alt"] for image in parsed.all("img")]

    def test_the_page_is_self_contained(self) -> None:
        page = to_html(make_report())
        parsed = Parsed(page)
        assert not parsed.all("script")
        assert not parsed.all("link")
        assert "url(" not in page
        assert "http" not in page
        assert all(image["src"].startswith("data:image/png;base64,") for image in parsed.all("img"))

    def test_images_and_charts_have_texts_for_screen_readers(self) -> None:
        parsed = Parsed(to_html(make_report()))
        assert all(image["alt"] for image in parsed.all("img"))
        drawings = [svg for svg in parsed.all("svg") if svg.get("aria-hidden") != "true"]
        assert drawings
        assert all(svg["role"] == "img" and svg["aria-label"] for svg in drawings)
        assert "full, “a prompt”: mostly b, 75%" in [svg["aria-label"] for svg in drawings]
        assert parsed.all("html")[0]["lang"] == "en"

    def test_the_page_suits_phones_and_dark_mode(self) -> None:
        page = to_html(make_report())
        assert '<meta name="viewport" content="width=device-width' in page
        assert "prefers-color-scheme:dark" in page
        used = set(re.findall(r"var\((--\w+)\)", page))
        light, dark = page.split("prefers-color-scheme:dark")
        assert used <= set(re.findall(r"(--\w+):", light))
        assert set(re.findall(r"(--\w+):", light)) == set(re.findall(r"(--\w+):", dark.split("}}")[0]))

    def test_the_page_shows_each_number_and_its_settings(self) -> None:
        text = Parsed(to_html(make_report())).text
        for expected in ("1.25", "0.750 ± 0.010", "12.5", "made by monolith", "90.0%"):
            assert expected in text
        assert "real imagesscore of a perfect model0.7500.500" in text
        assert "pca48cdcdcdcd" in text  # the space and its hash, above "FD" and "recall"
        assert "FD\N{NO-BREAK SPACE}↓recall\N{NO-BREAK SPACE}↑" in text
        assert "a prompt: too few." in text
        assert "0.0370" in text  # GFLOPs
        assert "12 drawn images against 30 real training images" in text
        assert "3 euler steps, guidance 1" in text

    def test_a_variant_that_diverged_is_reported(self) -> None:
        report = make_report()
        bad = score("top-1", None, math.inf)
        report = replace(report, results=replace(report.results, scores=(bad, *report.results.scores[1:])))
        text = Parsed(to_html(report)).text
        assert "7 images diverged" in text
        value = to_json(report)
        assert value["results"]["scores"][0]["frechet"] is None
        assert value["results"]["scores"][0]["denoising"]["mean"] is None

    def test_without_clusters_calibration_or_monolith(self) -> None:
        bare = replace(
            make_report(),
            clusters=(),
            experts=(ExpertInfo("a", "eps on cosine", (0,)), ExpertInfo("b", "flow on linear", (1,))),
            groups={"ensemble": ("full",), "expert": (), "monolith": ()},
        )
        text = Parsed(to_html(bare)).text
        assert "No expert has a calibration" in text
        assert "The run has no clusters." in text


def test_json_holds_the_numbers() -> None:
    report = make_report()
    value = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert value["kind"] == "report"
    assert value["results"]["floor"] == 0.75
    assert value["results"]["scores"][1]["denoising"]["by_level"] == [0.5, 1.0]
    assert value["usage"][0]["weights"][1][4] == [0.25, 0.75]
    assert value["clusters"][0] == {"cluster": 0, "count": 11, "fraction": 0.55, "words": [["a prompt", 0.5, 0.25]]}
    assert value["hashes"] == {"encoded": "ab" * 32}


class TestSheet:
    def decoded(self, uri: str) -> Tensor:
        import numpy as np
        from PIL import Image

        image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
        return torch.from_numpy(np.array(image)).float()

    def test_a_sheet_shows_exact_pixels_row_by_row_enlarged(self) -> None:
        images = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
        sheet = self.decoded(image_sheet(images, columns=3, side=12, gap=1))
        assert sheet.shape == (2 * (2 * 4 + 1), 2 * (3 * 6 + 2), 4)
        fourth = sheet[2 * 5 : 2 * 9, 2 * 0 : 2 * 6]
        expected = (images[3] * 255).round().permute(1, 2, 0).repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert torch.equal(fourth[..., :3], expected)
        assert sheet[0, 2 * 6, 3] == 0  # the gap
        assert sheet[-1, -1, 3] == 0  # the sixth place
        assert (fourth[..., 3] == 255).all()

    def test_a_sheet_accepts_grey_images(self) -> None:
        sheet = self.decoded(image_sheet(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1), columns=2, side=1))
        assert sheet[0, :, 0].tolist() == [0, 0, 255]


class TestChart:
    def points(self, svg: str) -> list[list[tuple[float, float]]]:
        lines = re.findall(r'<polyline points="([^"]*)"', svg)
        return [[(float(a), float(b)) for a, b in (p.split(",") for p in line.split())] for line in lines]

    def test_draws_larger_values_higher_and_later_ones_further(self) -> None:
        svg = line_chart([Line("a", (0, 0.5, 1), (1, 3, 2), "red")], "label", "t", "y")
        (p0, p1, p2), *_ = self.points(svg)
        assert p0[0] < p1[0] < p2[0]
        assert p1[1] < p2[1] < p0[1]  # y points down
        assert p1[0] - p0[0] == pytest.approx(p2[0] - p1[0], abs=0.2)

    def test_logarithmic_axis_is_even_in_ratios(self) -> None:
        svg = line_chart([Line("a", (0, 0.5, 1), (0.01, 1, 100), "red")], "label", "t", "y", log_y=True)
        ((_, a), (_, b), (_, c)) = self.points(svg)[0]
        assert a - b == pytest.approx(b - c, abs=0.2)
        assert a > c

    def test_values_that_cannot_be_drawn_are_left_out(self) -> None:
        line = Line("a", (0, 0.2, 0.4, 0.6, 1), (1, math.nan, math.inf, -1, 2), "red")
        assert len(self.points(line_chart([line], "l", "t", "y"))[0]) == 3
        assert len(self.points(line_chart([line], "l", "t", "y", log_y=True))[0]) == 2
        nothing = line_chart([Line("a", (0, 1), (math.nan, math.nan), "red")], "l", "t", "y", log_y=True)
        assert self.points(nothing) == [[]]

    @pytest.mark.parametrize("apart", [0.0, 1e-16, 1e-13])
    def test_values_that_hardly_differ_give_a_flat_line(self, apart: float) -> None:
        for log_y in (False, True):
            svg = line_chart([Line("a", (0, 1), (0.5, 0.5 + apart), "red")], "l", "t", "y", log_y=log_y)
            (((_, a), (_, b)),) = self.points(svg)[:1]
            assert a == pytest.approx(b, abs=0.1)

    def test_a_chart_names_axes_and_lines(self) -> None:
        svg = line_chart([Line("<a>", (0, 1), (1, 2), "red", "2 4")], "<what>", "t (0: data)", "y & z")
        assert 'aria-label="&lt;what&gt;"' in svg
        for expected in ("t (0: data)", "y &amp; z", "&lt;a&gt;", 'stroke-dasharray="2 4"'):
            assert expected in svg

    @given(low=st.floats(-1e6, 1e6), size=st.floats(1e-3, 1e6))
    def test_ticks_enclose_and_are_few(self, low: float, size: float) -> None:
        ticks = _ticks(low, low + size)
        step = ticks[1] - ticks[0]
        assert ticks[0] <= low + 1e-6 * step
        assert ticks[-1] >= low + size - 1e-6 * step
        assert 2 <= len(ticks) <= 8

    @given(low=st.floats(1e-9, 1e6), ratio=st.floats(1, 1e9))
    def test_log_ticks_enclose_and_are_few(self, low: float, ratio: float) -> None:
        ticks = _log_ticks([low, low * ratio])
        assert ticks[0] <= low * 1.001
        assert ticks[-1] >= low * ratio * 0.999
        assert 2 <= len(ticks) <= 16
        assert ticks == sorted(ticks)


def test_strip_stacks_the_weights_of_each_step() -> None:
    svg = weight_strip(torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]), "who")
    assert re.findall(r'x="(\d+)" y="([\d.]+)" width="1" height="([\d.]+)" fill="([^"]+)"', svg) == [
        ("0", "0.000", "1.000", "var(--c0)"),
        ("1", "0.000", "0.500", "var(--c0)"),
        ("1", "0.500", "0.500", "var(--c2)"),
    ]


def test_every_expert_has_its_own_colour() -> None:
    assert len({colour(index) for index in range(40)}) == 40


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.23"),
        (0.0123456, "0.0123"),
        (123.456, "123"),
        (1234567.0, "1.23e+06"),
        (0.0, "0.00"),
        (9.999, "10.0"),
        (99.99, "100"),
        (12345.6, "12346"),
        (None, "diverged"),
        (math.nan, "diverged"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text
