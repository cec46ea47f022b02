import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from atoll.data.init import _with_data, init_run
from atoll.errors import AtollError
from atoll.manifest import load_manifest, parse_manifest, recipe_path


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (3, 5), "teal").save(data, "PNG")
    return data.getvalue()


def folder(path: Path) -> None:
    (path / "sub").mkdir()
    (path / "sub" / "moss.PNG").write_bytes(png())
    pq.write_table(pa.table({"file_name": ["sub/moss.PNG"], "text": ["moss"]}), path / "metadata.parquet")


def tars(path: Path) -> None:
    with tarfile.open(path / "00000.tar", "w") as tar:
        info = tarfile.TarInfo("moss.png")
        info.size = len(png())
        tar.addfile(info, io.BytesIO(png()))


def parquet(path: Path) -> None:
    pq.write_table(pa.table({"image": [png()], "caption": ["moss"]}), path / "part-0.parquet")


@pytest.mark.parametrize(("make", "source"), [(folder, "folder"), (tars, "webdataset"), (parquet, "parquet")])
def test_the_source_is_what_is_there(tmp_path, monkeypatch, make, source) -> None:
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    init_run(Path("run"), data="data")
    data = load_manifest(Path("run")).data
    assert (data.source, data.path) == (source, str(tmp_path / "data"))
    assert "# the share held out" in Path("run/atoll.yaml").read_text()


def test_without_data_the_recipe_is_copied(tmp_path) -> None:
    assert init_run(tmp_path).read_bytes() == recipe_path("demo").read_bytes()
    with pytest.raises(AtollError, match="exists; edit it, or name another directory"):
        init_run(tmp_path)


def test_the_demo_may_begin_again_with_the_same_and_nothing_else(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    folder(tmp_path / "data")
    data = str(tmp_path / "data")
    written = init_run(tmp_path / "run", data=data, again=True)
    assert init_run(tmp_path / "run", data=data, again=True) == written
    assert init_run(tmp_path / "run", again=True) == written
    with pytest.raises(AtollError, match="is not what --recipe and --data ask for"):
        init_run(tmp_path / "run", "demo", again=True)


@pytest.mark.parametrize(
    ("recipe", "data", "message"),
    [
        (None, "nowhere", r"nowhere: cannot be listed \(it is not there\); expected images, tars or parquet files"),
        (None, "empty", r"empty: no images, tars or parquet files found.*there is nothing"),
        ("demo", "data", r"demo.yaml: its data section has no path to set; .*take --recipe images"),
        ("nothing", None, r"no recipe 'nothing'; expected one of .*demo"),
        ("broken.yaml", "data", r"broken.yaml: not YAML"),
        ("list.yaml", "data", r"list.yaml: its data section has no path and no source to set"),
    ],
)
def test_what_cannot_be_begun_is_told_and_nothing_is_written(tmp_path, monkeypatch, recipe, data, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").mkdir()
    folder(tmp_path / "data")
    (tmp_path / "broken.yaml").write_text("data: [")
    (tmp_path / "list.yaml").write_text("- data")
    with pytest.raises(AtollError, match=message):
        init_run(Path("run"), recipe, data)
    assert not os.path.exists("run")


@given(st.text(min_size=1))
def test_any_path_is_written_as_it_is(path) -> None:
    text = recipe_path("images").read_text()
    written = _with_data(text, "here", {"source": "parquet", "path": path})
    data = parse_manifest(written, "here").data
    assert (data.source, data.path) == ("parquet", path)
    assert written.count("#") >= text.count("#")
