"""Registered operators: schemas, shapes for tracing, and autograd."""

from . import binary, linear, logits, one_pass

__all__ = ["binary", "linear", "logits", "one_pass"]
