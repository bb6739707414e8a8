"""Paged attention on the host CPU (ISPC and C++).

`build` makes the kernels, `CpuAttention` runs them one call at a time, `AttentionService` a step at
a time through doorbells; `host_kv_shapes` says what a cache looks like.
Imports nothing of NEO: it takes tensors and numbers.
"""
