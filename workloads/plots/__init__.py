"""Figures from result files and step logs."""
