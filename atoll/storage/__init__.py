"""What stands on a disk: artifacts, typed cards, the layout of a run, locks, shards."""
