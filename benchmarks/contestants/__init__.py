"""The contestants: one module for each, with its client and, where it needs one, its server.

A module has ``drive(place, load, meter)`` and, where it needs its own server, ``serve(place)``, which returns when
stdin ends. ``python -m benchmarks.contestants NAME serve|drive`` runs one side; its arguments are JSON.
"""
