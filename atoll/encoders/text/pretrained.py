"""CLIP's and T5's text encoders, loaded by transformers."""

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
from atoll.encoders.trust import USER, Trust
from atoll.encoders.weights import (
    TOKENIZER,
    PretrainedConfig,
    load_pretrained,
    pretrained_files,
    require_sha256,
    sha256_files,
)
from atoll.errors import AtollError
from atoll.runtime.libraries import quiet
from atoll.storage import bounds
from atoll.storage.memory import refuse_out_of_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TextConfig(PretrainedConfig):
    """tokenizer: the subfolder with its files; None: the network's. precision: the dtype of the computation."""

    tokenizer: str | None = Field(None, pattern=r"^[\w-]*$")
    precision: Literal["fp32", "bf16"] = "fp32"


class CLIPConfig(TextConfig):
    """A CLIP, or its text encoder: openai/clip-vit-large-patch14, or the text_encoder of a Stable Diffusion.

    pooled: "last" is the state of the end token (pooler_output), as in Stable Diffusion and FLUX; "projected" is its
    projection to the space that texts and images share (text_embeds), as in SD3.
    """

    name: Literal["clip"] = "clip"
    length: int | None = Field(None, ge=2, le=bounds.MAX_TOKENS)  # None: as many as the network has positions (77)
    pooled: Literal["last", "projected"] = "last"


class T5Config(TextConfig):
    """The encoder of a T5 or T5 v1.1, such as PixArt's text_encoder: 120 tokens there, 256 in SD3."""

    name: Literal["t5"] = "t5"
    length: int = Field(120, ge=2, le=bounds.MAX_TOKENS)


