"""Tests of :mod:`s2s.store`."""
