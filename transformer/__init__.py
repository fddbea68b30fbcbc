"""The model and its mathematics: nothing here knows files, consoles or the config file."""

from transformer.config import TransformerConfig
from transformer.model import Transformer
from transformer.sampling import Sampling, generate, stream

__all__ = ["Sampling", "Transformer", "TransformerConfig", "generate", "stream"]
