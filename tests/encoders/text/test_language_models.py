"""Conditions from language models against what the diffusers pipelines' own encode_prompt returns."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.encoders.text import PromptEncoder, build_encoder
from atoll.errors import AtollError
from tests.encoders.text import small_models as small

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CAPTIONS = ["Red moss, 3 stones", "", "a red moss é"]
# (its directory, captions) -> states [B,L,D] and mask [B,L]; None where the pipeline's network reads all states.
Theirs = Callable[[Path, list[str]], tuple[Tensor, Tensor | None]]


def load(cls: Any, root: Path) -> Any:
    return cls.from_pretrained(root / "text_encoder").eval()


def theirs_prx(root: Path, captions: list[str]) -> tuple[Tensor, Tensor | None]:
    from diffusers.pipelines.prx.pipeline_prx import PRXPipeline
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    tokenizer = transformers.GemmaTokenizer.from_pretrained(root / "tokenizer", padding_side="right")
    pipeline = PRXPipeline(None, None, load(T5GemmaEncoder, root), tokenizer)
    return pipeline.encode_prompt(captions, torch.device("cpu"), False)[:2]


def theirs_sana(root: Path, captions: list[str]) -> tuple[Tensor, Tensor | None]:
    tokenizer = transformers.GemmaTokenizer.from_pretrained(root / "tokenizer")
    pipeline = diffusers.SanaPipeline(tokenizer, load(transformers.Gemma2Model, root), None, None, None)
    import inspect

    instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
    rows = []
    for caption in captions:
        with_null = {"complex_human_instruction": instruction, "max_sequence_length": 24, "negative_prompt": ""}
        encoded = pipeline.encode_prompt(caption or "anything", True, device=torch.device("cpu"), **with_null)
        rows.append(encoded[:2] if caption else encoded[2:])  # the empty caption is the pipeline's null
    return tuple(torch.cat(part) for part in zip(*rows, strict=True))


def theirs_lumina2(root: Path, captions: list[str]) -> tuple[Tensor, Tensor | None]:
    tokenizer = transformers.GemmaTokenizer.from_pretrained(root / "tokenizer")
    pipeline = diffusers.Lumina2Pipeline(None, None, None, load(transformers.Gemma2Model, root), tokenizer)
    rows = []
    for caption in captions:
        options = {"device": torch.device("cpu"), "max_sequence_length": 24}
        encoded = pipeline.encode_prompt(caption or "anything", True, negative_prompt="", **options)
        rows.append(encoded[:2] if caption else encoded[2:])
    return tuple(torch.cat(part) for part in zip(*rows, strict=True))


def theirs_flux2(root: Path, captions: list[str]) -> tuple[Tensor, Tensor | None]:
    network = load(transformers.Mistral3ForConditionalGeneration, root)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(root / "tokenizer")
    function = diffusers.Flux2Pipeline._get_mistral_3_small_prompt_embeds
    return function(network, tokenizer, captions, max_sequence_length=24), None


def theirs_klein(root: Path, captions: list[str]) -> tuple[Tensor, Tensor | None]:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline

    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(root / "tokenizer")
    network = load(transformers.Qwen3ForCausalLM, root)
    pipeline = Flux2KleinPipeline(None, None, network, tokenizer, None)
    return pipeline.encode_prompt(captions, torch.device("cpu"), max_sequence_length=24)[0], None


def theirs_qwenimage(root: Path, captions: list[str]) -> tuple[Tensor, Tensor | None]:
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(root / "tokenizer")
    network = load(transformers.Qwen2_5_VLForConditionalGeneration, root)
    pipeline = diffusers.QwenImagePipeline(None, None, network, tokenizer, None)
    pipeline.tokenizer_max_length = 24
    return pipeline.encode_prompt(captions, torch.device("cpu"))


CASES: dict[str, tuple[Callable[[Path], None], Theirs]] = {
    "prx": (small.save_t5gemma, theirs_prx),
    "sana": (small.save_gemma2, theirs_sana),
    "lumina2": (small.save_gemma2, theirs_lumina2),
    "flux2": (small.save_mistral3, theirs_flux2),
    "flux2-klein": (small.save_qwen3, theirs_klein),
    "qwenimage": (small.save_qwen_vl, theirs_qwenimage),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One directory per kind of network, with text_encoder/ and tokenizer/."""
    saved: dict[Any, Path] = {}
    for save, _ in CASES.values():
        if save not in saved:
            saved[save] = tmp_path_factory.mktemp(save.__name__)
            save(saved[save])
    return {name: saved[save] for name, (save, _) in CASES.items()}


@pytest.fixture(autouse=True)
def a_package_that_mends_no_text(monkeypatch) -> None:
    """ftfy is not among Atoll's dependencies; diffusers' cleaning calls it."""
    module = pytest.importorskip("diffusers.pipelines.prx.pipeline_prx")
    if not hasattr(module, "ftfy"):
        monkeypatch.setattr(module, "ftfy", types.SimpleNamespace(fix_text=lambda text: text), raising=False)


