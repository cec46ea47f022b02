"""Whether a configuration claims a network that its weights file can hold; checked before the network is built."""

from collections.abc import Iterator, Mapping
from typing import Any

from atoll.errors import AtollError

# Smaller claims cost little; the comparison with the weights, tensor by tensor, refuses them in better words.
_FREE_DEPTH, _FREE_NUMBERS = 64, 2**24

# The names of sizes in configurations: of Atoll's networks, of diffusers' and of transformers'.
_DEPTHS = ("depth", "num_layers", "num_single_layers", "num_hidden_layers", "num_blocks")
_WIDTHS = ("width", "hidden_size", "d_model", "projection_dim", "intermediate_size", "d_ff", "caption_channels")
_ROWS = ("vocab_size", "num_embeds_ada_norm", "max_position_embeddings")  # of a table as wide as the network
_PAIRS = (("num_attention_heads", "attention_head_dim"), ("num_heads", "d_kv"))  # their product is a width
_CHANNELS = ("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels")
_BLOCKS = ("layers_per_block", "num_encoder_blocks", "num_decoder_blocks")


def require_fit(config: Mapping[str, Any], tensors: int, numbers: int, where: str) -> None:
    """Raise AtollError if a configuration claims a larger network than its weights hold.

    The estimate is a lower bound: one D x D matrix per block, one matrix per pair of convolutions.

    Args:
        config: of the network, as in a card or in config.json; nested configurations count, too.
        tensors: tensors in the weights.
        numbers: elements of all tensors.
        where: the file, for the message.
    """
    for part in _parts(config):
        # Blocks have several tensors each.
        blocks = [_count(part.get(key)) for key in (*_DEPTHS, *_BLOCKS)]
        depth = max((*blocks, *(sum(_counts(part.get(key))) for key in _BLOCKS)))
        # Each block of a transformer multiplies by matrices of D x D; a width may also be that of one table.
        width = max(_count(part.get(key)) for key in _WIDTHS)
        pairs = [_count(part.get(one)) * _count(part.get(two)) for one, two in _PAIRS]
        inner = max(*pairs, _count(part.get("width")), _count(part.get("hidden_size")), _count(part.get("d_model")))
        rows = max(_count(part.get(key)) for key in _ROWS)
        # Each stage of an autoencoder has convolutions of 3 x 3.
        channels = [max(_counts(part.get(key)), default=0) for key in _CHANNELS]
        claimed = max(_numbers_of_blocks(part, inner), width, rows, 9 * max(channels) ** 2)
        if (depth > tensors and depth > _FREE_DEPTH) or (claimed > numbers and claimed > _FREE_NUMBERS):
            raise AtollError(
                f"{where}: claims a network of at least {max(depth, 1):,} blocks and {claimed:,} numbers; its weights "
                f"hold {tensors:,} tensors of {numbers:,} numbers; get card and weights from one place"
            )


def _numbers_of_blocks(part: Mapping[str, Any], inner: int) -> int:
    """Return the least numbers of the blocks of a transformer of width `inner`."""
    return max(_count(part.get(key)) for key in _DEPTHS) * inner**2


def _parts(config: Mapping[str, Any], levels: int = 4) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration and those nested in it: a CLIP holds one for texts and one for images."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping) and levels:
            yield from _parts(value, levels - 1)


def _count(value: Any) -> int:
    # Other types are refused by the class that reads them.
    return max(0, int(value)) if isinstance(value, int | float) and abs(value) < 2**63 else 0


def _counts(value: Any) -> list[int]:
    return [_count(one) for one in value] if isinstance(value, list | tuple) else []
