"""s2s: a signed, durable link between a player-facing server and a simulation engine."""

from importlib.metadata import version

__version__ = version("txs2s")
