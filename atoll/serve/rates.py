"""How often a client may send requests: one token bucket per client, in bounded memory."""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

_CLIENTS = 10_000  # buckets in memory
_BURST_SECONDS = 10.0  # requests of that many seconds may come at once


class RateLimit:
    """A token bucket per client.

    Args:
        per_minute: requests; 0: no limit.
        clock: seconds.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._per_second, self._clock = per_minute / 60, clock
        self._burst = max(1.0, self._per_second * _BURST_SECONDS)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def take(self, client: str) -> float:
        """Take one request from a client's bucket.

        Returns:
            0, or the seconds until there is another one.
        """
        if self._per_second == 0:
            return 0.0
        # What came in since the last request.
        now = self._clock()
        tokens, counted = self._buckets.pop(client, (self._burst, now))
        tokens = min(self._burst, tokens + (now - counted) * self._per_second)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self._per_second
        # The bucket moves to the end; the one that was not used for longest is forgotten.
        self._buckets[client] = (tokens - 1 if wait == 0 else tokens, now)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        return wait


def client_of_address(host: str | None) -> str:
    """Return the name of a client at an address: the address itself, or the /64 network of an IPv6 address.

    Whoever has one IPv6 address usually has 2^64 of them.
    """
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return (host or "unknown")[:64]  # a proxy may write anything
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
