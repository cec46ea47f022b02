"""The settings inside a PNG file: what is written is read back, and strangers' files are refused in one line."""

import io
import json
import subprocess
import sys

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from atoll.errors import AtollError
from atoll.image_settings import ImageSettings, encode_png, read_settings

SETTINGS = ImageSettings(
    prompt="a lighthouse, “fog” 😀\nsecond line",
    negative_prompt="blurry",
    seed=-(2**63),
    steps=25,
    guidance_scale=7.5,
    guidance_range=(0.2, 0.8),
    method="dpm++2m",
    routing="top-2",
    alignment="snr",
    replicas="stacked",
    size=(8, 4),
    ensemble="reef, two",
    ensemble_sha256="ab" * 32,
    missing_experts=("1-flow",),
    version="0.1.0",
)


def png(text: dict[str, str]) -> bytes:
    info, file = PngInfo(), io.BytesIO()
    for keyword, value in text.items():
        info.add_text(keyword, value)
    Image.new("L", (8, 4)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_settings_survive_the_file(mode, tmp_path) -> None:
    data = encode_png(Image.new(mode, (8, 4), 99), SETTINGS)
    (tmp_path / "a.png").write_bytes(data)
    assert read_settings(data) == SETTINGS
    assert read_settings(tmp_path / "a.png", whole=True) == SETTINGS
    assert Image.open(io.BytesIO(data)).getextrema() == ((99, 99) if mode == "L" else ((99, 99), (0, 0), (0, 0)))


def test_changed_pixels_are_noticed() -> None:
    data = bytearray(encode_png(Image.new("L", (8, 4)), SETTINGS))
    data[data.index(b"IDAT") + 6] ^= 1
    assert read_settings(bytes(data)) == SETTINGS
    with pytest.raises(AtollError, match="damaged"):
        read_settings(bytes(data), whole=True)


def test_other_tools_read_the_parameters() -> None:
    text = Image.open(io.BytesIO(encode_png(Image.new("L", (8, 4)), SETTINGS))).info["parameters"]
    assert text.splitlines() == [
        "a lighthouse, “fog” 😀",
        "second line",
        "Negative prompt: blurry",
        f"Steps: 25, Sampler: dpm++2m, CFG scale: 7.5, Seed: {-(2**63)}, Size: 8x4, Model hash: ababababab, "
        "Model: reef  two, Version: atoll 0.1.0",
    ]
    assert "Negative" not in SETTINGS.model_copy(update={"negative_prompt": ""}).parameters()


def test_differences_name_what_changes_the_image() -> None:
    other = {"seed": 3, "guidance_range": (0.0, 1.0), "version": "9", "ensemble": "x", "dropped_experts": ("a",)}
    assert SETTINGS.differences(SETTINGS.model_copy(update=other)) == ["seed", "guidance_range"]
    assert SETTINGS.differences(SETTINGS.model_copy(update={"missing_experts": ()})) == ["missing_experts"]


@pytest.mark.parametrize("end", [-1, -12, -30, 60, 20, 0])
def test_a_file_that_is_cut_is_not_whole(end) -> None:
    with pytest.raises(AtollError, match=r"the image: cannot be read .* expected a whole PNG file"):
        read_settings(encode_png(Image.new("L", (8, 4)), SETTINGS)[:end], whole=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"format 2; this version of atoll reads format 1"),
        ({"steps": 10**9}, "steps: got 1000000000"),
        ({"seed": "0"}, "seed: got '0'"),
        ({"guidance_scale": 1e300}, "guidance_scale"),
        ({"guidance_range": [0.8, 0.2]}, "expected the lower time first"),
        ({"method": "rk4"}, "method"),
        ({"size": [0, 4]}, "size"),
        ({"ensemble": "a\x1b[31m"}, "without control characters"),
        ({"colour": "red"}, "unknown key colour"),
        ({"prompt": "x" * 65_537}, "prompt"),
    ],
)
def test_settings_out_of_bounds_are_refused(changes, message) -> None:
    content = SETTINGS.model_dump(mode="json") | changes
    with pytest.raises(AtollError, match=message):
        read_settings(png({"atoll": json.dumps(content)}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged, or no PNG file"),
        (b"GIF89a" + bytes(99), "damaged, or no PNG file"),
        (png({}), "has no settings of Atoll"),
        (png({"atoll": "{"}), "no JSON"),
        (png({"atoll": "[" * 100_000}), "no JSON"),
        (png({"atoll": "[]"}), "format 'list'"),
        (png({"atoll": "x" * (2**21 + 1)}), "expected at most 2,097,152"),
    ],
)
def test_files_without_readable_settings_are_refused_in_one_line(data, message) -> None:
    with pytest.raises(AtollError, match=message) as error:
        read_settings(data)
    assert "\n" not in str(error.value)


def test_the_module_needs_no_torch() -> None:
    code = "import sys, atoll.image_settings; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
