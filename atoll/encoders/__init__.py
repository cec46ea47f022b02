"""The frozen networks: codecs, feature networks, text encoders, and where their weights lie."""
