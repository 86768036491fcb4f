"""What is measured: one module each, with what drives it and, where it has one, the server that is driven.

A module has ``drive(place, load, meter)`` and, where it needs a server of its own, ``serve(place)``, which returns when
our stdin ends. ``python -m benchmarks.contestants NAME serve|drive`` runs one side, told by JSON on the command line.
"""
