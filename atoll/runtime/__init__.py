"""Processes, devices and heavy optional libraries."""
