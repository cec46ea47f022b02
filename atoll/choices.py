"""What a user may choose and several parts share, written once. Imports nothing, so that the manifest stays light."""

from typing import Literal

Checkpointing = Literal["none", "selective", "full"]  # which activations the backward pass computes again
Method = Literal["euler", "heun", "midpoint", "dpm++2m"]  # of the sampler
