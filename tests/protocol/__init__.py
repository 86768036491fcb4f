"""Tests of :mod:`s2s.protocol`."""
