"""Prompts to files: the stage behind `atoll sample`."""
