"""What the tests of the diffusers pipeline share: prompts, latents, and an expert with frozen networks of its own."""

import json
from pathlib import Path

import torch

from atoll.diffusers import AtollPipeline
from atoll.nn import build_network
from atoll.runtime.libraries import quiet
from atoll.storage.artifact import save_artifact
from atoll.storage.cards import ExpertCard

with quiet("diffusers"):
    import diffusers

PROMPTS = ["moss sand", "rain", "rust rust", "sand", "moss"]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def latents(pipe: AtollPipeline, **options) -> torch.Tensor:
    """[5, 1, 4, 8], each image from a generator of its own."""
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": PROMPTS,
        "generator": generators(5),
        "num_inference_steps": 6,
        "guidance_scale": 2.0,
        **options,
    }
    return pipe(**arguments, output_type="latent").images


def write_pretrained(path: Path) -> Path:
    """vae/, text_encoder/ and tokenizer/ in the layout of a Stable Diffusion, tiny."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "tokenizer").mkdir(parents=True)
    (path / "tokenizer" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "vocab_size": len(words)}
    config = transformers.CLIPTextConfig(**sizes, **tokens, max_position_embeddings=11)
    transformers.CLIPTextModel(config).save_pretrained(path / "text_encoder")
    channels = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    counts = {f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")}
    diffusers.AutoencoderTiny(**channels, **counts).save_pretrained(path / "vae")
    return path


def write_expert(path: Path, frozen: Path) -> Path:
    """An expert of random weights that reads CLIP's states and draws TAESD's latents."""
    sizes = {"size": [4, 6], "channels": 4, "patch": 2, "width": 16, "depth": 1, "heads": 2, "states_dim": 16}
    card = {
        "name": "moss",
        "network": {"name": "dit", **sizes},
        "objective": {"prediction": "flow", "schedule": "linear", "time_scale": 999.0},
        "clusters": [0],
        "k": 1,
        "codec": {"name": "tiny", "weights": str(frozen), "subfolder": "vae"},
        "condition": {"name": "clip", "weights": str(frozen), "subfolder": "text_encoder", "tokenizer": "tokenizer"},
        "latent_shape": [4, 4, 6],
    }
    state = build_network(card["network"]).state_dict()
    save_artifact(path, ExpertCard(**card), {f"network.{k}": 0.1 * torch.randn(v.shape) for k, v in state.items()})
    return path
