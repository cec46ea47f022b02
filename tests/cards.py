"""Valid cards for tests, as plain values; keywords replace keys, and None as a default means that a key is absent."""

from typing import Any

SHA = "0" * 64
CODEC = {"name": "pixels", "channels": 1}
CONDITION = {"name": "hash", "dim": 8, "length": 4, "seed": 0}
SHAPE = [1, 4, 8]


def encoded_card(**changes: Any) -> dict[str, Any]:
    """The card of encoded/, as `atoll encode` writes it."""
    images = {"size": 8, "channels": 1, "smallest_side": 4, "duplicates": "keep", "flips": False}
    return {
        "source": {"name": "glyphs", "subset": "demo", "sha256": SHA},
        "images": images,
        "codec": CODEC,
        "condition": CONDITION,
        "feature": {"name": "hog", "bins": 4, "grid": 8},
        "precision": "fp32",
        "counts": {"good": 60, "uncaptioned": 0, "skipped": {"too small": 2}},
        **changes,
    }


def cluster_shards_card(**changes: Any) -> dict[str, Any]:
    """The card of one cluster's shards, as `atoll cluster` writes it."""
    return {
        "cluster": 1,
        "clusters": 3,
        "assignment": SHA,
        "latent_shape": SHAPE,
        "codec": CODEC,
        "condition": CONDITION,
        "source": {"name": "glyphs", "subset": "demo", "sha256": SHA},
        **changes,
    }


def clusters_card(k: int = 3, **changes: Any) -> dict[str, Any]:
    """clusters.json, as `atoll cluster` writes it."""
    words = {"silhouette": 0.5, "words": [["moss", 0.5, 0.25]]}
    scores = {"rows": 60, "silhouette": 0.25, "silhouette_rows": 60, "davies_bouldin": None}
    return {
        "format": 1,
        "kind": "clusters",
        "k": k,
        "method": "balanced",
        "fine": 16,
        "seed": 0,
        "router_fraction": None,
        "feature": {"name": "hog", "bins": 4, "grid": 8},
        "codec": CODEC,
        "assignment": SHA,
        "encoded": [SHA],
        "counts": [{"train": 14, "val": 6}] * k,
        "blank": 0,
        "largest_over_mean": 1.0,
        "quality": {**scores, "clusters": [words] * k},
        **changes,
    }


def shards_index(**changes: Any) -> dict[str, Any]:
    """index.json of a directory with one cluster's shards."""
    return {
        "format": 1,
        "kind": "shards",
        "rows": 60,
        "splits": {"train": 42, "val": 18},
        "columns": {
            "cluster": {"dtype": "int64", "shape": []},
            "latent": {"dtype": "float16", "shape": SHAPE},
        },
        "shards": [{"file": "shard-00000.safetensors", "bytes": 4096, "sha256": SHA, "rows": 60}],
        "manifest": {"file": "manifest.parquet", "bytes": 1024, "sha256": SHA},
        "attached": [{"file": "skipped.jsonl", "bytes": 0, "sha256": SHA}],
        "card": cluster_shards_card(),
        **changes,
    }


NETWORK = {
    "name": "dit",
    "patch": 2,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "mlp_ratio": 4.0,
    "modulation": "single",
    "channels": 1,
    "size": SHAPE[1:],
    "states_dim": 8,
    "pooled_dim": 8,
}
OBJECTIVE = {
    "prediction": "flow",
    "schedule": {"name": "linear"},
    "time_scale": 999.0,
    "time_sampling": "uniform",
    "weighting": "none",
}
WEIGHTS = {"file": "weights.safetensors", "sha256": SHA, "bytes": 4096}


def training_record(**changes: Any) -> dict[str, Any]:
    """The training in an expert's card, of a student whose weights were averaged again."""
    return {
        "mark": "258b5c79162b01da",
        "settings": {"steps": 8, "batch": 6, "betas": [0.9, 0.99], "calibration_holdout": 0.3},
        "steps": 8,
        "plans": [{"mark": "258b5c79162b01da", "steps": 4, "until": 3, "exact": True}],
        "loss": 0.5,
        "validation": {"-2": 0.75, "+2": 0.25},
        "seconds": 1.5,
        "rollbacks": 0,
        "skipped_batches": 0,
        "init": {"name": "0-flow", "sha256": SHA},
        "teacher": {"ensemble": SHA, "by": "owner"},
        "rows": 14,
        "calibration_holdout": 0.3,
        "seed": 1,
        "torch": "2.13.0",
        "ema": {"sigma_rel": 0.1, "snapshots": 4, "widths": [0.05, 0.1], "of": SHA},
        **changes,
    }


