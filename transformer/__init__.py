"""The model alone: it uses no files, no console and no config file."""

from transformer.config import TransformerConfig
from transformer.model import Transformer
from transformer.sampling import Sampling, generate, stream

__all__ = ["Sampling", "Transformer", "TransformerConfig", "generate", "stream"]
