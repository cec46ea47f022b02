"""Conditions, and the frozen text encoders: hash, wordllama, label, clip, t5, language models, SD3's and FLUX's."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from atoll.condition import Condition, Tokens
from atoll.encoders.text.encoder import TextEncoder
from atoll.encoders.text.hashed import HashConfig, HashEncoder
from atoll.encoders.text.joint import FluxEncoder, JointConfig, SD3Encoder
from atoll.encoders.text.label import LabelConfig, LabelEncoder, read_labels
from atoll.encoders.text.language_model import (
    LanguageModelEncoder,
    PipelineLanguageModelConfig,
    PlainLanguageModelConfig,
)
from atoll.encoders.text.pretrained import CLIPConfig, CLIPEncoder, T5Config, T5Encoder
from atoll.encoders.text.prompt_encoder import PromptEncoder
from atoll.encoders.text.wordllama import WordLlamaConfig, WordLlamaEncoder
from atoll.encoders.trust import USER, Trust
from atoll.encoders.weights import parse_config
from atoll.errors import AtollError
from atoll.storage.bounds import LABELS_IN_CARDS

__all__ = [
    "CLIPEncoder",
    "Condition",
    "FluxEncoder",
    "HashEncoder",
    "LabelEncoder",
    "LanguageModelEncoder",
    "PromptEncoder",
    "SD3Encoder",
    "T5Encoder",
    "TextEncoder",
    "Tokens",
    "WordLlamaEncoder",
    "build_encoder",
]

_CONFIGS: dict[str, type[BaseModel]] = {
    "hash": HashConfig,
    "wordllama": WordLlamaConfig,
    "label": LabelConfig,
    "clip": CLIPConfig,
    "t5": T5Config,
    **dict.fromkeys(("gemma", "qwen"), PlainLanguageModelConfig),
    **dict.fromkeys(("prx", "sana", "lumina2", "flux2", "flux2-klein", "qwenimage"), PipelineLanguageModelConfig),
    **dict.fromkeys(("sd3", "flux"), JointConfig),
}


def build_encoder(config: Mapping[str, Any], trust: Trust = USER) -> TextEncoder:
    """Create the encoder that a manifest's or a card's config describes.

    Args:
        config: its name and options.
        trust: what its weights may reach; `STRANGER` for a card's config.

    Raises:
        AtollError: an unknown name, key or value; weights that are not found, damaged, or not those of the config's
            sha256; a missing package.
    """
    # The class of the validated config decides the encoder.
    match parse_config("condition encoder", _CONFIGS, config):
        case LabelConfig() as checked:
            if isinstance(checked.labels, str) and not trust.own:
                raise AtollError(f"condition encoder 'label': {LABELS_IN_CARDS}")
            return LabelEncoder(read_labels(checked.labels))
        case CLIPConfig() as checked:
            return CLIPEncoder(checked, trust)
        case T5Config() as checked:
            return T5Encoder(checked, trust)
        case PlainLanguageModelConfig() | PipelineLanguageModelConfig() as checked:
            return LanguageModelEncoder(checked, trust)
        case JointConfig() as checked:
            return SD3Encoder(checked, trust) if checked.name == "sd3" else FluxEncoder(checked, trust)
        case WordLlamaConfig() as checked:
            return WordLlamaEncoder(checked, trust)
        case HashConfig() as checked:
            return HashEncoder(checked.dim, checked.length, checked.seed)
    # Every config above has a case, so only a mistake in the code leads here.
    raise AssertionError("a config without its encoder")
