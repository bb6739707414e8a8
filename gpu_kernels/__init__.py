"""Triton kernels for the device side: attention, KV movement and fused small operations."""
