"""The encoder `wordllama`: the package's own table, and small random ones."""

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from atoll.encoders.embedded import package_file
from atoll.encoders.text import WordLlamaEncoder, build_encoder
from atoll.encoders.text.hashed import sinusoids
from atoll.encoders.trust import STRANGER
from atoll.errors import AtollError

CAPTIONS = ["a photo of a rose", "", "A satellite photo of Herbaceous vegetation."]


@pytest.fixture(scope="module")
def encoder() -> WordLlamaEncoder:
    return build_encoder({"name": "wordllama"})


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("ATOLL_WEIGHTS", raising=False)


def words_of(encoder: WordLlamaEncoder, caption: str) -> torch.Tensor:
    """The vectors of a caption's words [n, D], without their position."""
    encoded = encoder([caption])
    states = encoded.states[0] - sinusoids(encoder.length, encoder.dim)
    return states[1 : int(encoded.mask.sum())]


def test_shapes_and_mask(encoder) -> None:
    encoded = encoder(CAPTIONS)
    assert encoded.states.shape == (3, encoder.length, encoder.dim) == (3, 32, 256)
    assert encoded.pooled.shape == (3, encoder.pooled_dim)
    # The caption's state, then the words, however many pieces they have.
    assert encoded.mask.sum(1).tolist() == [6, 1, 7]
    assert (encoded.states[~encoded.mask] == 0).all()
    assert (encoded.states[encoded.mask] != 0).any(1).all()


def test_words_are_rows_of_the_packages_table(encoder) -> None:
    """Words of one piece; experts are trained on these numbers."""
    from safetensors import safe_open
    from tokenizers import Tokenizer

    with safe_open(package_file("wordllama", "weights", "l2_supercat_256.safetensors"), "pt") as file:
        table = file.get_tensor("embedding.weight").float()
    tokenizer = Tokenizer.from_file(str(package_file("wordllama", "tokenizers", "l2_supercat_tokenizer_config.json")))
    rose, red = (table[tokenizer.token_to_id(piece)] for piece in ("▁rose", "▁red"))
    torch.testing.assert_close(words_of(encoder, "red rose"), torch.stack([red, rose]))
    # A word of two pieces is their mean. "Tul", "ip" are fewer than "t", "ul", "ip".
    tulip = (table[tokenizer.token_to_id("▁Tul")] + table[tokenizer.token_to_id("ip")]) / 2
    torch.testing.assert_close(words_of(encoder, "tulip"), tulip[None])
    # The caption is the sum of its words at unit mean square, in its own place and pooled.
    encoded = encoder(["red tulip"])
    torch.testing.assert_close(encoded.pooled[0], F.normalize(red + tulip, dim=0) * 16)
    torch.testing.assert_close(encoded.states[0, 0] - sinusoids(32, 256)[0], encoded.pooled[0])


def test_the_caption_points_where_wordllama_says(encoder) -> None:
    import wordllama

    folder = package_file("wordllama", "__init__.py").parent
    loaded = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
    caption = "a red rose on the old stone wall"  # one piece each
    expected = torch.from_numpy(loaded.embed(caption, norm=True)[0])
    torch.testing.assert_close(F.normalize(encoder([caption]).pooled[0], dim=0), expected, rtol=1e-3, atol=1e-4)