class PretrainedTextEncoder(TextEncoder):
    """A tokenizer and a network from transformers. The network moves to the device of the tokens.

    Args:
        config: with the place of the weights.
        trust: what they may reach.

    Raises:
        AtollError: weights or a tokenizer that are not found, damaged, of another kind, or not those of the config's
            sha256.
    """

    _classes: Mapping[str, str]  # model_type in config.json -> transformers' class
    _tokenizer_class: str

    def __init__(self, config: TextConfig, trust: Trust = USER):
        # Find the network and its tokenizer, and check their hash.
        folder = config.subfolder if config.tokenizer is None else config.tokenizer
        root = config.find(trust, (config.subfolder, folder))
        directory = root / config.subfolder
        files = {**tokenizer_files(root / folder), **pretrained_files(directory, "model")}
        sha256 = sha256_files(files)
        require_sha256(f"condition encoder {self.name!r}", directory, sha256, config.sha256)

        # Load both; they must fit each other.
        self._tokenizer = load_tokenizer(self._tokenizer_class, root / folder)
        self._network: nn.Module = load_pretrained("transformers", self._classes, directory, DTYPES[config.precision])
        check_vocabulary(self._tokenizer, self._network, root / folder, directory)
        self._config = config.pinned(sha256, root)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        # transformers' tokenizers refuse an empty list.
        if not captions:
            return Tokens(torch.zeros(0, self.length, dtype=torch.int64), torch.zeros(0, self.length, dtype=torch.bool))
        # Every caption has the same length, so that batches stack.
        encoded = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return Tokens(encoded.input_ids, encoded.attention_mask.bool())

    def truncated_text(self, caption: str) -> str:
        ids = self._tokenizer(caption, verbose=False).input_ids
        # The last position is the end token's.
        return self._tokenizer.decode(ids[self.length - 1 : -1]).strip() if len(ids) > self.length else ""

    # Not inference_mode: a network in training reads the states, and autograd saves them.
    @torch.no_grad()
    def encode(self, tokens: Tokens) -> Condition:
        # The network follows the tokens to their device; states are float32 whatever it computes in.
        if next(self._network.parameters()).device != tokens.ids.device:
            self._network.to(tokens.ids.device)
        states, pooled = self._states(tokens)
        return Condition(states.float(), tokens.mask, None if pooled is None else pooled.float())

    def config(self) -> dict[str, Any]:
        return {"name": self.name, **self._config.entry()}

    @abstractmethod
    def _states(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """Return (states [B, L, D], pooled [B, P] or None) as the network computes them."""


class CLIPEncoder(PretrainedTextEncoder):
    """CLIP's text encoder (Radford et al. 2021): the last hidden states, normalised, and the end token's as pooled.

    The mask is True from the start token to the first end token. CLIP pads with the end token, and its attention is
    causal: padding does not change the tokens before it.
    """

    name = "clip"
    _tokenizer_class = "CLIPTokenizer"

    def __init__(self, config: CLIPConfig, trust: Trust = USER):
        # A projected vector needs the class with the projection.
        cls = "CLIPTextModel" if config.pooled == "last" else "CLIPTextModelWithProjection"
        self._classes = {"clip": cls, "clip_text_model": cls}
        super().__init__(config, trust)
        # As many tokens as the network has positions, or fewer.
        network: Any = self._network
        own = network.config
        self.length = own.max_position_embeddings if config.length is None else config.length
        if self.length > own.max_position_embeddings:
            raise AtollError(
                f"condition encoder 'clip': length {self.length}, but the network has {own.max_position_embeddings} "
                "positions; lower condition.length"
            )
        # In OpenAI's files, 2 means "the token with the highest number", which is the end token.
        if own.eos_token_id not in (2, self._tokenizer.eos_token_id):
            raise AtollError(
                f"condition encoder 'clip': the network's end token is {own.eos_token_id}, the tokenizer's "
                f"{self._tokenizer.eos_token_id}; get both from one place"
            )
        self.dim = own.hidden_size
        self.pooled_dim = own.hidden_size if config.pooled == "last" else own.projection_dim
        self._config = self._config.model_copy(update={"length": self.length})

    def _states(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        # No mask: the attention is causal, and padding follows the text.
        output = self._network(input_ids=tokens.ids)
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output  # [B,P]
        return output.last_hidden_state, pooled  # [B,L,D]


class T5Encoder(PretrainedTextEncoder):
    """T5's encoder (Raffel et al. 2020): the last hidden states. An empty caption is its end token alone."""

    name = "t5"
    pooled_dim = None
    _classes: Mapping[str, str] = MappingProxyType({"t5": "T5EncoderModel"})
    _tokenizer_class = "T5Tokenizer"

    def __init__(self, config: T5Config, trust: Trust = USER):
        self.length = config.length
        super().__init__(config, trust)
        network: Any = self._network
        self.dim = network.config.d_model

    def _states(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        # Unlike CLIP's, T5's attention is not causal: it needs the mask.
        output = self._network(input_ids=tokens.ids, attention_mask=tokens.mask)
        return output.last_hidden_state, None  # [B,L,D]


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the files that a tokenizer is loaded from. Raises AtollError if they are missing."""
    # Any of three sets of files will do.
    files = {name: folder / name for name in TOKENIZER if (folder / name).is_file()}
    whole = "tokenizer.json" in files or "spiece.model" in files or {"vocab.json", "merges.txt"} <= files.keys()
    if not whole:
        raise AtollError(
            f"{folder}: no tokenizer; expected tokenizer.json, vocab.json and merges.txt, or spiece.model "
            "(condition.tokenizer names its subfolder)"
        )
    return files


def check_vocabulary(tokenizer: Any, network: Any, folder: Path, directory: Path) -> None:
    """Raise AtollError unless the network in `directory` knows all tokens of the tokenizer in `folder`."""
    vocabulary = network.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise AtollError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the network in {directory} {vocabulary}; get both "
            "from one place"
        )


def load_tokenizer(cls: str, folder: Path) -> Any:
    """Load a tokenizer of transformers from local files."""
    # transformers' warnings concern its own users.
    with quiet("transformers") as transformers:
        try:
            return getattr(transformers, cls).from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # anything: a damaged file, or a missing sentencepiece
            refuse_out_of_memory(error, folder)
            reason = " ".join(str(error).split())[:200]
            raise AtollError(
                f"{folder}: its tokenizer cannot be loaded ({reason}); install what that names "
                "(sentencepiece, protobuf), or get the tokenizer's files from where its network comes from"
            ) from None
