"""The text encoders of SD3 and FLUX, several networks that read one caption, as one condition."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from atoll.condition import Condition, Tokens
from atoll.encoders.text.encoder import TextEncoder
from atoll.encoders.text.pretrained import DTYPES, check_vocabulary, load_tokenizer, tokenizer_files
from atoll.encoders.trust import USER, Trust
from atoll.encoders.weights import WeightsConfig, load_pretrained, pretrained_files, require_sha256, sha256_files
from atoll.errors import AtollError
from atoll.storage import bounds

# The networks of each, by their folder: their class, and the folder and the class of their tokenizer.
_CLIP = ("tokenizer", "CLIPTokenizer")
NETWORKS: dict[str, dict[str, tuple[str, str, str]]] = {
    "sd3": {
        "text_encoder": ("CLIPTextModelWithProjection", *_CLIP),
        "text_encoder_2": ("CLIPTextModelWithProjection", "tokenizer_2", "CLIPTokenizer"),
        "text_encoder_3": ("T5EncoderModel", "tokenizer_3", "T5Tokenizer"),
    },
    "flux": {
        "text_encoder": ("CLIPTextModel", *_CLIP),
        "text_encoder_2": ("T5EncoderModel", "tokenizer_2", "T5Tokenizer"),
    },
}
_TYPES = {"CLIP": ("clip", "clip_text_model"), "T5": ("t5",)}  # model_type in config.json, by the class's first letters


def folders_of(config: Mapping[str, Any]) -> dict[str, bool]:
    """Return the folders in the `weights` of a frozen network's config, each with whether it holds a network.

    Args:
        config: of any codec or text encoder, as in cards.
    """
    if (parts := NETWORKS.get(str(config.get("name")))) is not None:
        return dict.fromkeys(parts, True) | {tokenizer: False for _, tokenizer, _ in parts.values()}
    subfolder = str(config.get("subfolder", ""))
    tokenizer = subfolder if config.get("tokenizer") is None else config["tokenizer"]
    return {tokenizer: False} | {subfolder: True}


class JointConfig(WeightsConfig):
    """The text encoders of a whole SD3 or FLUX pipeline; `weights` is its directory or repository.

    length: T5's tokens; None: as in the pipeline, 256 for SD3 and 512 for FLUX. CLIP reads 77.
    """

    name: Literal["sd3", "flux"]
    length: int | None = Field(None, ge=2, le=bounds.MAX_TOKENS)
    precision: Literal["fp32", "bf16"] = "fp32"


class _JointEncoder(TextEncoder):
    """Networks that read one caption. No mask is given to them, as in the pipelines: padding is part of the text.

    Raises:
        AtollError: weights or tokenizers that are not found, damaged, of another kind, or not those of the sha256.
    """

    _default_length: ClassVar[int]

    def __init__(self, config: JointConfig, trust: Trust = USER):
        self.name, parts = config.name, NETWORKS[config.name]
        # Find all networks and tokenizers, and check their hash.
        folders = [folder for network, (_, tokenizer, _) in parts.items() for folder in (network, tokenizer)]
        root = config.find(trust, folders)
        files: dict[str, Path] = {}
        for network, (_, tokenizer, _) in parts.items():
            for folder, found in (
                (network, pretrained_files(root / network, "model")),
                (tokenizer, tokenizer_files(root / tokenizer)),
            ):
                files |= {f"{folder}/{name}": file for name, file in found.items()}
        sha256 = sha256_files(files)
        require_sha256(f"condition encoder {self.name!r}", root, sha256, config.sha256)
        # Load them.
        self._networks: list[Any] = []
        self._tokenizers: list[Any] = []
        for network, (cls, tokenizer, tokenizer_class) in parts.items():
            types = next(types for start, types in _TYPES.items() if cls.startswith(start))
            loaded = load_pretrained(
                "transformers", dict.fromkeys(types, cls), root / network, DTYPES[config.precision]
            )
            self._networks.append(loaded)
            self._tokenizers.append(load_tokenizer(tokenizer_class, root / tokenizer))
            check_vocabulary(self._tokenizers[-1], loaded, root / tokenizer, root / network)
        # Tokens per network: as many as CLIP has positions, and T5's length.
        self._t5_length = config.length or self._default_length
        self._lengths = [
            getattr(network.config, "max_position_embeddings", self._t5_length) for network in self._networks
        ]
        self._config = config.pinned(sha256, root, length=self._t5_length)

    @property
    def token_length(self) -> int:
        return sum(self._lengths)

    @property
    def uncut_bytes(self) -> int:
        return self._t5_length - 1

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        if not captions:
            empty = torch.zeros(0, self.token_length, dtype=torch.int64)
            return Tokens(empty, empty.bool())
        # Side by side, each tokenizer's of one length.
        parts = [
            tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            for tokenizer, length in zip(self._tokenizers, self._lengths, strict=True)
        ]
        return Tokens(
            torch.cat([part.input_ids for part in parts], 1),
            torch.cat([part.attention_mask for part in parts], 1).bool(),
        )

    def truncated_text(self, caption: str) -> str:
        # T5 reads most: what it does not read, no network reads.
        ids = self._tokenizers[-1](caption, verbose=False).input_ids
        length = self._t5_length
        return self._tokenizers[-1].decode(ids[length - 1 : -1]).strip() if len(ids) > length else ""

    @torch.no_grad()
    def encode(self, tokens: Tokens) -> Condition:
        for network in self._networks:
            if next(network.parameters()).device != tokens.ids.device:
                network.to(tokens.ids.device)
        states, pooled = self._encode(*tokens.ids.split(self._lengths, 1))
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return Condition(states.float(), mask, pooled.float())

    def config(self) -> dict[str, Any]:
        return {"name": self.name, **self._config.entry()}

    @abstractmethod
    def _encode(self, *ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return states [B,L,D] and the pooled vector [B,P] from each network's token numbers."""


