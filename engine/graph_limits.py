"""Which steps are launched as one CUDA graph: the runner and the predictions must agree on it."""

MAX_GRAPH_TOKENS = 1024
"""Most tokens of a sub-batch that is captured. Longer ones keep a GPU busy for longer than their
launching takes: 1,024 rows of Llama-3-8B take an H200 18 ms, launching them kernel by kernel 14."""

MAX_STAGED_TOKENS = 4096
"""Most tokens of prompts that go to the host, with what was computed of them before."""
