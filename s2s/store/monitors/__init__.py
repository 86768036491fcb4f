"""Periodic checks of the database: its clock, its locks, its snapshots, its queue of notifications."""
