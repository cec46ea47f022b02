"""What the report says of experts and clusters."""

from collections import Counter
from collections.abc import Sequence

from atoll.encoders.codec import Codec
from atoll.ensemble import Expert
from atoll.evaluate.pages.report import ClusterInfo, ExpertInfo
from atoll.evaluate.variants import objective_text
from atoll.randomness import cpu_generator, random_rows
from atoll.report.words import count_words, distinctive_words
from atoll.schedule import PATH
from atoll.storage.layout import cluster_number
from atoll.storage.shards import LATENTS, Shards

IMAGES_PER_CLUSTER = 24  # in the report


def describe_expert(expert: Expert) -> ExpertInfo:
    """The report's description of an expert: objective, clusters, and slope of its calibration."""
    calibration = expert.calibration
    # The report plots the slope against the time of the common path.
    t, slope = (), ()
    if calibration is not None:
        t = tuple(PATH.time_at(calibration.log_snr.double()).tolist())
        slope = tuple(calibration.slope.double().tolist())
    return ExpertInfo(expert.name, objective_text(expert.objective), expert.clusters, t, slope)


def describe_clusters(clusters: Sequence[Shards], codec: Codec, seed: int) -> list[ClusterInfo]:
    """The report's description of each cluster: random images that are not left out, and distinctive words."""
    # Word counts over all clusters, to compare each cluster with.
    total = sum(len(cluster) for cluster in clusters)
    overall: Counter[str] = Counter()
    for cluster in clusters:
        overall += count_words(cluster.captions)
    # Random images and words of each cluster.
    described = []
    for cluster in clusters:
        shown = cluster.rows(main=LATENTS[0])
        rows = shown[random_rows(len(shown), IMAGES_PER_CLUSTER, cpu_generator(seed))]
        images = codec.decode(cluster.read("latent", rows).float())
        words = distinctive_words(count_words(cluster.captions), len(cluster), overall, total)
        number = cluster_number(cluster.path.name)
        described.append(ClusterInfo(number, len(cluster), len(cluster) / total, images, words))
    return described
