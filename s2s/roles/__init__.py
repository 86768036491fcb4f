"""The two processes."""
