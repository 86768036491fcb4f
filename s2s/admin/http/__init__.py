"""The HTTP API of a server (docs/api.rst)."""