def expert_card(**changes: Any) -> dict[str, Any]:
    """An expert's card.json with everything that one can hold."""
    return {
        "format": 1,
        "kind": "expert",
        "name": "1-flow",
        "k": 3,
        "clusters": [1],
        "objective": OBJECTIVE,
        "network": NETWORK,
        "assignment": SHA,
        "latent_shape": SHAPE,
        "codec": CODEC,
        "condition": CONDITION,
        "calibration": {
            "log_snr": [-4.0, 0.0, 4.0],
            "slope": [0.0, 0.5, 1.0],
            "x0_mse": [1.0, 0.5, 0.125],
            "x0_mse_raw": [2.0, 1.0, 0.25],
            "velocity_mse": [2.0, 2.0, 4.0],
            "measured_on": "held back",
            "rows": 6,
            "seed": 1,
        },
        "training": training_record(),
        "conversion": {"kind": "dit", "modulation": "fit", "source": {"dit.pt": SHA}, "classes": 10, "residual": [0.5]},
        "merged": {"base": {"name": "1-flow", "sha256": SHA}, "lora": {"name": "1-flow", "sha256": SHA}, "scale": 0.5},
        "weights": WEIGHTS,
        **changes,
    }


def lora_card(**changes: Any) -> dict[str, Any]:
    """The card.json of a low-rank update."""
    card = {key: value for key, value in expert_card().items() if key not in ("merged", "conversion", "weights")}
    lora = {"rank": 4, "alpha": 8.0, "targets": ["attention.qkv"]}
    base = {"name": "1-flow", "sha256": SHA}
    return {**card, "kind": "lora", "base": base, "lora": lora, "weights": WEIGHTS, **changes}


def router_card(**changes: Any) -> dict[str, Any]:
    """A router's card.json."""
    network = {key: value for key, value in NETWORK.items() if key != "states_dim"}
    return {
        "format": 1,
        "kind": "router",
        "network": {**network, "name": "router", "clusters": 3, "pooled_dim": None},
        "clusters": 3,
        "latent_shape": SHAPE,
        "codec": CODEC,
        "condition": CONDITION,
        "assignment": SHA,
        "path": [[{"name": "cosine", "s": 0.008}, [0, 2]], [{"name": "linear"}, [1]]],
        "accuracy_at_t": {"0.1": 1.0, "0.9": 0.375},
        "training": {"mark": "258b5c79162b01da", "steps": 8, "rows": 42, "seed": 998, "torch": "2.13.0"},
        "weights": WEIGHTS,
        **changes,
    }


def ensemble_card(**changes: Any) -> dict[str, Any]:
    """ensemble.json of two replicas and a router."""
    stacking = {
        "names": ["0-eps", "0-flow"],
        "log_snr": [-4.0, 4.0],
        "weights": [[0.25, 0.5], [0.0, 1.0]],
        "x0_mse": [1.0, 0.125],
    }
    return {
        "format": 1,
        "kind": "ensemble",
        "experts": [
            {
                "name": name,
                "clusters": [0],
                "url": f"../experts/{name}",
                "sha256": SHA,
                "lora": {"url": f"../loras/{name}", "sha256": SHA, "scale": 0.5},
            }
            for name in stacking["names"]
        ],
        "router": {"url": "../router", "sha256": SHA},
        "clusters": 3,
        "assignment": SHA,
        "latent_shape": SHAPE,
        "codec": CODEC,
        "stackings": {"file": "stackings.safetensors", "sha256": SHA, "weights": [stacking]},
        "sampling": {
            "steps": 3, "guidance_scale": 2.0, "method": "euler", "routing": "top-2", "replicas": "stacked",
        },
        **changes,
    }  # fmt: skip


def drawn_card(**changes: Any) -> dict[str, Any]:
    """What stands in the cards of rows that experts drew."""
    source = {
        "name": "experts",
        "experts": [{"name": "0-eps", "draws": [0, 1, 2], "sha256": SHA}],
        "captions": {"from": "one list for all clusters", "counts": [4, 4, 4], "sha256": [SHA] * 3},
        "images": 22,
        "steps": 2,
        "method": "heun",
        "guidance_scale": 1.0,
        "seed": 0,
        "validation": 0.25,
        "shard_rows": 8,
    }
    return {
        "codec": CODEC,
        "latent_shape": SHAPE,
        "assignment": SHA,
        "condition": CONDITION,
        "clusters": 3,
        "source": source,
        **changes,
    }
