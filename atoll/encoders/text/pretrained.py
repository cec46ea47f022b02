"""CLIP's and T5's text encoders, as transformers loads them."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from atoll.condition import Condition, Tokens
from atoll.encoders.text.encoder import TextEncoder
from atoll.encoders.weights import (
    TOKENIZER,
    PretrainedConfig,
    find_weights,
    load_pretrained,
    pretrained_files,
    require_sha256,
    sha256_files,
)
from atoll.errors import AtollError
from atoll.runtime.libraries import quiet

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TextConfig(PretrainedConfig):
    """tokenizer: the subfolder with its files; None: that of the network. precision: what the network computes in."""

    tokenizer: str | None = Field(None, pattern=r"^[\w-]*$")
    precision: Literal["fp32", "bf16"] = "fp32"


class CLIPConfig(TextConfig):
    """A CLIP, or its text half: openai/clip-vit-large-patch14, or the text_encoder of a Stable Diffusion.

    pooled: "last" is the state of the end token, as Stable Diffusion's and FLUX's (pooler_output); "projected" is that
    in the space that texts and images share, as SD3's (text_embeds).
    """

    name: Literal["clip"] = "clip"
    length: int | None = Field(None, ge=2)  # None: all that the network has positions for (77)
    pooled: Literal["last", "projected"] = "last"


class T5Config(TextConfig):
    """An encoder of T5 or T5 v1.1, such as PixArt's text_encoder: 120 tokens there, 256 in SD3."""

    name: Literal["t5"] = "t5"
    length: int = Field(120, ge=2)


class _PretrainedTextEncoder(TextEncoder):
    """A tokenizer and a network of transformers. The network follows the tokens to their device."""

    _classes: Mapping[str, str]  # what config.json calls itself -> transformers' class
    _tokenizer_class: str

    def __init__(self, config: CLIPConfig | T5Config):
        """Raises AtollError: weights or tokenizer that are not found, damaged, of another kind, or not the config's."""
        folder = config.subfolder if config.tokenizer is None else config.tokenizer
        root = find_weights(config.weights, (config.subfolder, folder))
        directory = root / config.subfolder
        files = {**_tokenizer_files(root / folder), **pretrained_files(directory, "model")}
        found = sha256_files(files)
        require_sha256(f"condition encoder {self.name!r}", directory, found, config.sha256)
        self._tokenizer = _load_tokenizer(self._tokenizer_class, root / folder)
        self._network: nn.Module = load_pretrained("transformers", self._classes, directory, _DTYPES[config.precision])
        vocabulary = self._network.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if len(self._tokenizer) > vocabulary:
            raise AtollError(
                f"{root / folder}: the tokenizer has {len(self._tokenizer)} tokens, the network in {directory} "
                f"{vocabulary}; they do not belong together"
            )
        self._config = config.model_copy(update={"sha256": found})

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        if not captions:
            return Tokens(torch.zeros(0, self.length, dtype=torch.int64), torch.zeros(0, self.length, dtype=torch.bool))
        encoded = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return Tokens(encoded.input_ids, encoded.attention_mask.bool())

    def truncated_text(self, caption: str) -> str:
        ids = self._tokenizer(caption, verbose=False).input_ids
        # Of what is kept, the last place is the end token's.
        return self._tokenizer.decode(ids[self.length - 1 : -1]).strip() if len(ids) > self.length else ""

    # Not inference_mode: a trained network reads the states, and autograd keeps them.
    @torch.no_grad()
    def encode(self, tokens: Tokens) -> Condition:
        if next(self._network.parameters()).device != tokens.ids.device:
            self._network.to(tokens.ids.device)
        states, pooled = self._states(tokens)
        return Condition(states.float(), tokens.mask, None if pooled is None else pooled.float())

    def config(self) -> dict[str, Any]:
        return {"name": self.name, **self._config.model_dump(exclude={"name"})}

    @abstractmethod
    def _states(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """(states [B,L,D], pooled [B,P] or None) as the network gives them."""


class CLIPEncoder(_PretrainedTextEncoder):
    """CLIP's text encoder (Radford et al. 2021): the last hidden states, normalised, and the end token's as pooled.

    The mask is True from the start token to the first end token. CLIP pads with the end token, and its attention is
    causal: what stands behind does not change what stands before.
    """

    name = "clip"
    _tokenizer_class = "CLIPTokenizer"

    def __init__(self, config: CLIPConfig):
        cls = "CLIPTextModel" if config.pooled == "last" else "CLIPTextModelWithProjection"
        self._classes = {"clip": cls, "clip_text_model": cls}
        super().__init__(config)
        network: Any = self._network
        own = network.config
        self.length = own.max_position_embeddings if config.length is None else config.length
        if self.length > own.max_position_embeddings:
            raise AtollError(
                f"condition encoder 'clip': length {self.length}, but the network has {own.max_position_embeddings} "
                "positions; lower condition.length"
            )
        # 2 stands in OpenAI's files for "the token of the highest number", which is the end token.
        if own.eos_token_id not in (2, self._tokenizer.eos_token_id):
            raise AtollError(
                f"condition encoder 'clip': the network's end token is {own.eos_token_id}, the tokenizer's "
                f"{self._tokenizer.eos_token_id}; they do not belong together"
            )
        self.dim = own.hidden_size
        self.pooled_dim = own.hidden_size if config.pooled == "last" else own.projection_dim
        self._config = self._config.model_copy(update={"length": self.length})

    def _states(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        output = self._network(input_ids=tokens.ids)
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output  # [B,P]
        return output.last_hidden_state, pooled  # [B,L,D]


class T5Encoder(_PretrainedTextEncoder):
    """T5's encoder (Raffel et al. 2020): the last hidden states. An empty caption is its end token alone."""

    name = "t5"
    pooled_dim = None
    _classes: Mapping[str, str] = MappingProxyType({"t5": "T5EncoderModel"})
    _tokenizer_class = "T5Tokenizer"

    def __init__(self, config: T5Config):
        self.length = config.length
        super().__init__(config)
        network: Any = self._network
        self.dim = network.config.d_model

    def _states(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        output = self._network(input_ids=tokens.ids, attention_mask=tokens.mask)
        return output.last_hidden_state, None  # [B,L,D]


def _tokenizer_files(folder: Path) -> dict[str, Path]:
    """What a tokenizer is read from. Raises AtollError where nothing is."""
    files = {name: folder / name for name in TOKENIZER if (folder / name).is_file()}
    whole = "tokenizer.json" in files or "spiece.model" in files or {"vocab.json", "merges.txt"} <= files.keys()
    if not whole:
        raise AtollError(
            f"{folder}: no tokenizer; expected tokenizer.json, vocab.json and merges.txt, or spiece.model "
            "(condition.tokenizer names its subfolder)"
        )
    return files


def _load_tokenizer(cls: str, folder: Path) -> Any:
    with quiet("transformers") as transformers:
        try:
            return getattr(transformers, cls).from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # whatever a damaged file, or a missing sentencepiece, makes the library raise
            reason = " ".join(str(error).split())[:200]
            raise AtollError(
                f"{folder}: its tokenizer cannot be loaded ({reason}); install what that names "
                "(sentencepiece, protobuf), or get the tokenizer's files from where its network comes from"
            ) from None
