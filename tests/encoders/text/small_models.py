"""Small random language models with tokenizers of a few merges, saved as the folders of a diffusers pipeline."""

from pathlib import Path
from typing import Any

import torch

LETTERS = [chr(number) for number in range(33, 127)]
MERGES = [("r", "e"), ("re", "d"), ("m", "o"), ("mo", "s"), ("mos", "s")]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
# Qwen 3's own template, as far as one message needs it.
QWEN_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
# Mistral Small 3's, likewise.
MISTRAL_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{%- for block in message.content %}"
    "{%- if message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + block.text + '[/SYSTEM_PROMPT]' }}"
    "{%- else %}{{- '[INST]' + block.text + '[/INST]' }}{%- endif %}{%- endfor %}{%- endfor %}"
)


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in network.parameters():  # fresh ones are so small that nothing would be told apart
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def save_gemma_tokenizer(folder: Path, length: int = 24) -> int:
    """Gemma's byte-fallback BPE, which puts a start token first and padding on the left; the vocabulary's size."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [*special, *(f"<0x{number:02X}>" for number in range(256)), "▁", "\n", *LETTERS, *map("".join, MERGES)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = GemmaTokenizer(vocabulary, MERGES, model_max_length=length)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save_pretrained(folder)
    return len(words)


def byte_words() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [*sorted(ByteLevel.alphabet()), *map("".join, MERGES)]


def save_qwen_tokenizer(folder: Path) -> int:
    """Qwen's byte-level BPE with the tokens of its chats; the vocabulary's size."""
    from transformers import AddedToken, Qwen2Tokenizer

    words = ["<|endoftext|>", *byte_words()]
    tokenizer = Qwen2Tokenizer({word: number for number, word in enumerate(words)}, MERGES)
    tokenizer.add_tokens([AddedToken(word, special=True) for word in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken(word) for word in ("<think>", "</think>")])
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_mistral_tokenizer(folder: Path) -> int:
    """Mistral's byte-level BPE, with padding on the left; the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "<pad>", "[IMG]"]
    words = [*special, *byte_words()]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, MERGES))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = MISTRAL_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(words)


def save_gemma2(root: Path) -> None:
    import transformers

    vocabulary = save_gemma_tokenizer(root / "tokenizer")
    config = transformers.Gemma2Config(vocab_size=vocabulary, query_pre_attn_scalar=8, sliding_window=8, **SIZES)
    randomised(transformers.Gemma2Model(config)).save_pretrained(root / "text_encoder")


def save_t5gemma(root: Path) -> None:
    from transformers import T5GemmaModuleConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    vocabulary = save_gemma_tokenizer(root / "tokenizer")
    config = T5GemmaModuleConfig(
        vocab_size=vocabulary, query_pre_attn_scalar=8, sliding_window=8, dropout_rate=0.0, **SIZES
    )
    randomised(T5GemmaEncoder(config)).save_pretrained(root / "text_encoder")


def save_qwen3(root: Path, layers: int = 28) -> None:
    import transformers

    vocabulary = save_qwen_tokenizer(root / "tokenizer")
    config = transformers.Qwen3Config(vocab_size=vocabulary, **SIZES | {"num_hidden_layers": layers})
    randomised(transformers.Qwen3ForCausalLM(config)).save_pretrained(root / "text_encoder")


def save_qwen_vl(root: Path) -> None:
    import transformers

    vocabulary = save_qwen_tokenizer(root / "tokenizer")
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = SIZES | {"vocab_size": vocabulary, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    randomised(transformers.Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(root / "text_encoder")


def save_mistral3(root: Path) -> None:
    import transformers

    vocabulary = save_mistral_tokenizer(root / "tokenizer")
    text = {"model_type": "mistral", "vocab_size": vocabulary, **SIZES, "num_hidden_layers": 31}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision)
    randomised(transformers.Mistral3ForConditionalGeneration(config)).save_pretrained(root / "text_encoder")
