"""The models NEO runs."""

from engine.models.decoder import DecoderModel
from engine.models.weights import load_weights, make_dummy_weights

__all__ = ["DecoderModel", "load_weights", "make_dummy_weights"]
