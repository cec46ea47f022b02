"""What autograd saves on a device, and constants of the networks that its formulas need."""

from dataclasses import dataclass

TIME_FEATURES = 256  # as in atoll.nn.dit
SHORT_ROWS = 128  # atoll.nn.attention: shorter rows of attention are normalised in float32


@dataclass(frozen=True)
class Rules:
    """What autograd saves on a device.

    Attributes:
        compute: bytes of a number in matrix products.
        norm: bytes of a number in norms.
        fused: attention is one kernel that saves a logarithm per row instead of the scores.
    """

    compute: int
    norm: int
    fused: bool


# torch's autocast on CUDA runs layer_norm in float32 and widens addcmul to it; on a CPU it leaves both in bfloat16.
CUDA_BF16 = Rules(compute=2, norm=4, fused=True)
CPU_BF16 = Rules(compute=2, norm=2, fused=False)
FP32 = Rules(compute=4, norm=4, fused=True)
