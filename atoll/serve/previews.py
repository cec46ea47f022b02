"""Previews in base64."""

import base64
import io
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.Image import Image


def encode_preview(image: "Image", format: Literal["png", "jpeg"]) -> str:
    """Return an image in base64."""
    file = io.BytesIO()
    image.save(file, format, quality=80)  # of JPEG; PNG has none
    return base64.b64encode(file.getvalue()).decode()
