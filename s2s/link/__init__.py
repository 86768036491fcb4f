"""One connection, on Twisted."""
