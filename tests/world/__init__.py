"""Tests of :mod:`s2s.world`."""
