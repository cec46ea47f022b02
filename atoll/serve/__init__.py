"""The model as a service: an engine whose requests share every step, an HTTP API and a page (`atoll serve`)."""
