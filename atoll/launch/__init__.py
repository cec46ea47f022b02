"""Trains what the manifest names, each part alone in a process of its own."""
