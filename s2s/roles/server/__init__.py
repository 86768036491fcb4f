"""The player-facing server."""
