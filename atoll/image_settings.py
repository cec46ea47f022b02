"""The settings of a sampled image, inside its PNG file: write them, and read them back.

Two text chunks: `atoll` holds JSON, an `ImageSettings`; `parameters` holds one line in the form that other tools read
("Steps: 50, Sampler: euler, CFG scale: 7.5, Seed: 0, ..."). This module imports neither torch nor networks.
"""

import io
import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from atoll.choices import Method
from atoll.errors import AtollError
from atoll.storage import bounds
from atoll.storage.cards import CardRecord, parse_record

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "atoll"  # the text chunk with the JSON
PARAMETERS = "parameters"  # the text chunk that other tools read
_FORMAT: Final = 1
_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG file
_JSON_CHARACTERS = 2 << 20  # two prompts of 65,536 characters take 1,572,864 as escapes

_Pixels = Annotated[int, Field(strict=True, ge=1, le=bounds.MAX_SIDE * 64)]  # codecs enlarge a latent's side at most so
_Experts = Annotated[tuple[bounds.PartName, ...], Field(max_length=bounds.MAX_EXPERTS)]
# What identifies the program and the place, not the image.
_NOT_COMPARED = {"ensemble", "weak", "version", "dropped_experts"}


class ImageSettings(CardRecord):
    """What an image was sampled with.

    Attributes:
        format: of this record, 1.
        prompt: the prompt.
        negative_prompt: "" is the null condition.
        seed: of the noise.
        steps: of the solver.
        guidance_scale: 1 is no guidance.
        guidance_range: the times (0 data, 1 noise) between which there was guidance.
        method: the solver.
        shift: of its times towards noise; 1: even times.
        routing, alignment, replicas: as in `atoll.Pipeline.from_pretrained`.
        weights: the dtype that the experts' weights were rounded to; None: as stored.
        size: (width, height) in pixels.
        ensemble: its name.
        ensemble_sha256: the hash of its card, which holds the hashes of its parts.
        weak: the name of the weak ensemble from which guidance led away; None: there was none.
        weak_sha256: the hash of its card.
        missing_experts: experts that were missing when the ensemble was loaded.
        dropped_experts: experts that were dropped while sampling.
        version: of Atoll.
    """

    format: Literal[1] = _FORMAT
    prompt: bounds.FreeText
    negative_prompt: bounds.FreeText = ""
    seed: bounds.Seed
    steps: bounds.Steps
    guidance_scale: bounds.Guidance
    guidance_range: tuple[bounds.Fraction, bounds.Fraction] = (0.0, 1.0)
    method: Method
    shift: bounds.Shift = 1.0
    routing: bounds.Name
    alignment: Literal["snr", "native"]
    replicas: bounds.Name
    weights: bounds.Name | None = None
    size: tuple[_Pixels, _Pixels]
    ensemble: bounds.PartName
    ensemble_sha256: bounds.Sha256
    weak: bounds.PartName | None = None
    weak_sha256: bounds.Sha256 | None = None
    missing_experts: _Experts = ()
    dropped_experts: _Experts = ()
    version: bounds.PartName

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        # A range without any time would silently turn guidance off.
        low, high = self.guidance_range
        if low > high:
            raise ValueError(f"guidance_range {low}, {high}: expected the lower time first")
        return self

    def differences(self, other: "ImageSettings") -> list[str]:
        """Return the names of the settings in which another image differs.

        The ensembles' names, Atoll's version and the experts that were dropped are not compared.
        """
        # In the order of the class.
        names = (name for name in type(self).model_fields if name not in _NOT_COMPARED)
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def text(self) -> dict[str, str]:
        """Return the text chunks by keyword."""
        # Files from before there was a shift or a weak ensemble have none: one without is still written like them.
        absent = ({"shift"} if self.shift == 1 else set()) | ({"weak", "weak_sha256"} if self.weak is None else set())
        values = self.model_dump(mode="json", exclude=absent or None)
        # ASCII: every reader of PNG text agrees on it.
        return {KEY: json.dumps(values, allow_nan=False), PARAMETERS: self.parameters()}

    def parameters(self) -> str:
        """Return the settings in the form that other tools read: prompt, negative prompt, one line of settings."""
        width, height = self.size
        line = {
            "Steps": self.steps,
            "Sampler": self.method,
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{width}x{height}",
            **({} if self.shift == 1 else {"Shift": f"{self.shift:g}"}),
            "Model hash": self.ensemble_sha256[:10],
            "Model": self.ensemble.replace(",", " "),  # a comma ends a value
            **({} if self.weak_sha256 is None else {"Weak model hash": self.weak_sha256[:10]}),
            "Version": f"atoll {self.version}",
        }
        lines = [self.prompt, f"Negative prompt: {self.negative_prompt}" if self.negative_prompt else ""]
        lines.append(", ".join(f"{name}: {value}" for name, value in line.items()))
        # A NUL would end the chunk's text.
        return "\n".join(one for one in lines if one).replace("\0", "\ufffd")


