"""Atoll's networks and diffusers' of the same shape, called alike: what step.py and gpu_training.py compare.

    dit     DiT                    PixArtTransformer2DModel
    mmdit   MMDiT                  PRXTransformer2DModel, whose text is read-only too
    dual    MMDiT of dual blocks   SD3Transformer2DModel with RMS norm of queries and keys

The pairs have equal width, depth, heads, tokens and FLOPs of their blocks. In the last one, Atoll's gated MLP has the
FLOPs of SD3's with ratio 4, and all blocks but the last update the text, as in SD3.
"""

from typing import Any

from torch import Tensor, nn

from atoll.choices import MLP_RATIOS, hidden_width
from atoll.condition import Condition
from atoll.nn import MMDIT_SIZES, SIZES, DiT, DiTConfig, MMDiT, MMDiTConfig

SIZE, CHANNELS, TEXT_TOKENS, TEXT_WIDTH = 32, 4, 77, 768  # a 256x256 image in SD's latents, CLIP-L's text
NETWORKS = ("dit", "mmdit", "dual")
DUAL_RATIO = 8 / 3  # three matrices D x F at 8/3 cost what two cost at 4


def config_of(network: str, size: str) -> DiTConfig | MMDiTConfig:
    """The configuration of Atoll's network of this name and size."""
    shape: dict[str, Any] = {"size": (SIZE, SIZE), "channels": CHANNELS, "states_dim": TEXT_WIDTH}
    if network == "dit":
        return DiTConfig.model_validate(shape | dict(SIZES[size]))
    sizes = dict(MMDIT_SIZES[size])
    if network == "dual":
        sizes |= {"mlp_ratio": DUAL_RATIO, "dual_blocks": MMDIT_SIZES[size]["depth"] - 1, "pooled_dim": TEXT_WIDTH}
    return MMDiTConfig.model_validate(shape | sizes)


def atoll_network(network: str, size: str) -> DiT | MMDiT:
    """Atoll's network of this name and size."""
    config = config_of(network, size)
    return DiT(config) if isinstance(config, DiTConfig) else MMDiT(config)


class Diffusers(nn.Module):
    """diffusers' network of the same shape, called like ours, with its blocks where the training loop expects them."""

    def __init__(self, network: str, size: str) -> None:
        super().__init__()
        self.kind = network
        s = SIZES[size]
        heads, width = s["heads"], s["width"]
        self.network: Any
        if network == "dit":
            from diffusers import PixArtTransformer2DModel

            self.network = PixArtTransformer2DModel(
                num_attention_heads=heads,
                attention_head_dim=width // heads,
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                num_layers=s["depth"],
                cross_attention_dim=width,
                sample_size=SIZE,
                patch_size=s["patch"],
                caption_channels=TEXT_WIDTH,
                use_additional_conditions=False,
            )
        elif network == "mmdit":
            from diffusers import PRXTransformer2DModel

            self.network = PRXTransformer2DModel(
                in_channels=CHANNELS,
                patch_size=s["patch"],
                context_in_dim=TEXT_WIDTH,
                hidden_size=width,
                mlp_ratio=(hidden_width(width, MLP_RATIOS["mmdit"]) + 0.5) / width,  # it rounds down
                num_heads=heads,
                depth=s["depth"],
                axes_dim=[width // heads // 2] * 2,
                time_factor=1.0,
            )
        else:
            from diffusers import SD3Transformer2DModel

            self.network = SD3Transformer2DModel(
                sample_size=SIZE,
                patch_size=s["patch"],
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                num_layers=s["depth"],
                attention_head_dim=width // heads,
                num_attention_heads=heads,
                joint_attention_dim=TEXT_WIDTH,
                caption_projection_dim=width,
                pooled_projection_dim=TEXT_WIDTH,
                pos_embed_max_size=SIZE // s["patch"],
                qk_norm="rms_norm",
            )

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.network.blocks if self.kind == "mmdit" else self.network.transformer_blocks
        return blocks

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        dtype = self.network.dtype
        latent, states = x.to(dtype), condition.states.to(dtype)
        if self.kind == "dit":
            output = self.network(latent, states, time, encoder_attention_mask=condition.mask, return_dict=False)
        elif self.kind == "mmdit":
            output = self.network(latent, time, states, attention_mask=condition.mask, return_dict=False)
        else:  # it has no mask
            assert condition.pooled is not None
            output = self.network(latent, states, condition.pooled.to(dtype), time, return_dict=False)
        return output[0].to(x.dtype)