@pytest.mark.parametrize("name", CASES)
def test_states_are_those_of_the_pipelines(folders, name) -> None:
    encoder = build_encoder({"name": name, "weights": str(folders[name]), "length": 24})
    tokens = encoder.tokenize(CAPTIONS)
    got = encoder.encode(tokens)
    assert tokens.ids.shape == (3, encoder.token_length)
    assert got.states.shape == (3, 24, encoder.dim)
    assert got.pooled is None
    with torch.no_grad():
        states, mask = CASES[name][1](folders[name], list(CAPTIONS))
    if mask is None:
        assert got.mask.all()
        torch.testing.assert_close(got.states, states, rtol=1e-4, atol=1e-4)
        return
    # QwenImage's pipeline pads to the longest caption only.
    width = mask.shape[1]
    assert torch.equal(got.mask[:, :width], mask.bool())
    assert not got.mask[:, width:].any()
    torch.testing.assert_close(got.states[got.mask], states[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_rows_alone_several_encoders_and_a_card_give_the_same(folders, name) -> None:
    """Batches, the ensemble's encoders side by side, and a card on another machine."""
    encoder = build_encoder({"name": name, "weights": str(folders[name]), "length": 24})
    whole = encoder(CAPTIONS)
    rows = torch.tensor([2, 0])
    again = encoder.encode(encoder.tokenize(CAPTIONS).index(rows))
    torch.testing.assert_close(again.states, whole.states[rows], rtol=1e-4, atol=1e-4)
    card = json.loads(json.dumps(encoder.config()))
    assert (card["name"], card["length"], len(card["sha256"])) == (name, 24, 64)
    pair = PromptEncoder([build_encoder({"name": "hash", "dim": 4}), build_encoder(card)])
    torch.testing.assert_close(pair(CAPTIONS)[1].states, whole.states)
    torch.testing.assert_close(encoder.null(2).states[1], encoder([""]).states[0], rtol=1e-4, atol=1e-4)
    assert whole.mask.any(1).all()
    assert encoder.tokenize([]).ids.shape == (0, encoder.token_length)


@pytest.mark.parametrize("name", [*CASES, "gemma", "qwen"])
def test_the_end_of_a_caption_that_is_not_read_is_named(folders, name) -> None:
    """Without the text that the encoder itself puts around captions."""
    folder = {"gemma": "lumina2", "qwen": "flux2-klein"}.get(name, name)
    parts = {"subfolder": "text_encoder", "tokenizer": "tokenizer"}
    around = {"flux2": 200, "lumina2": 200, "qwenimage": 200, "flux2-klein": 60}.get(
        name, 0
    )  # in small tokens, inside the length
    config = {"name": name, "weights": str(folders[folder]), "length": 24 + around, **parts}
    if name == "prx":
        config["clean"] = False
    encoder = build_encoder(config)
    caption = " ".join(chr(97 + number % 26) * 2 for number in range(200))
    rest = encoder.truncated_text(caption)
    assert 0 < len(rest) < len(caption)
    assert caption.endswith(rest)
    assert encoder.truncated_text("red") == encoder.truncated_text("") == ""
    # What is cut off changes nothing; one token more does.
    read = caption[: -len(rest)]
    full = encoder([caption])
    torch.testing.assert_close(encoder([read + "zz z" + rest]).states, full.states)
    assert not torch.allclose(encoder([read[:-4] + "zz" + read[-2:]]).states, full.states)
    short = caption[: encoder.uncut_bytes - 1] if encoder.uncut_bytes > 1 else ""
    assert encoder.truncated_text(short) == ""


def test_plain_language_models_read_the_caption_alone(folders) -> None:
    parts = {"subfolder": "text_encoder", "tokenizer": "tokenizer", "length": 9}
    gemma = build_encoder({"name": "gemma", "weights": str(folders["sana"]), **parts})
    network = load(transformers.Gemma2Model, folders["sana"])
    tokens = gemma.tokenize(["red moss", ""])
    assert tokens.mask.sum(1).tolist() == [4, 1]  # the start token; red, a blank, moss
    with torch.no_grad():
        alone = network(tokens.ids[:1, :4]).last_hidden_state
    torch.testing.assert_close(gemma(["red moss"]).states[:, :4], alone, rtol=1e-4, atol=1e-5)
    # Qwen has no start token: its null condition is one padding token.
    qwen = build_encoder({"name": "qwen", "weights": str(folders["flux2-klein"]), **parts})
    assert qwen.tokenize(["red moss", ""]).mask.sum(1).tolist() == [3, 1]
    assert qwen.null(1).states.isfinite().all()


def test_mistakes_are_named(folders, tmp_path, monkeypatch) -> None:
    small.save_qwen3(tmp_path / "shallow", layers=20)
    with pytest.raises(AtollError, match=r"hidden states of layer 27, the network has 20; get the text encoder of"):
        build_encoder({"name": "flux2-klein", "weights": str(tmp_path / "shallow")})
    with pytest.raises(AtollError, match=r"says 'gemma2'; expected one of t5_gemma_module"):
        build_encoder({"name": "prx", "weights": str(folders["sana"])})
    with pytest.raises(AtollError, match=r"no model\.safetensors; name a directory"):
        build_encoder({"name": "sana", "weights": str(folders["sana"] / "tokenizer"), "subfolder": "", "tokenizer": ""})
    module = sys.modules["diffusers.pipelines.prx.pipeline_prx"]
    monkeypatch.delattr(module, "ftfy")
    with pytest.raises(AtollError, match=r"pip install ftfy, or set clean: false"):
        build_encoder({"name": "prx", "weights": str(folders["prx"])})
    assert build_encoder({"name": "prx", "weights": str(folders["prx"]), "clean": False}).length == 256
