"""The registered operators: schemas, shapes for tracing, autograd."""

from . import binary as binary  # importing a module registers its operators
from . import linear as linear
from . import logits as logits
from . import one_pass as one_pass