class SD3Encoder(_JointEncoder):
    """SD3's three text encoders (Esser et al. 2024): two CLIPs and a T5.

    states = the CLIPs' penultimate states side by side, padded with zeros to T5's width, then T5's last ones: 77 + 256
    rows of 4096. pooled = the CLIPs' projected vectors side by side: 2048.
    """

    _default_length = 256

    def __init__(self, config: JointConfig, trust: Trust = USER):
        super().__init__(config, trust)
        one, two, t5 = (network.config for network in self._networks)
        self.dim, self.pooled_dim = t5.d_model, one.projection_dim + two.projection_dim
        if one.hidden_size + two.hidden_size > self.dim or self._lengths[0] != self._lengths[1]:
            raise AtollError(
                f"condition encoder 'sd3': CLIPs of {one.hidden_size} and {two.hidden_size} in {self._lengths[0]} and "
                f"{self._lengths[1]} positions, T5 {self.dim} wide; get all three from one pipeline"
            )
        self.length = self._lengths[0] + self._t5_length

    def _encode(self, *ids: Tensor) -> tuple[Tensor, Tensor]:
        clips = [
            network(input_ids=part, output_hidden_states=True)
            for network, part in zip(self._networks[:2], ids[:2], strict=True)
        ]
        t5 = self._networks[2](input_ids=ids[2]).last_hidden_state  # [B,256,D]
        clip = torch.cat([output.hidden_states[-2] for output in clips], 2)  # [B,77,768+1280]
        states = torch.cat([F.pad(clip, (0, self.dim - clip.shape[2])), t5], 1)  # [B,77+256,D]
        return states, torch.cat([output.text_embeds for output in clips], 1)  # [B,768+1280]


class FluxEncoder(_JointEncoder):
    """FLUX's two text encoders: states = T5's last ones, pooled = the state of CLIP's end token."""

    _default_length = 512

    def __init__(self, config: JointConfig, trust: Trust = USER):
        super().__init__(config, trust)
        clip, t5 = (network.config for network in self._networks)
        self.dim, self.pooled_dim, self.length = t5.d_model, clip.hidden_size, self._t5_length

    def _encode(self, *ids: Tensor) -> tuple[Tensor, Tensor]:
        clip, t5 = self._networks
        return t5(input_ids=ids[1]).last_hidden_state, clip(input_ids=ids[0]).pooler_output
