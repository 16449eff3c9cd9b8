"""Every message that a mistake in an evaluation can produce."""

from ...checks import hides_unknown as hides_unknown
from ...checks import known_options as known_options
from ...checks import unknown_keywords as unknown_keywords
from .comparison import *
from .counts import *
from .inputs import *
from .language_model import *
from .parts import *
from .recipes import *
