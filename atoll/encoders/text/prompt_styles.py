"""What surrounds a caption, and which states of a language model are its condition: one row per diffusers pipeline.

The texts are those that the pipelines of diffusers 0.42 put around a prompt. A tokenizer's own chat template is never
executed: FLUX.2's are written out here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SANA_INSTRUCTION = "\n".join(
    [
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
        "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
        "skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    ]
)
LUMINA2_INSTRUCTION = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)
FLUX2_INSTRUCTION = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
QWENIMAGE_INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)


@dataclass(frozen=True)
class PromptStyle:
    """How the language model of one pipeline reads a caption.

    Attributes:
        classes: model_type in config.json -> the class of transformers.
        tokenizer: the class of its tokenizer.
        length: L, the default number of states per caption.
        before, after: the text around the caption.
        null: whether they surround the empty caption, the null condition, too.
        layers: the hidden states that are concatenated; none: the last ones, normalised.
        skip: tokens at the start whose states are dropped; L counts those behind them.
        instruction: `before` does not count either: of its tokens only the first is kept.
        masked: whether the pipeline's network masks padding. If not, padding is read, and the mask is True everywhere.
        right: padding is put on the right; otherwise where the tokenizer puts it.
        special: whether the tokenizer adds its start token.
        lower: captions are put into lower case.
        cleaned: captions are cleaned as in diffusers' PRXPipeline.
        removed: a text that is removed from captions.
    """

    classes: Mapping[str, str]
    tokenizer: str
    length: int
    before: str = ""
    after: str = ""
    null: bool = False
    layers: tuple[int, ...] = ()
    skip: int = 0
    instruction: bool = False
    masked: bool = True
    right: bool = True
    special: bool = True
    lower: bool = False
    cleaned: bool = False
    removed: str = ""


_GEMMA = {"gemma2": "Gemma2Model"}
_T5GEMMA = {"t5_gemma_module": "models.t5gemma.modeling_t5gemma.T5GemmaEncoder"}
_QWEN = {"qwen3": "Qwen3Model"}
STYLES: dict[str, PromptStyle] = {
    # The caption alone, for networks that are trained here.
    "gemma": PromptStyle(_GEMMA | _T5GEMMA, "GemmaTokenizer", 256),
    "qwen": PromptStyle(_QWEN, "Qwen2Tokenizer", 256),
    # As the pipelines of diffusers encode it.
    "prx": PromptStyle(_T5GEMMA, "GemmaTokenizer", 256, cleaned=True),
    "sana": PromptStyle(_GEMMA, "GemmaTokenizer", 300, before=SANA_INSTRUCTION, instruction=True, lower=True),
    "lumina2": PromptStyle(_GEMMA, "GemmaTokenizer", 256, before=LUMINA2_INSTRUCTION, layers=(-2,)),
    "flux2": PromptStyle(
        {"mistral3": "Mistral3Model"},
        "PreTrainedTokenizerFast",
        512,
        before=f"<s>[SYSTEM_PROMPT]{FLUX2_INSTRUCTION}[/SYSTEM_PROMPT][INST]",
        after="[/INST]",
        null=True,
        layers=(10, 20, 30),
        masked=False,
        right=False,
        special=False,
        removed="[IMG]",
    ),
    "flux2-klein": PromptStyle(
        _QWEN,
        "Qwen2Tokenizer",
        512,
        before="<|im_start|>user\n",
        after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        null=True,
        layers=(9, 18, 27),
        masked=False,
        right=False,
    ),
    "qwenimage": PromptStyle(
        {"qwen2_5_vl": "Qwen2_5_VLModel"},
        "Qwen2Tokenizer",
        1024,
        before=f"<|im_start|>system\n{QWENIMAGE_INSTRUCTION}<|im_end|>\n<|im_start|>user\n",
        after="<|im_end|>\n<|im_start|>assistant\n",
        null=True,
        skip=34,  # the tokens of `before`, by Qwen's own tokenizer
    ),
}
