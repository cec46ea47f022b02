"""Many experts as one velocity function."""

from atoll.ensemble.ensemble import Alignment, Ensemble, Expert, Network, RouterNetwork, Trace

__all__ = ["Alignment", "Ensemble", "Expert", "Network", "RouterNetwork", "Trace"]
