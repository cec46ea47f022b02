"""A multimodal diffusion transformer: image tokens attend to the text and to each other in one attention.

Read it top to bottom; the sizes are at the end. Letters: B batch, C H W latent, N image tokens, L text tokens,
D width, h heads, d = D / h, p patch, F hidden width of the MLP.

A block reads the text, but does not change it (PRX's layout, Photoroom 2025):

    q, k, v = qkv(norm(x) * (1 + scale_1) + shift_1),  k_text, v_text = kv(norm(text))
    x = x + gate_1 * out(attention(rope(rms(q)), [rms(k_text); rope(rms(k))], [v_text; v]))
    x = x + gate_2 * mlp(norm(x) * (1 + scale_2) + shift_2),  mlp(y) = down(silu(gate(y)) * up(y))

The text's keys and values do not depend on time or latent, so they are computed once per prompt. The first
`dual_blocks` blocks update the text as well, by weights of its own and the same attention (SD3, arXiv 2403.03206):
all later keys and values then depend on the time, and only the projection of the text is cached.

The linear layers have no bias, except those that embed the time; the norms have no weights. Positions enter by rotation
of queries and keys alone: tokens may lie at any place. Time, norms and rotations are computed in float32 at least.

With the default `mlp_ratio`, 10/3, a block has the FLOPs of a `DiTBlock` of the same width whose MLP has the ratio 4.
XL/2 with 4 channels and 768 wide text has 605.3 M parameters.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from atoll.choices import MLP_RATIOS, hidden_width
from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.nn.attention import TextKV
from atoll.nn.block_cache import BlockCache
from atoll.nn.dit import (
    TIME_FEATURES,
    Conditioner,
    SingleModulation,
    initialize_blocks,
    modulate,
    patchify,
    time_features,
    unpatchify,
    zero,
)
from atoll.nn.inputs import check_states, checked_rows, compute_dtype, mask_bias
from atoll.nn.joint_blocks import DualBlock, MMDiTBlock, linear, norm
from atoll.nn.positions import TokenGrid, positions_of, token_grid
from atoll.nn.rotary import rotations
from atoll.nn.sizes import check_head_width, check_sizes
from atoll.nn.token_route import TokenRoute
from atoll.storage import bounds


class MMDiTConfig(BaseModel):
    """The configuration of an MMDiT, saved in the card.

    Raises AtollError for sizes that do not fit each other, pydantic.ValidationError for a wrong type or key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["mmdit"] = "mmdit"
    size: tuple[bounds.Side, bounds.Side]  # (H, W) of the latent
    channels: bounds.Channels  # C of the latent
    patch: bounds.Side  # side of a token, in latent pixels
    width: bounds.Width  # D
    depth: bounds.Depth  # number of blocks
    heads: bounds.Width
    mlp_ratio: bounds.MlpRatio = MLP_RATIOS["mmdit"]  # hidden width of a block's MLP over D, see `hidden_width`
    states_dim: bounds.Width  # width of the condition's states
    pooled_dim: bounds.Width | None = None  # width of the condition's pooled vector; None: not used
    dual_blocks: bounds.DualBlocks = 0  # of the blocks, the first ones, which update the text as well
    size_embedding: bool = False  # height and width of the latent enter the modulation
    bottleneck: bounds.Width | None = None  # width between two layers that embed a patch, for pixels; None: one layer
    base_size: tuple[bounds.Side, bounds.Side] | None = None  # (H, W) of `atoll.nn.positions`' base grid; None: `size`

    @model_validator(mode="after")
    def _check(self) -> "MMDiTConfig":
        for size in (self.size, self.base_size or self.size):
            check_sizes(size, self.patch, self.width, self.heads)
        check_head_width(self.width, self.heads)
        # The text that the last block would compute is read by nothing.
        if self.dual_blocks >= self.depth:
            raise AtollError(
                f"dual_blocks {self.dual_blocks}, depth {self.depth}: the last block only reads the text; "
                f"take at most {self.depth - 1}"
            )
        return self


