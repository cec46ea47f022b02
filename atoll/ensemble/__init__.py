"""Many experts as one velocity function."""

from atoll.ensemble.ensemble import Ensemble
from atoll.ensemble.expert import Alignment, Expert, Network, RouterNetwork
from atoll.ensemble.sampler import NonFinitePolicy, Sampler, Trace

__all__ = ["Alignment", "Ensemble", "Expert", "Network", "NonFinitePolicy", "RouterNetwork", "Sampler", "Trace"]
