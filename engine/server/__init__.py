"""The online server: an HTTP process that speaks OpenAI's API, and an engine process behind it.

The engine runs alone in its process because a step launches kernels from Python and must never
share an interpreter with HTTP. The two talk through a socket pair; see `engine.server.wire`.
"""
