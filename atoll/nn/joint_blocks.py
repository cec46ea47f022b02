"""The blocks of `atoll.nn.mmdit`: joint attention of image and text tokens, and a gated MLP.

Letters: B batch, N image tokens, L text tokens, D width, h heads, d = D / h, F hidden width of the MLP.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.choices import Checkpointing
from atoll.nn.attention import head_attention
from atoll.nn.dit import MODULATIONS, NORM_EPS, ModulationKind, modulate
from atoll.nn.fused import activated, is_fused
from atoll.nn.recompute import recomputed
from atoll.nn.rotary import normed_heads


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without bias."""
    return nn.Linear(inputs, outputs, bias=False)


def norm(x: Tensor) -> Tensor:
    """The layer norm without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202); [B,N,D] -> [B,N,D]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = linear(width, 2 * hidden)  # one product for both
        self.down = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if not is_fused(x, self.gate_up):
            gate, up = self.gate_up(x).chunk(2, dim=2)  # [B,N,F] each
            return self.down(F.silu(gate) * up)  # [B,N,D]
        # Two products, of which one ends with its activation.
        gate, up = self.gate_up.weight.chunk(2)  # [F,D] each
        return self.down(activated(x, gate, None, "silu").mul_(F.linear(x, up)))  # [B,N,D]


class TokenStream(nn.Module):
    """The layers of a block for one kind of tokens: modulation, attention's projections, MLP."""

    def __init__(self, width: int, heads: int, hidden: int, kind: ModulationKind) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = MODULATIONS[kind](width, 6)
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width)
        self.mlp = GatedMLP(width, hidden)

    def vectors(self, prepared: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """Shift, scale and gate of attention, then of the MLP: [B,1,D] each."""
        return self.modulation(prepared, dtype).unbind(1)

    def project(self, x: Tensor, shift: Tensor, scale: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B,h,N,d] of the tokens x [B,N,D]."""
        parts = self.qkv(modulate(x, shift, scale)).chunk(3, dim=2)  # [B,N,D] each
        q, k, v = (part.unflatten(2, (self.heads, -1)) for part in parts)  # [B,N,h,d] each
        return normed_heads(q, rope), normed_heads(k, rope), v.transpose(1, 2)  # [B,h,N,d] each

    def update(self, x: Tensor, attended: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """The tokens [B,N,D] after attention's result [B,N,D] and the MLP, both gated."""
        _, _, gate_1, shift_2, scale_2, gate_2 = vectors
        x = torch.addcmul(x, gate_1, self.out(attended))  # [B,N,D]
        return torch.addcmul(x, gate_2, self.mlp(modulate(x, shift_2, scale_2)))  # [B,N,D]


class MMDiTBlock(TokenStream):
    """A block that reads the text, see the head of this file; without `text` it has none (the router's blocks)."""

    checkpointing: Checkpointing = "none"  # set by the training loop

    def __init__(self, width: int, heads: int, hidden: int, kind: ModulationKind = "single", text: bool = True) -> None:
        super().__init__(width, heads, hidden, kind)
        self.kv = linear(width, 2 * width) if text else None

    def forward(
        self,
        x: Tensor,
        prepared: Tensor,
        rope: Tensor,
        text: Tensor | None = None,
        bias: Tensor | None = None,
        keys_values: Tensor | None = None,
    ) -> Tensor:
        """Return x [B,N,D] after the block. text [B,L,D], or keys_values [B,L,2D] from `read(text)`."""
        return recomputed(self._forward, self.checkpointing, x, prepared, rope, text, bias, keys_values)  # [B,N,D]

    def read(self, text: Tensor) -> Tensor:
        """The text's normalised keys, and its values: [B,L,D] -> [B,L,2D]."""
        assert self.kv is not None
        k, v = self.kv(text).chunk(2, dim=2)  # [B,L,D] each
        k = normed_heads(k.unflatten(2, (self.heads, -1)))  # [B,h,L,d]
        return torch.cat([k.transpose(1, 2).flatten(2), v], dim=2)  # [B,L,2D]

    def _forward(
        self,
        x: Tensor,
        prepared: Tensor,
        rope: Tensor,
        text: Tensor | None,
        bias: Tensor | None,
        keys_values: Tensor | None,
    ) -> Tensor:
        shift, scale, *_ = vectors = self.vectors(prepared, x.dtype)  # [B,1,D] each
        q, k, v = self.project(x, shift, scale, rope)  # [B,h,N,d] each
        # The text's keys and values come first, those of a cached prompt or freshly computed ones.
        if self.kv is not None:
            assert text is not None or keys_values is not None
            read = self.read(text) if keys_values is None else keys_values  # type: ignore[arg-type]  # [B,L,2D]
            k_text, v_text = read.unflatten(2, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)  # [B,h,L,d]
            k, v = torch.cat([k_text, k], dim=2), torch.cat([v_text, v], dim=2)  # [B,h,L+N,d]
        return self.update(x, head_attention(q, k, v, bias), vectors)  # [B,N,D]


class DualBlock(nn.Module):
    """A block that updates image and text tokens; both attend to both."""

    checkpointing: Checkpointing = "none"  # set by the training loop

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.image = TokenStream(width, heads, hidden, "single")
        self.text = TokenStream(width, heads, hidden, "single")

    def forward(
        self, x: Tensor, text: Tensor, prepared: Tensor, prepared_text: Tensor, rope: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return x [B,N,D] and text [B,L,D] after the block; bias [B,1,1,L+N], 0 for image tokens."""
        return recomputed(self._forward, self.checkpointing, x, text, prepared, prepared_text, rope, bias)

    def _forward(
        self, x: Tensor, text: Tensor, prepared: Tensor, prepared_text: Tensor, rope: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        L = text.shape[1]
        vectors, vectors_text = self.image.vectors(prepared, x.dtype), self.text.vectors(prepared_text, x.dtype)
        # One attention over the tokens of both; text is not rotated.
        of_text = self.text.project(text, vectors_text[0], vectors_text[1], None)  # [B,h,L,d] each
        of_image = self.image.project(x, vectors[0], vectors[1], rope)  # [B,h,N,d] each
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_text, of_image, strict=True))  # [B,h,L+N,d]
        attended = head_attention(q, k, v, bias)  # [B,L+N,D]
        text = self.text.update(text, attended[:, :L], vectors_text)  # [B,L,D]
        return self.image.update(x, attended[:, L:], vectors), text  # [B,N,D], [B,L,D]
