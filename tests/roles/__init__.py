"""Tests of :mod:`s2s.roles`."""
