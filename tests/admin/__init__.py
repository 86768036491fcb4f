"""Tests of :mod:`s2s.admin`."""
