"""Every message a user's mistake can produce: what came, what was expected, what to do.

The only place that words an error; a file for each kind of argument.
"""

from .backend import *
from .backward import *
from .distributed import *
from .evaluation import *
from .huggingface import *
from .labels import *
from .language_model import *
from .linear import *
from .loss import *
from .mistakes import *
from .perplexity import *
from .planner import *
from .targets import *
