"""Reading model files: Hugging Face folders, GGUF files, hub models, the embedded default model.

`open_checkpoint` is the way in; what it returns is a `Checkpoint`. Nothing here knows how a model
computes.
"""

from engine.checkpoint.checkpoint import Checkpoint
from engine.checkpoint.default_model import DEFAULT_MODEL_NAME
from engine.checkpoint.open_checkpoint import LOAD_FORMATS, open_checkpoint

__all__ = ["DEFAULT_MODEL_NAME", "LOAD_FORMATS", "Checkpoint", "open_checkpoint"]