def test_the_package_is_read_and_never_imported(monkeypatch) -> None:
    """Its import changes the logging of the process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "wordllama"]:
        monkeypatch.delitem(sys.modules, name)
    build_encoder({"name": "wordllama"})(CAPTIONS)
    assert "wordllama" not in sys.modules


@pytest.mark.parametrize(
    ("word", "near", "far"), [("kitten", "cat", "highway"), ("woods", "forest", "river"), ("Paris", "france", "dog")]
)
def test_words_of_near_meaning_are_near(encoder, word, near, far) -> None:
    one, close, other = encoder([word, near, far]).pooled
    assert F.cosine_similarity(one, close, dim=0) > F.cosine_similarity(one, other, dim=0) + 0.3


def test_case_and_punctuation_do_not_matter(encoder) -> None:
    states = encoder(["A photo of PARIS.", "a  photo, of paris"]).states
    assert torch.equal(states[0], states[1])


def test_word_order_changes_the_states_and_not_the_pooled_vector(encoder) -> None:
    encoded = encoder(["red on blue", "blue on red"])
    assert not torch.allclose(encoded.states[0, 1:], encoded.states[1, 1:])
    torch.testing.assert_close(encoded.pooled[0], encoded.pooled[1])


def test_the_null_condition_is_the_empty_prompt(encoder) -> None:
    null = encoder.null(2)
    assert torch.equal(null.states, encoder(["", " ."]).states)
    assert null.mask.sum(1).tolist() == [1, 1]
    assert (null.pooled == 0).all()
    assert null.states[:, 0].any()


def test_a_row_does_not_depend_on_its_batch(encoder) -> None:
    tokens = encoder.tokenize(CAPTIONS)
    whole, row = encoder.encode(tokens), encoder.encode(tokens.index(torch.tensor([2])))
    for name in ("states", "mask", "pooled"):
        assert torch.equal(getattr(whole, name)[2:], getattr(row, name))
    empty = encoder([])
    assert empty.states.shape == (0, 32, 256)


def test_long_captions_are_cut_at_whole_words() -> None:
    encoder = build_encoder({"name": "wordllama", "length": 5})
    # Start token, two pieces of tulip, one of red; "sunflower" has three.
    cut = encoder(["tulip red sunflower", "tulip red"])
    assert torch.equal(cut.states[0], cut.states[1])
    assert encoder.truncated_text("Tulip, red sunflower field.") == "sunflower field"
    assert encoder.truncated_text("tulip red") == ""
    # A first word that does not fit is read in part, and named.
    assert encoder(["floccinaucinihilipilification"]).mask.sum() == 2
    assert encoder.truncated_text("floccinaucinihilipilification rose") == "floccinaucinihilipilification rose"


@settings(max_examples=30)
@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_gives_finite_states_and_a_token(encoder, captions) -> None:
    encoded = encoder(captions)
    assert encoded.mask[:, 0].all()
    assert encoded.states.isfinite().all()
    assert encoded.pooled.isfinite().all()
    assert (encoded.states[~encoded.mask] == 0).all()


def test_narrower_states_are_the_first_columns(encoder) -> None:
    narrow = build_encoder({"name": "wordllama", "dim": 64})
    torch.testing.assert_close(words_of(narrow, "red tulip"), words_of(encoder, "red tulip")[:, :64])
    assert (narrow.dim, narrow.pooled_dim) == (64, 64)


def test_a_card_names_the_weights_by_their_hash(encoder) -> None:
    card = json.loads(json.dumps(encoder.config()))
    assert card.keys() == {"name", "dim", "length", "sha256"}
    again = build_encoder(card, STRANGER)
    assert again.config() == card
    assert torch.equal(again(CAPTIONS).states, encoder(CAPTIONS).states)
    with pytest.raises(AtollError, match=r"have sha256 .*, the config expects 00000000"):
        build_encoder({**card, "sha256": "0" * 64}, STRANGER)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("wordllama", r"the package wordllama is needed: pip install 'atoll\[embedded\]'"),
        ("tokenizers", r"the package tokenizers is needed: pip install 'atoll\[embedded\]'"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, missing, message) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(AtollError, match=message):
        build_encoder({"name": "wordllama"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dim": 96}, "dim: Input should be 64, 128, 256, 512 or 1024"),
        ({"dim": 512}, "dim 512, but the package ships 256; lower condition.dim, or set condition.weights"),
        ({"length": 1}, "length"),
        ({"seed": 4}, "seed"),
        ({"weights": "nowhere/at/all"}, "not found"),
    ],
)
def test_bad_configs_are_refused(config, message) -> None:
    with pytest.raises(AtollError, match=message):
        build_encoder({"name": "wordllama", **config})


def save_table(path: Path, dim: int = 512, rows: int = 9, dtype: torch.dtype = torch.float16) -> Path:
    """A table of random vectors, and a tokenizer of as many pieces."""
    from tokenizers import Tokenizer, models, normalizers

    path.mkdir()
    pieces = ["<unk>", "<s>", "</s>", "▁", "r", "e", "d", "▁r", "ed"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "r"), ("e", "d")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend("▁")
    tokenizer.save(str(path / "l2_supercat_tokenizer_config.json"))
    table = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"embedding.weight": table}, path / f"l2_supercat_{dim}.safetensors")
    return path


def test_a_wider_table_of_the_user(tmp_path) -> None:
    encoder = build_encoder({"name": "wordllama", "dim": 512, "weights": str(save_table(tmp_path / "here"))})
    assert encoder(["red"]).states.shape == (1, 32, 512)
    assert len(words_of(encoder, "red dr")) == 2
    # A card of it finds the table in another place, and says what is missing.
    card = encoder.config()
    shutil.move(tmp_path / "here", tmp_path / "there")
    again = build_encoder({**card, "weights": str(tmp_path / "there")})
    assert torch.equal(again(["red"]).states, encoder(["red"]).states)
    with pytest.raises(AtollError, match=r"l2_supercat_1024.safetensors: not found; name a whole copy"):
        build_encoder({"name": "wordllama", "dim": 1024, "weights": str(tmp_path / "there")})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("rows", "has 8 vectors, the tokenizer 9 pieces"),
        ("dtype", "expected finite float16 vectors 512 wide"),
        ("nan", "expected finite float16 vectors 512 wide"),
        ("cut", "is cut off"),
        ("tokenizer", "cannot be read"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, damage, message) -> None:
    rows, dtype = 8 if damage == "rows" else 9, torch.float32 if damage == "dtype" else torch.float16
    path = save_table(tmp_path / "table", rows=rows, dtype=dtype)
    file = path / "l2_supercat_512.safetensors"
    if damage == "nan":
        save_file({"embedding.weight": torch.full((9, 512), float("nan")).half()}, file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "tokenizer":
        (path / "l2_supercat_tokenizer_config.json").write_text("{}")
    with pytest.raises(AtollError, match=message):
        build_encoder({"name": "wordllama", "dim": 512, "weights": str(path)})
