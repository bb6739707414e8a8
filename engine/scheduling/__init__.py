"""Deciding what each step computes and where every request's KV lives; plain Python, no torch."""
