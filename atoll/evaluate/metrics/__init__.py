"""Distances, agreement, diversity and cost."""
