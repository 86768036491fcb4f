"""Tests of :mod:`s2s.link`."""
