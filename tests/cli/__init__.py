"""Tests of :mod:`s2s.cli`."""
