"""Tests of :mod:`s2s.handlers`."""
