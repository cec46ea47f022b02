"""The HTML pages of an evaluation."""
