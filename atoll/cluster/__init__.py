"""Features -> clusters/: K disjoint parts of the data, each in a directory that its island can work from alone.

    clusters.json          the card: k, method, seed, counts, quality, hash of the assignment, hashes of encoded/
    centroids.safetensors  fine [F,D], coarse [K,D], and the coarse cluster of every fine centroid [F]
    assignment.parquet     key, cluster, split: one line per image, in the order of encoded/
    cluster-000/ ...       shards of this cluster's latents and captions
    router/                optional: a uniform sample of all shards, with the cluster of every row
    report.html            sizes, quality, images and words; made from
    sample/ images/        the rows that it shows, stored so that it can be made again when data are added

k-means runs in two stages (DDM, arXiv 2501.05450, section 3.2): many fine centroids over the features, then K coarse
ones over the fine. An image belongs to the coarse cluster of its nearest fine centroid. All data are streamed: memory
holds the sample of the fine stage and a few shards.
"""

from atoll.cluster.add import assign_only
from atoll.cluster.assign import Assignment, ClusterMethod, load_assignment
from atoll.cluster.grow import add_cluster, split_cluster
from atoll.cluster.like import cluster_like
from atoll.cluster.probe import write_probe
from atoll.cluster.run import cluster, cluster_run

__all__ = [
    "Assignment",
    "ClusterMethod",
    "add_cluster",
    "assign_only",
    "cluster",
    "cluster_like",
    "cluster_run",
    "load_assignment",
    "split_cluster",
    "write_probe",
]
