"""The models NEO runs."""

from engine.models.decoder import DecoderModel, FinalStates
from engine.models.weights import load_weights, make_dummy_weights

__all__ = ["DecoderModel", "FinalStates", "load_weights", "make_dummy_weights"]
