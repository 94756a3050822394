"""seqloss: the loss of an encoder-decoder model as a service."""

__all__ = ["__version__"]

__version__ = "0.1.0"
