"""Build the source of captioned images that the manifest describes."""

from atoll.data.types import Source
from atoll.errors import AtollError
from atoll.manifest import DataSettings


def build_source(data: DataSettings) -> Source:
    """Build the source that the manifest's `data` section describes.

    Raises:
        AtollError: a path that does not exist or holds nothing, a column that is not there, a missing package.
    """
    if data.captions_from is not None:
        from atoll.data.captions_file import CaptionedSource

        # The images' own captions may be missing then.
        return CaptionedSource(_build(data.model_copy(update={"allow_uncaptioned": True})), data)
    return _build(data)


def _build(data: DataSettings) -> Source:
    # Each source is imported on use, together with the packages that it needs.
    if data.source == "glyphs":
        from atoll.data.glyphs import Glyphs

        if data.focus is not None:
            raise AtollError("data.focus: the built-in glyphs have no boxes; leave it out, or name images of your own")
        glyphs = Glyphs(data.subset, data.size, data.tiles)
        listed = () if data.buckets is None else data.buckets.sizes or ("none",)
        if data.tiles == "square" and listed:
            raise AtollError(
                "data.buckets: the built-in glyphs are squares; leave it out, set data.tiles: cell, or name images of "
                "your own"
            )
        if data.tiles == "cell" and not set(listed) >= set(map(str, glyphs.sizes)):
            raise AtollError(
                f"data.tiles cell: the glyphs have the sizes {' and '.join(map(str, glyphs.sizes))}; "
                f"set data.buckets: {{sizes: [{', '.join(map(str, glyphs.sizes))}]}}"
            )
        return glyphs
    if data.path is None:
        raise AtollError(f"data.source is {data.source!r} and data.path is not set; set it to where the images are")
    if data.source == "folder":
        from atoll.data.folder import Folder

        return Folder(data)
    if data.source == "webdataset":
        from atoll.data.tars import Tars

        return Tars(data)
    from atoll.data.parquet import Parquet

    return Parquet(data)
