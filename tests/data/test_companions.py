"""Masks and other companions of images are left out, unless a person captioned them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.data.companions import companions
from atoll.data.folder import Folder
from atoll.data.tars import Tars
from atoll.data.types import Raw
from atoll.manifest import DataSettings
from tests.data.test_tars import tar_bytes


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (["a.jpg", "a-masklabel.png"], {"a-masklabel.png": "masklabel"}),
        (["a.jpg", "A_Mask.PNG", "a_Mask.png"], {"a_Mask.png": "mask"}),
        (["x/a.jpg", "a_mask.png"], {}),  # the image is elsewhere
        (["a-condlabel.png"], {"a-condlabel.png": "condlabel"}),  # OneTrainer's, with or without an image
        (["lonely_mask.png"], {}),
        (
            ["a.jpg", "a.depth.png", "a seg.png", "a_normal.tif"],
            {"a.depth.png": "depth", "a seg.png": "seg", "a_normal.tif": "normal"},
        ),
        (["img/a.jpg", "masks/a.png"], {"masks/a.png": "masks"}),
        (["a.jpg", "mask/a.png"], {"mask/a.png": "mask"}),
        (["a.jpg", "mask/a_mask.png"], {"mask/a_mask.png": "mask"}),
        (["img/a.jpg", "conditioning_data/a.jpg"], {"conditioning_data/a.jpg": "conditioning_data"}),
        (["normal/1.png", "pneumonia/1.png"], {}),  # classes
        (["photo/1.png", "sketch/1.png"], {}),
        (["masks/1.png", "masks/2.png"], {}),  # a data set of masks
        (["e\u0301.jpg", "\u00e9_mask.png"], {"\u00e9_mask.png": "mask"}),  # composed and decomposed letters
    ],
)
def test_companions_are_known_by_their_names(names, left_out) -> None:
    assert companions(names, ()) == left_out


def test_a_captioned_image_is_no_companion() -> None:
    assert companions(["a.jpg", "a_mask.png"], {"a_mask.png"}) == {}


@given(st.lists(st.text(st.sampled_from("amsk_-./"), min_size=1, max_size=12), max_size=6, unique=True))
def test_not_all_images_are_companions(names) -> None:
    left_out = companions(names, ())
    assert left_out.keys() <= set(names)
    assert all(word in ("masklabel", "condlabel") for word in left_out.values()) or len(left_out) < len(names)


def read(source) -> dict[str, str]:
    found = [sample for block in source.blocks() for sample in source.read(block)]
    return {sample.key: sample.caption if isinstance(sample, Raw) else sample.reason for sample in found}


def test_masks_in_a_folder_are_not_trained_on(tmp_path) -> None:
    for name, text in {"a.jpg": "1", "a.txt": "one", "a-masklabel.png": "2", "b_mask.png": "3", "b.png": "4"}.items():
        (tmp_path / name).write_text(text)
    settings = DataSettings(source="folder", path=str(tmp_path))
    source = Folder(settings)
    assert read(source) == {"a.jpg": "one", "b.png": ""}
    assert source.notes()[0].startswith("left out as companions of other images: 1 masklabel, 1 mask (a-masklabel.png")
    assert "a-masklabel.png" not in source.listing().sizes
    kept = Folder(settings.model_copy(update={"companions": "train"}))
    assert read(kept).keys() == {"a.jpg", "a-masklabel.png", "b.png", "b_mask.png"}
    assert kept.config() == {**source.config(), "companions": "train"}


MASK = "companion: named after another image; data.companions: train keeps it"


@pytest.mark.parametrize(
    ("members", "found"),
    [
        # sorted by name, "-" comes before "." and "_" after it
        (["a-mask.png", "a.jpg", "b.jpg", "b_mask.png"], {"a-mask": MASK, "a": "", "b": "", "b_mask": MASK}),
        (["a-mask.png", "b.jpg"], {"a-mask": "", "b": ""}),
        (["a.jpg", "b-mask.png"], {"a": "", "b-mask": ""}),
        (["a-depth.png", "a-mask.png", "a.jpg"], {"a-depth": MASK, "a-mask": MASK, "a": ""}),
        (["z-masklabel.png"], {"z-masklabel": MASK}),
    ],
)
def test_masks_in_a_tar(tmp_path, members, found) -> None:
    (tmp_path / "t.tar").write_bytes(tar_bytes(*((name, b"x") for name in members)))
    settings = DataSettings(source="webdataset", path=str(tmp_path))
    source = Tars(settings)
    assert read(source) == {f"t/{key}": text for key, text in found.items()}
    skipped = [sample for block in source.blocks() for sample in source.read(block) if not isinstance(sample, Raw)]
    assert not any(sample.failed for sample in skipped)
    assert set(read(Tars(settings.model_copy(update={"companions": "train"}))).values()) == {""}


def test_a_captioned_mask_in_a_tar_is_an_image(tmp_path) -> None:
    members = [("a.jpg", b"x"), ("a_mask.png", b"y"), ("a_mask.txt", b"a mask of feathers")]
    (tmp_path / "t.tar").write_bytes(tar_bytes(*members))
    assert read(Tars(DataSettings(source="webdataset", path=str(tmp_path)))) == {
        "t/a": "",
        "t/a_mask": "a mask of feathers",
    }
