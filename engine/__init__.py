"""NEO's engine: requests, KV blocks, scheduling, the model and the public `LLM` API."""
