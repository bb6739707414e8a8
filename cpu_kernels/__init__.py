"""Paged attention on the host CPU (ISPC and C++)."""
