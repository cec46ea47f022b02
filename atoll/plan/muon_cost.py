"""What Muon costs an expert: products of matrices at every step, whatever the batch; and what it saves."""

from collections import Counter
from dataclasses import dataclass

from atoll.choices import hidden_width
from atoll.plan.cost import NetworkSizes
from atoll.plan.mmdit_cost import MMDiTSizes

_ITERATIONS = 5  # of Newton and Schulz, as in atoll.train.muon


@dataclass(frozen=True)
class MuonCost:
    """Of one step of one training.

    Attributes:
        flops: of the iterations, in bfloat16; every process of a training has all of them.
        saved_bytes: of the second moments that the matrices do not have, in float32.
    """

    flops: int
    saved_bytes: int


def muon_matrices(n: NetworkSizes) -> Counter[tuple[int, int]]:
    """Count the matrices that Muon steps by their shape, the smaller side first."""
    # Queries, keys and values of the image, what leaves attention, and the text's keys and values.
    D = n.width
    if isinstance(n, MMDiTSizes):
        dual = n.dual_blocks
        square = 6 * (n.depth - dual) + 8 * dual  # both streams of a dual block have four
        hidden, wide = hidden_width(D, n.mlp_ratio), 3 * (n.depth - dual) + 6 * dual
    else:
        square, wide, hidden = 8 * n.depth, 2 * n.depth, int(D * n.mlp_ratio)
    return Counter({(D, D): square}) + Counter({(min(D, hidden), max(D, hidden)): wide})


def muon_cost(n: NetworkSizes) -> MuonCost:
    """Return what a step of Muon costs beside an AdamW step."""
    # An iteration of R x C: the Gram matrix, its square, and the product with the matrix.
    counts = muon_matrices(n)
    flops = sum(number * (4 * r * r * c + 2 * r**3) for (r, c), number in counts.items())
    return MuonCost(_ITERATIONS * flops, 4 * sum(number * r * c for (r, c), number in counts.items()))