@dataclass(frozen=True, eq=False)
class BlockInputs:
    """What all blocks read. prepared [B,6,D]; rope [1 or B,1,N,d/2,2]; bias [B,1,1,L+N]."""

    prepared: Tensor
    prepared_text: Tensor | None
    rope: Tensor
    bias: Tensor | None
    keys_values: Sequence[Tensor] | None

    def index(self, rows: Tensor) -> "BlockInputs":
        """The given rows ([b] int64)."""
        return BlockInputs(
            self.prepared[rows],
            None if self.prepared_text is None else self.prepared_text[rows],
            self.rope if len(self.rope) == 1 else self.rope[rows],
            None if self.bias is None else self.bias[rows],
            None if self.keys_values is None else [one[rows] for one in self.keys_values],
        )


class MMDiT(nn.Module):
    """The denoiser: forward(x [B,C,H,W], time [B], condition) -> [B,C,H,W], in the dtype of x.

    `time` is scaled already (0..999 by default, see the objective's time_scale). The network computes in the dtype of
    its weights, or in autocast's. Raises AtollError if an input does not fit the configuration.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        D, b, values = config.width, config.bottleneck, config.patch**2 * config.channels
        hidden = hidden_width(D, config.mlp_ratio)
        self.embed = nn.Sequential(linear(values, b), linear(b, D)) if b else linear(values, D)
        self.conditioner = Conditioner(D, config.pooled_dim, "single")
        self.embed_size = linear(2 * TIME_FEATURES, D) if config.size_embedding else None
        self.shared_text = nn.Linear(D, 6 * D) if config.dual_blocks else None  # modulates the text of dual blocks
        self.embed_states = linear(config.states_dim, D)
        self.blocks = nn.ModuleList(
            DualBlock(D, config.heads, hidden) if number < config.dual_blocks else MMDiTBlock(D, config.heads, hidden)
            for number in range(config.depth)
        )
        self.final_modulation = SingleModulation(D, 2)
        self.final = linear(D, values)
        self.initialize()

    def initialize(self) -> None:
        """Initialise like the DiT: every block is the identity, the output is exactly zero."""
        initialize_blocks(self, self.conditioner)
        nn.init.normal_(self.embed_states.weight, std=0.02)
        if self.embed_size is not None:
            nn.init.normal_(self.embed_size.weight, std=0.02)
        if self.shared_text is not None:
            zero(self.shared_text)
        zero(self.final)

    def embed_condition(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Project the states to [B,L,D] and make the attention bias [B,1,1,L], -inf where masked."""
        check_states(condition, self.config.states_dim)
        dtype = compute_dtype(self.final.weight, condition.states)
        return self.embed_states(condition.states.to(dtype)), mask_bias(condition.mask, dtype)

    def read_prompt(self, condition: Condition) -> TextKV:
        """Compute what depends on the prompt alone; `forward` accepts it in place of the condition.

        These are the text keys and values of all blocks; with dual blocks, [B,1,L,D], the projected states. Valid for
        this network and its current weights only.
        """
        states, bias = self.embed_condition(condition)  # [B,L,D], [B,1,1,L]
        if self.config.dual_blocks:
            return TextKV(states[:, None], bias, condition.pooled)
        text = norm(states)  # [B,L,D]
        keys_values = [block.read(text) for block in self.blocks if isinstance(block, MMDiTBlock)]  # [B,L,2D] each
        return TextKV(torch.stack(keys_values, dim=1), bias, condition.pooled)

    def _modulations(self, x: Tensor, time: Tensor, pooled: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The blocks' modulation [B,6,D], the last norm's [B,1,D], and the text's [B,6,D] in dual blocks."""
        # Without autocast: bfloat16 would round the time. The layers are small.
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.final_modulation.table.dtype
            more = None
            if self.embed_size is not None:
                wide = torch.promote_types(x.dtype, torch.float32)
                sides = torch.tensor(x.shape[2:], device=x.device, dtype=wide)  # [2]
                features = time_features(sides).flatten().to(dtype).repeat(len(x), 1)  # [B,512]
                more = self.embed_size(features)  # [B,D]
            prepared, c = self.conditioner(time, pooled, dtype, more)  # [B,6,D], [B,1,D]
            if self.shared_text is None:
                return prepared, c, None
            return prepared, c, self.shared_text(F.silu(c)).unflatten(2, (6, -1)).squeeze(1)

    def _rope(self, x: Tensor, grid: TokenGrid, positions: Tensor | None) -> Tensor:
        """The rotations [1 or B,1,N,d/2,2] of the given positions, or of the grid."""
        config = self.config
        if positions is None:
            H, W = config.base_size or config.size
            positions = positions_of(grid, (H // config.patch, W // config.patch), x.device)  # [N,2]
        tokens = [grid[0] * grid[1], 2]
        if list(positions.shape) not in (tokens, [len(x), *tokens]):
            raise AtollError(
                f"positions: got shape {list(positions.shape)}, expected {tokens} or [{len(x)}, {tokens[0]}, 2]; "
                "give the row and the column of every token"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        return rotations(positions.to(x.device, wide), config.width // config.heads)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        condition: Condition | TextKV | None,
        positions: Tensor | None = None,
        *,
        route: TokenRoute | None = None,
        tap: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the prediction.

        Args:
            x: latent [B,C,H,W], of any size that the patch divides.
            time: [B].
            condition: of B rows, or what `read_prompt` returned for it.
            positions: (row, column) of every token in tokens, [N,2] or [B,N,2]; None: those of `atoll.nn.positions`.
            route: tokens that pass through some blocks only.
            tap: also return the tokens after this many blocks.

        Returns:
            [B,C,H,W]; with `tap` also the tokens [B,N,D] ([B,n,D] within a route).
        """
        # Check the inputs; embed latent, time and text.
        config = self.config
        grid = token_grid(x, time, config.channels, config.patch)
        rope = self._rope(x, grid, positions)  # [1 or B,1,N,d/2,2]
        condition = checked_rows(condition, len(x))
        dtype = compute_dtype(self.final.weight, x)
        prepared, c, prepared_text = self._modulations(x, time, condition.pooled)
        tokens = self.embed(patchify(x.to(dtype), config.patch))  # [B,N,D]
        text, bias, keys_values = self._text(condition)
        bias = None if bias is None else F.pad(bias, (0, tokens.shape[1]))  # [B,1,1,L+N]
        inputs = BlockInputs(prepared, prepared_text, rope, bias, keys_values)
        # The blocks; a cache may skip all but the first.
        if isinstance(condition, TextKV) and condition.cache is not None:
            if route is not None or tap is not None:
                raise AtollError("a block cache skips blocks: expected no route and no tap; leave block_cache at 0")
            tokens, features = self._cached(condition.cache, condition.keys, tokens, text, inputs), None
        else:
            tokens, features = self._through(tokens, text, inputs, route, tap)  # [B,N,D] each
        # The final layer, and back to a latent.
        shift, scale = self.final_modulation(c, dtype).unbind(1)  # [B,1,D] each
        tokens = self.final(modulate(tokens, shift, scale))  # [B,N,p*p*C]
        output = unpatchify(tokens, config.patch, (x.shape[2], x.shape[3])).to(x.dtype)  # [B,C,H,W]
        return output if features is None else (output, features)

    def _text(self, condition: Condition | TextKV) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor] | None]:
        """The projected text [B,L,D], the bias [B,1,1,L], and the blocks' keys and values if they are cached."""
        if isinstance(condition, Condition):
            return *self.embed_condition(condition), None
        if self.config.dual_blocks:
            return condition.keys_values[:, 0], condition.bias, None
        return None, condition.bias, condition.keys_values.unbind(1)

    def _block(self, number: int, x: Tensor, text: Tensor | None, inputs: BlockInputs) -> tuple[Tensor, Tensor | None]:
        """Image tokens [B,N,D] and text [B,L,D] after one block."""
        block = self.blocks[number]
        if isinstance(block, DualBlock):
            return block(x, text, inputs.prepared, inputs.prepared_text, inputs.rope, inputs.bias)
        # The blocks that only read the text read its norm.
        if text is not None and number == self.config.dual_blocks:
            text = norm(text).to(text.dtype)  # CUDA's autocast widens it
        keys_values = None if inputs.keys_values is None else inputs.keys_values[number]
        return block(x, inputs.prepared, inputs.rope, text, inputs.bias, keys_values), text

    def _through(
        self, x: Tensor, text: Tensor | None, inputs: BlockInputs, route: TokenRoute | None, tap: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Image tokens after all blocks, and those after `tap` blocks."""
        if route is not None:
            route.check(len(x), x.shape[1], self.config.depth)
        if tap is not None and not 0 < tap <= self.config.depth:
            raise AtollError(f"tap: got {tap}, expected a number of blocks from 1 to {self.config.depth}")
        skipped, features, current = x, None, inputs
        for number in range(self.config.depth):
            # Entering the route, tokens and rotations are gathered; leaving it, tokens return to their places.
            if route is not None and number == route.first:
                skipped, x = x, route.take(x)  # [B,n,D]
                # The bias of all image tokens is 0, so as many are left as there are tokens.
                bias, fewer = inputs.bias, x.shape[1] - skipped.shape[1]
                bias = None if bias is None else bias[..., : bias.shape[3] + fewer]
                current = replace(inputs, rope=route.take(inputs.rope, dim=2), bias=bias)
            x, text = self._block(number, x, text, current)  # [B,N,D] or [B,n,D]
            if number + 1 == tap:
                features = x
            if route is not None and number + 1 == route.last:
                x, current = route.put(skipped, x), inputs  # [B,N,D]
        return x, features

    def _cached(
        self, cache: BlockCache, keys: Sequence[Hashable], x: Tensor, text: Tensor | None, inputs: BlockInputs
    ) -> Tensor:
        """Image tokens [B,N,D] after the first block, and after the others where the cache does not skip them."""
        once, text = self._block(0, x, text, inputs)  # [B,N,D], [B,L,D]

        def others(rows: Tensor, part: Tensor) -> Tensor:
            part_text, part_inputs = None if text is None else text[rows], inputs.index(rows)
            for number in range(1, self.config.depth):
                part, part_text = self._block(number, part, part_text, part_inputs)  # [b,N,D]
            return part

        return cache.through(keys, x, once, others)


class MMDiTSize(TypedDict):
    """The fields of a configuration that the name of a size fixes."""

    patch: int
    width: int
    depth: int
    heads: int
    mlp_ratio: NotRequired[float]


# MMDiTConfig(size=(32, 32), channels=4, states_dim=768, **MMDIT_SIZES["B/2"]); the FLOPs of the DiT of that name.
# Parameters with these: tiny 1.3 M, S/2 29.8 M, B/2 118.2 M, L/2 411.4 M, XL/2 605.3 M.
# "3B/2" is the expert of DDM (arXiv 2501.05450: width 2560, depth 30, 3 B; eight make 24 B). Heads and ratio are chosen
# here: one stream with a ratio of 3 has 3.00 B, for 16 channels and T5-XL's 2048 wide text. Two streams in 29 of the
# blocks would have 5.1 B.
MMDIT_SIZES: dict[str, MMDiTSize] = {
    "tiny": {"patch": 4, "width": 128, "depth": 4, "heads": 4},
    "S/2": {"patch": 2, "width": 384, "depth": 12, "heads": 6},
    "B/2": {"patch": 2, "width": 768, "depth": 12, "heads": 12},
    "L/2": {"patch": 2, "width": 1024, "depth": 24, "heads": 16},
    "XL/2": {"patch": 2, "width": 1152, "depth": 28, "heads": 16},
    "3B/2": {"patch": 2, "width": 2560, "depth": 30, "heads": 20, "mlp_ratio": 3.0},
}
