"""Files on disk: artifacts, typed cards, the layout of a run, locks, shards."""
