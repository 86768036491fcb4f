"""The wire and the session rules: no I/O, no Twisted, no clock, no database."""
