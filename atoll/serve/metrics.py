"""GET /metrics: counters of the API and numbers of the engines, in a registry of each app's own."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from atoll.serve.engine import Engine
from atoll.serve.types import Failed, Finished

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class ServerMetrics:
    """What a server counts.

    Args:
        engines: the engines by the model's name; their `statistics()` are read at each scrape.
    """

    def __init__(self, engines: Mapping[str, Engine]):
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "atoll_http_requests", "Requests by route and status.", ["method", "route", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "atoll_http_seconds", "Time to answer, by route.", ["route"], buckets=_SECONDS, registry=registry
        )
        self._jobs = Counter("atoll_jobs", "Jobs by outcome.", ["model", "outcome"], registry=registry)
        self._images = Counter("atoll_images", "Finished images.", ["model"], registry=registry)
        self._stage_seconds = Histogram(
            "atoll_stage_seconds",
            "Latency of finished jobs by stage: queue, sample, encode (to PNG).",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.unfinished = Gauge("atoll_jobs_unfinished", "Jobs that wait or run.", registry=registry)
        self.streams = Gauge("atoll_event_streams", "Open event streams.", registry=registry)
        self.file_bytes = Gauge("atoll_file_bytes", "Size of the images in memory.", registry=registry)
        registry.register(_EngineCollector(engines))

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request. route: its template, never the path itself."""
        # Clients choose the method: an unknown one must not become a label.
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def finished(self, model: str, event: Finished, encode_seconds: float) -> None:
        """Count a finished job."""
        self._jobs.labels(model, "finished").inc()
        self._images.labels(model).inc(len(event.images))
        stages = {"queue": event.queue_seconds, "sample": event.sample_seconds, "encode": encode_seconds}
        for stage, seconds in stages.items():
            self._stage_seconds.labels(model, stage).observe(seconds)

    def failed(self, model: str, event: Failed) -> None:
        """Count a job without images."""
        self._jobs.labels(model, event.reason).inc()

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector:
    """Each number of `Engine.statistics()` as a gauge `atoll_engine_...`; keys of mappings become the label `key`."""

    def __init__(self, engines: Mapping[str, Engine]):
        self._engines = engines

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the gauges of all engines."""
        families: dict[str, GaugeMetricFamily] = {}
        for model, engine in self._engines.items():
            for name, key, value in _numbers(engine.statistics()):
                if name not in families:
                    text = f"{name} of Engine.statistics()."
                    families[name] = GaugeMetricFamily(f"atoll_engine_{name}", text, labels=["model", "key"])
                families[name].add_metric([model, key], value)
        return list(families.values())


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str, float]]:
    """Yield (name, key, value) of all numbers; a mapping's numbers share its name."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            # "experts.0-eps.rows": the first part is the name, the others are the key.
            name, _, label = f"{prefix}{key}".partition(".")
            yield re.sub(r"\W", "_", name), label, float(value)
