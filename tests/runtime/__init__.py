"""Tests of :mod:`s2s.runtime`."""
