"""Built-in data set: the glyphs of matplotlib's DejaVu and STIX fonts, captioned by their Unicode names.

54,164 black-on-white images of 1 channel (with matplotlib 3.11), such as "greek small letter omega, serif italic".
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atoll.data.types import Block, Raw, Source
from atoll.errors import AtollError
from atoll.image_size import ImageSize


@dataclass(frozen=True)
class Face:
    """One font file, its words in captions, and the extent of its printable ASCII from the baseline."""

    file: str
    words: str
    ascent: float  # in em
    descent: float  # in em


def _family(words: str, ascent: float, descent: float, **files: str) -> list[Face]:
    return [
        Face(f"{file}.ttf", " ".join([words, *style.split("_")]).removesuffix(" regular"), ascent, descent)
        for style, file in files.items()
    ]


# All slanted faces are called italic, so that one word means one thing. Left out: LastResort draws code points, STIXSiz
# and STIXNonUni hold fragments, and the cm fonts map characters to glyphs of other characters.
FACES: tuple[Face, ...] = (
    *_family("sans", 0.81, 0.24, regular="DejaVuSans", bold="DejaVuSans-Bold",
             italic="DejaVuSans-Oblique", bold_italic="DejaVuSans-BoldOblique"),
    *_family("serif", 0.81, 0.24, regular="DejaVuSerif", bold="DejaVuSerif-Bold",
             italic="DejaVuSerif-Italic", bold_italic="DejaVuSerif-BoldItalic"),
    *_family("mono", 0.81, 0.24, regular="DejaVuSansMono", bold="DejaVuSansMono-Bold",
             italic="DejaVuSansMono-Oblique", bold_italic="DejaVuSansMono-BoldOblique"),
    *_family("stix", 0.75, 0.22, regular="STIXGeneral", bold="STIXGeneralBol",
             italic="STIXGeneralItalic", bold_italic="STIXGeneralBolIta"),
    *_family("sans display", 0.81, 0.24, regular="DejaVuSansDisplay"),
    *_family("serif display", 0.81, 0.24, regular="DejaVuSerifDisplay"),
)  # fmt: skip

# Characters of these faces are all of one width. Their cell, with margins, is two thirds as wide as it is high.
MONOSPACED = "mono"
_CELL = (2, 3)

# The subset "demo": printable ASCII and the Greek alphabet without accents.
DEMO = frozenset([*range(33, 127), *range(0x391, 0x3A2), *range(0x3A3, 0x3AA), *range(0x3B1, 0x3CA)])

# A character, with all its faces, is held out if its code point is 3 modulo 20. That holds out "S", "g", Lambda, sigma,
# "+", "?" and "{" of the demo, and keeps the digits and the commonest letters.
HELD_OUT_EVERY, HELD_OUT_AT = 20, 3

_BLOCK = 4096  # glyphs per block
_CANVAS = 128  # pixels at which a glyph is drawn, before it is reduced to the requested size
_MARGIN = 1 / 32  # of the image's side, left free above and below the tallest letters


class GlyphsConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["glyphs"] = "glyphs"
    subset: Literal["demo", "all"] = "demo"
    size: int = Field(16, ge=8, le=_CANVAS)
    tiles: Literal["square", "cell"] = "square"

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> "GlyphsConfig":
        """Validate a configuration. Raises AtollError for an unknown key or value."""
        try:
            return cls.model_validate(dict(config))
        except ValidationError as error:
            where, message = error.errors()[0]["loc"], error.errors()[0]["msg"]
            raise AtollError(f"source 'glyphs': {'.'.join(map(str, where))}: {message}") from error


class Glyphs(Source):
    """Every usable glyph of 18 faces ("all"), or ASCII and Greek in the 16 faces that have them ("demo": 2,288 images).

    A glyph is usable if the font's character map has it, `unicodedata` names it, and it is not blank. All glyphs of a
    face share one scale and one baseline and are centred horizontally. A glyph that crosses the edge is moved, and one
    that is larger than the image is reduced to fit. Order: by code point, then as in `FACES`.

    Args:
        subset: "demo" or "all".
        size: height in pixels, and width of the squares.
        tiles: "square": all images are squares; "cell": those of monospaced faces have the shape of their cell, 2:3.

    Raises:
        AtollError: matplotlib or one of its font files is missing; a size whose cells have no whole width.
    """

    name = "glyphs"

    def __init__(
        self, subset: Literal["demo", "all"] = "demo", size: int = 16, tiles: Literal["square", "cell"] = "square"
    ):
        self._config = GlyphsConfig.parse({"subset": subset, "size": size, "tiles": tiles})
        if tiles == "cell" and size * _CELL[0] % _CELL[1]:
            raise AtollError(f"data.size {size}, tiles cell: cells are 2/3 as wide; take a multiple of {_CELL[1]}")
        self._fonts = _fonts()
        self._glyphs = [  # (code point, number of the face)
            (code, number)
            for number, (path, font) in enumerate(self._fonts)
            for code in _characters(path, font)
            if subset == "all" or code in DEMO
        ]
        self._glyphs.sort()

    def __len__(self) -> int:
        return len(self._glyphs)

    @property
    def sizes(self) -> tuple[ImageSize, ...]:
        """The sizes of the images: the square, and the cell if there is one."""
        side = self._config.size
        cell = (ImageSize(side, side * _CELL[0] // _CELL[1]),) if self._config.tiles == "cell" else ()
        return (ImageSize(side, side), *cell)

    def blocks(self) -> list[Block]:
        ranges = [(start, min(start + _BLOCK, len(self))) for start in range(0, len(self), _BLOCK)]
        return [Block(f"{start:06d}-{stop:06d}", stop - start, (start, stop)) for start, stop in ranges]

    def read(self, block: Block) -> Iterator[Raw]:
        """Yield the glyphs of a block; the images are [1, size, size] uint8, cells [1, size, 2/3 size]."""
        for code, number in self._glyphs[slice(*block.content)]:
            # The caption names the character and the face; all faces of a character share its split.
            face, square = FACES[number].words, self._draw(code, number)[None]  # [1,H,H]
            cell = self._config.tiles == "cell" and face.startswith(MONOSPACED)
            yield Raw(
                key=f"U+{code:04X}/{face.replace(' ', '-')}",
                image=self._draw(code, number, cell=True)[None] if cell else square,  # [1,H,W]
                caption=caption(code, face),
                split="val" if code % HELD_OUT_EVERY == HELD_OUT_AT else "train",
                square=square if cell else None,
            )

    def config(self) -> dict[str, Any]:
        # Cards from before there were cells do not name them.
        return self._config.model_dump(exclude={"tiles"} if self._config.tiles == "square" else None)

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        # The pixels depend on the font files, which differ between versions of matplotlib.
        for path, _ in self._fonts:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def _draw(self, code: int, number: int, cell: bool = False) -> np.ndarray:
        """Draw one image [H, W] uint8: black ink (0) on white paper (255); as a square, or as a cell."""
        face, (_, font) = FACES[number], self._fonts[number]
        # Draw at the canvas size, with the origin on the baseline.
        left, top, right, bottom = font.getbbox(chr(code), anchor="ls")  # from the baseline's left end, y down
        ink = Image.new("L", (int(right - left), int(bottom - top)), 255)
        ImageDraw.Draw(ink).text((-left, -top), chr(code), fill=0, font=font, anchor="ls")
        # The box of the font may exceed the ink: crop to the ink itself.
        x0, y0, x1, y1 = Image.eval(ink, lambda value: 255 - value).getbbox() or (0, 0, *ink.size)
        ink, top = ink.crop((x0, y0, x1, y1)), top + y0
        size = self._config.size
        # Canvas and image have the same shape.
        width = self.sizes[-1].width if cell else size
        paper = round(_CANVAS * width / size)
        if ink.width > paper or ink.height > _CANVAS:
            ink.thumbnail((paper, _CANVAS), Image.Resampling.LANCZOS)
        # Place the baseline so that the tallest letters fit between the margins.
        free = _CANVAS * (1 - 2 * _MARGIN)
        baseline = _CANVAS * _MARGIN + free * face.ascent / (face.ascent + face.descent)
        y = min(max(round(baseline + top), 0), _CANVAS - ink.height)
        # Centre horizontally, then reduce once, which anti-aliases the edges.
        canvas = Image.new("L", (paper, _CANVAS), 255)
        canvas.paste(ink, ((paper - ink.width) // 2, y))
        return np.asarray(canvas.resize((width, size), Image.Resampling.LANCZOS))


def caption(code: int, face: str) -> str:
    """Return the caption of a character in a face: "latin capital letter a, serif bold"."""
    return f"{unicodedata.name(chr(code)).lower()}, {face}"


def _fonts() -> list[tuple[Path, ImageFont.FreeTypeFont]]:
    """Load the fonts of `FACES` at the size of the canvas, with their files."""
    try:
        import matplotlib
    except ImportError as error:
        raise AtollError("the source 'glyphs' takes its fonts from matplotlib: pip install 'atoll[data]'") from error
    directory = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = []
    for face in FACES:
        path, em = directory / face.file, _CANVAS * (1 - 2 * _MARGIN) / (face.ascent + face.descent)
        try:
            # Raqm, the other layout engine, raises on some isolated characters.
            fonts.append((path, ImageFont.truetype(path, em, layout_engine=ImageFont.Layout.BASIC)))
        except OSError as error:
            raise AtollError(f"{path}: cannot be read ({error}); install matplotlib anew") from error
    return fonts


def _characters(path: Path, font: ImageFont.FreeTypeFont) -> Iterator[int]:
    """Yield the code points of a font that have a name and ink."""
    from matplotlib.ft2font import FT2Font

    for code, glyph in FT2Font(str(path)).get_charmap().items():
        if glyph != 0 and unicodedata.name(chr(code), "") != "":  # glyph 0 is .notdef
            _, top, _, bottom = font.getbbox(chr(code), anchor="ls")
            if bottom > top:
                yield code
