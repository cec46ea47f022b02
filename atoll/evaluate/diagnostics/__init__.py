"""Diagnostics of experts, router and fusion along sampling trajectories and on held-out latents."""