def encode_png(image: "Image", settings: ImageSettings) -> bytes:
    """Return a PNG file with the settings in its text chunks."""
    # PIL is imported where it is needed: settings alone need no image library.
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for keyword, text in settings.text().items():
        # iTXt is UTF-8; tEXt is Latin-1, which JSON in ASCII fits.
        (info.add_text if text.isascii() else info.add_itxt)(keyword, text)
    encoded = io.BytesIO()
    image.save(encoded, "PNG", pnginfo=info)
    return encoded.getvalue()


def read_settings(source: Path | bytes, *, whole: bool = False) -> ImageSettings:
    """Read the settings back from a PNG file, without decoding its pixels.

    Args:
        source: the file, or its content.
        whole: also check that the file is complete, by its end and the checksums of its chunks.

    Raises:
        AtollError: no PNG file, one that is damaged, one without settings, or settings out of bounds.
    """
    where = "the image" if isinstance(source, bytes) else str(source)
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            text = _text_of(file, where, whole)
    except OSError as error:
        raise AtollError(f"{where}: cannot be read ({error.strerror}); expected a whole PNG file") from None
    if text is None:
        raise AtollError(f"{where}: has no settings of Atoll; expected a PNG file that `atoll sample -o DIR/` wrote")
    # The text may come from anyone.
    problem = f"{where}: its settings cannot be read"
    if len(text) > _JSON_CHARACTERS:
        raise AtollError(f"{problem} ({len(text):,} characters, expected at most {_JSON_CHARACTERS:,})")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AtollError(f"{problem} (no JSON: {error})") from None
    # The format first: in another one every key could be wrong.
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise AtollError(f"{problem} (format {got!r:.40}; this version of atoll reads format {_FORMAT})")
    return parse_record(ImageSettings, content, f"{where}: its settings")


def _text_of(file: IO[bytes], where: str, whole: bool) -> str | None:
    """Return the text chunk of a PNG file that holds the JSON; None if there is none."""
    import struct
    import warnings

    from PIL import Image

    try:
        # Only text before the pixels is read: whoever wrote the settings put them there.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # no pixel is decoded
            with Image.open(file, formats=("PNG",)) as image:
                text = image.info.get(KEY)
                if whole:
                    _check_end(file)
                    image.verify()
    # Pillow's parser of PNG raises all of these for damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError):
        raise AtollError(f"{where}: cannot be read (damaged, or no PNG file); expected a whole PNG file") from None
    return str(text) if isinstance(text, str) else None


def _check_end(file: IO[bytes]) -> None:
    """Raise ValueError if the file does not end as PNG files do; Pillow ignores what the last bytes are."""
    # Pillow continues from where it was.
    position = file.tell()
    file.seek(-len(_END), io.SEEK_END)
    if file.read() != _END:
        raise ValueError("no end")
    file.seek(position)
