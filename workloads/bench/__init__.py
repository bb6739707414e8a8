"""Sweeps: every system at every load, repeated, resumable, one result file a point."""
