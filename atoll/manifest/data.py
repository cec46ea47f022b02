"""The `data` section: where images and captions come from, and which of them are used."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from atoll.manifest.base import Section
from atoll.manifest.buckets import BucketSettings


class DataSettings(Section):
    """Where images come from, and which of them are used. docs/data.md describes all that is read.

    source: "folder" (images with text files beside them, or metadata.jsonl/.csv/.tsv/.json/.parquet), "webdataset"
    (tars as img2dataset writes them), "parquet" (a column of image files), "glyphs" (built in; `subset` is its "demo"
    or "all").
    path: a directory, file, glob or URL (s3://, gs://, hf://, ...: whatever fsspec opens), or a list of them.
    """

    source: Literal["glyphs", "folder", "webdataset", "parquet"] = "glyphs"
    path: str | tuple[str, ...] | None = None
    subset: Literal["demo", "all"] = "demo"
    # glyphs: all images are squares, or those of monospaced faces have the shape of their cell, two thirds as wide.
    tiles: Literal["square", "cell"] = "square"
    size: PositiveInt = 16  # pixels of a side; images are cropped to a square and resized to it
    # Sizes of several aspects in place of the one square, see BucketSettings; null: none.
    buckets: BucketSettings | None = None
    image: str | None = None  # the column of the images; None: the one that holds bytes
    # The column or field of the captions, or the extension of the files with them (".caption"; in tars "txt"), or the
    # image's own name ("@file") or its folder's ("@folder"); None: the usual names, in the order of docs/data.md. A
    # list of them: several captions of each image.
    caption: str | tuple[str, ...] | None = None
    caption_weights: tuple[float, ...] = ()  # of the captions that a list names; (): all alike
    caption_lines: Literal["join", "each"] = "join"  # several lines of text are one caption, or a caption each
    captions_from: str | None = None  # a file of captions by key, such as `atoll recaption` writes, in place of these
    own_captions: float = Field(0.0, ge=0, lt=1)  # the fraction of draws that take an image's own ones even so
    metadata: str | tuple[str, ...] | None = None  # folders: the tables of captions; None: metadata.jsonl, .csv, ...
    file_name: str | None = None  # tables: the column with the images' names; None: file_name and other usual names
    key: str | None = None  # the column of unique keys; None: the file and the number of the row
    split: str | None = None  # the column of the splits: "train" trains, anything else is held out
    # The column, or field of JSON, of the box that stays inside the crop, such as a face: [x0, y0, x1, y1] as fractions
    # of the image's width and height; null: none.
    focus: str | None = None
    # Without `split`: auto holds out what a column called split, or names such as test/, tell (as Hugging Face datasets
    # reads them); where these tell nothing, and with "hash", a hash of the key decides.
    splits: Literal["auto", "hash"] = "auto"
    validation: float = Field(0.01, ge=0, lt=1)  # the fraction held out by a hash of the key
    encoding: str = "utf-8"  # of captions; a byte order mark wins over it
    allow_uncaptioned: bool = False  # go on where captions lie beside the images and none of them is read
    companions: Literal["skip", "train"] = "skip"  # masks and other images that are named after an image
    links: Literal["inside", "follow"] = "inside"  # folders: follow links that lead out of the folder
    key_until: Literal["first-dot", "last-dot"] = "first-dot"  # tars: where in a member's name its sample's key ends
    missing_shards: Literal["refuse", "skip"] = "refuse"  # of a range such as {00000..00999}.tar
    # How an edit of encoded data is found: by sizes and times, then contents where these differ; or by all contents.
    fingerprint: Literal["stamps", "content"] = "stamps"
    min_side: PositiveInt | None = None  # pixels; smaller images are skipped; None: half of `size`
    # Images of equal pixels, once they are cropped and resized. None: skip; but some glyphs are meant to look alike.
    duplicates: Literal["skip", "keep"] | None = None
    # Of codec and feature network; auto: bf16 where that is fast, and where the feature's vectors bear it.
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    flips: bool = False  # the mirrored image's latent is stored too, and training sees either
    max_skipped: float = Field(0.05, ge=0, le=1)  # the fraction that may fail; duplicates and dead links do not count
    block: PositiveInt = 4096  # samples of a shard, where the source can be cut anywhere

    @model_validator(mode="after")
    def _weighted(self) -> "DataSettings":
        names = self.caption if isinstance(self.caption, tuple) else ()
        if isinstance(self.caption, tuple) and (not names or len(set(names)) < len(names)):
            raise ValueError(f"caption: {list(names)}; expected different names, at least one")
        if self.own_captions and self.captions_from is None:
            raise ValueError(
                "own_captions: there are only the images' own captions; set captions_from, or leave it out"
            )
        weights = self.caption_weights
        if weights and len(weights) != len(names):
            raise ValueError(
                f"caption_weights: {len(weights)} for {len(names)} names in the list `caption`; give one each"
            )
        if weights and not (all(0 <= weight < float("inf") for weight in weights) and any(weights)):
            raise ValueError(f"caption_weights: {list(weights)}; expected finite numbers of at least 0, not all 0")
        return self

    @property
    def captions(self) -> tuple[tuple[str | None, float], ...]:
        """The values of `caption` with their weights, those above 0; None for the usual names."""
        if not isinstance(self.caption, tuple):
            return ((self.caption, 1.0),)
        weights = self.caption_weights or (1.0,) * len(self.caption)
        return tuple((name, weight) for name, weight in zip(self.caption, weights, strict=True) if weight > 0)

    @property
    def smallest_side(self) -> int:
        """The shorter side, in pixels, below which an image is skipped."""
        return self.min_side if self.min_side is not None else max(1, self.size // 2)

    @property
    def skips_duplicates(self) -> bool:
        return self.duplicates == "skip" or (self.duplicates is None and self.source != "glyphs")
