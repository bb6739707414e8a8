"""Paged attention on the host CPU (ISPC and C++).

`build` makes the kernels, `CpuAttention` runs them, `host_kv_shapes` says what a cache looks like.
Imports nothing of NEO: it takes tensors and numbers.
"""
