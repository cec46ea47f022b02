"""How the router's probabilities over clusters become weights: `top-1`, `top-k`, `full`."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from atoll.errors import AtollError

Weighting = Callable[[Tensor], Tensor]


def build_routing(routing: str) -> Weighting:
    """The function from log-probabilities [B, K] to weights [B, K] (rows sum to 1) that a name such as "top-2" means.

    A cluster with log-probability -inf (no expert) keeps weight 0; with fewer than k others, all of them are used.

    Raises:
        AtollError: an unknown name, or k < 1.
    """
    if routing == "full":
        return lambda log_p: torch.softmax(log_p, dim=1)
    match = re.fullmatch(r"top-([1-9]\d*)", routing)
    if match is None:
        raise AtollError(f"unknown routing {routing!r}; expected top-1, top-2, ..., or full")
    return lambda log_p: top_k(log_p, int(match.group(1)))


def top_k(log_p: Tensor, k: int) -> Tensor:
    """The k most probable clusters' probabilities, renormalised; 0 elsewhere. [B, K] -> [B, K]."""
    k = min(k, log_p.shape[1])
    values, clusters = log_p.topk(k, dim=1)
    return torch.zeros_like(log_p).scatter_(1, clusters, torch.softmax(values, dim=1))
