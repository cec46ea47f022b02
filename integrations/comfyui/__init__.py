"""Atoll in ComfyUI: two nodes, "Load Atoll ensemble" and "Sample Atoll ensemble"."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
