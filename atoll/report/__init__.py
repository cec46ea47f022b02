"""What HTML pages are made of: the page, its charts, its words."""
