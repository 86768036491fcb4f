"""What several test modules need: a database of one's own, and waiting without sleeping."""
