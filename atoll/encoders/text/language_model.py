"""Conditions from language models: Gemma 2, T5Gemma, Qwen and Mistral, loaded by transformers."""

import importlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from atoll.condition import Condition, Tokens
from atoll.encoders.text.pretrained import PretrainedTextEncoder, TextConfig
from atoll.encoders.text.prompt_styles import STYLES
from atoll.encoders.trust import USER, Trust
from atoll.errors import AtollError
from atoll.runtime.libraries import quiet
from atoll.storage import bounds

_Plain = Literal["gemma", "qwen"]
_Pipeline = Literal["prx", "sana", "lumina2", "flux2", "flux2-klein", "qwenimage"]


class PlainLanguageModelConfig(TextConfig):
    """A language model that reads the caption alone: Gemma 2 or T5Gemma ("gemma"), Qwen 3 ("qwen")."""

    name: _Plain
    length: int | None = Field(None, ge=2, le=bounds.MAX_TOKENS)  # None: 256


class PipelineLanguageModelConfig(TextConfig):
    """The language model of a diffusers pipeline; `weights` is the pipeline's directory or repository.

    Its texts and hidden states are those of `prompt_styles`. clean: for "prx" only; false leaves captions as they are.
    """

    name: _Pipeline
    subfolder: str = Field("text_encoder", pattern=r"^[\w-]*$")
    tokenizer: str | None = Field("tokenizer", pattern=r"^[\w-]*$")
    length: int | None = Field(None, ge=2, le=bounds.MAX_TOKENS)  # None: the pipeline's own
    clean: bool = True


class LanguageModelEncoder(PretrainedTextEncoder):
    """Hidden states of a language model over a caption and the text around it, see `prompt_styles`.

    The empty caption is the null condition. As in the pipelines, Sana's and Lumina2's has no instruction, and those of
    chat models have their template. A negative prompt that is not empty is a caption like any other here; the pipelines
    of Sana and Lumina2 encode it without the instruction.
    """

    pooled_dim = None

    def __init__(self, config: PlainLanguageModelConfig | PipelineLanguageModelConfig, trust: Trust = USER):
        self.name, self._style = config.name, STYLES[config.name]
        self._classes, self._tokenizer_class = self._style.classes, self._style.tokenizer
        self.length = config.length or self._style.length
        self.zero_padding = bool(self._style.skip)
        self._cleaner = _cleaner() if self._style.cleaned and getattr(config, "clean", True) else None
        super().__init__(config, trust)
        if self._style.right:
            self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token_id is None:
            raise AtollError(f"condition encoder {self.name!r}: its tokenizer has no padding token; get a whole copy")
        # Hidden states: their number and width.
        network: Any = self._network
        depth = getattr(network.config, "num_hidden_layers", None) or network.config.text_config.num_hidden_layers
        if self._style.layers and max(self._style.layers) > depth:
            raise AtollError(
                f"condition encoder {self.name!r}: reads the hidden states of layer {max(self._style.layers)}, the "
                f"network has {depth}; get the text encoder of this pipeline"
            )
        self.dim = network.get_input_embeddings().embedding_dim * max(1, len(self._style.layers))
        self._around = len(self._ids(self._style.before + self._style.after, verbose=False).input_ids)
        if self._style.skip and self._around <= self._style.skip:
            raise AtollError(
                f"condition encoder {self.name!r}: its tokenizer makes {self._around} tokens of the text around a "
                f"caption; expected more than {self._style.skip}: get the tokenizer of this pipeline"
            )
        self._instruction = (
            len(self._ids(self._style.before, verbose=False).input_ids) if self._style.instruction else 0
        )
        self._config = self._config.model_copy(update={"length": self.length})

    @property
    def token_length(self) -> int:
        # Sana counts the start token, and two tokens of its instruction, twice.
        return self.length + self._style.skip + (self._instruction - 2 if self._style.instruction else 0)

    @property
    def uncut_bytes(self) -> int:
        return self.token_length - self._around - 1

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        if not captions:
            empty = torch.zeros(0, self.token_length, dtype=torch.int64)
            return Tokens(empty, empty.bool())
        # All rows have one length, so that batches stack.
        texts = ["".join(self._parts(caption)) for caption in captions]
        limits = {"padding": "max_length", "truncation": True, "max_length": self.token_length}
        encoded = self._ids(texts, return_tensors="pt", **limits)
        mask = encoded.attention_mask.bool()
        # Attention needs a token; without a start token the empty caption has none.
        mask[:, 0] |= ~mask.any(1)
        return Tokens(encoded.input_ids, mask)

    def truncated_text(self, caption: str) -> str:
        before, text, after = self._parts(caption)
        encoded = self._ids(before + text + after, return_offsets_mapping=True, verbose=False)
        if len(encoded.input_ids) <= self.token_length:
            return ""
        # The first character that is not read; the text around the caption is not the user's.
        start = max(encoded.offset_mapping[self.token_length][0] - len(before), 0)
        return text[start:].strip()

    @torch.no_grad()
    def encode(self, tokens: Tokens) -> Condition:
        condition = super().encode(tokens)
        states, mask, style = condition.states, condition.mask, self._style
        if style.instruction:
            last = slice(states.shape[1] - self.length + 1, None)
            states = torch.cat([states[:, :1], states[:, last]], 1)  # [B,L,D]
            mask = torch.cat([mask[:, :1], mask[:, last]], 1)  # [B,L]
        elif style.skip:
            states, mask = states[:, style.skip :], mask[:, style.skip :]
            states = states * mask[..., None]
        return Condition(states, mask if style.masked else torch.ones_like(mask))

    def _states(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        layers = self._style.layers
        output = self._network(
            input_ids=tokens.ids, attention_mask=tokens.mask.long(), output_hidden_states=bool(layers), use_cache=False
        )
        if not layers:
            return output.last_hidden_state, None  # [B,L,D]
        return torch.cat([output.hidden_states[layer] for layer in layers], -1), None  # [B,L,n D]

    def _parts(self, caption: str) -> tuple[str, str, str]:
        """Return what is before the caption, the caption as it is read, and what is after it."""
        style = self._style
        text = caption.replace(style.removed, "") if style.removed else caption
        text = text.lower().strip() if style.lower else text
        text = self._cleaner.clean_text(text) if self._cleaner is not None else text
        return (style.before, text, style.after) if text or style.null else ("", "", "")

    def _ids(self, text: str | list[str], **options: Any) -> Any:
        """Tokenize a text; Mistral's template writes the start token itself."""
        return self._tokenizer(text, add_special_tokens=self._style.special, **options)


def _cleaner() -> Any:
    """Return the text preprocessor of diffusers' PRXPipeline."""
    with quiet("diffusers"), quiet("transformers"):
        module = importlib.import_module("diffusers.pipelines.prx.pipeline_prx")
    # It uses this package without importing it.
    if not hasattr(module, "ftfy"):
        raise AtollError(
            "condition encoder 'prx': captions are cleaned with the package ftfy: pip install ftfy, or set clean: "
            "false to encode them as they are"
        )
    return module.TextPreprocessor()
