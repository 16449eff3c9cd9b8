"""The registered operators: schemas, shapes for tracing, autograd."""

from . import binary, linear, logits, one_pass

__all__ = ["binary", "linear", "logits", "one_pass"]
