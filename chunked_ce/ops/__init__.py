"""The registered operators: schemas, shapes for tracing, autograd."""
