"""Every message a user's mistake can produce: what came, what was expected, what to do.

The only place that words an error; a file for each kind of argument.
"""

from .backend import *
from .backward import *
from .distillation import *
from .heads import *
from .keywords import hides_unknown as hides_unknown
from .keywords import known_options as known_options
from .keywords import names_unknown as names_unknown
from .keywords import unknown_keywords as unknown_keywords
from .labels import *
from .linear import *
from .loss import *
from .mistakes import *
from .multi_token import *
from .planner import *
from .shift import shift as shift
from .stats import *
from .targets import *
from .values import not_sharded as not_sharded
from .values import target_indices as target_indices
from .values import targets_in_range as targets_in_range
from .weights import *
