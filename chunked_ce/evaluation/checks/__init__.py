"""Every message that a mistake in an evaluation can produce."""

from ...checks import hides_unknown as hides_unknown
from ...checks import known_options as known_options
from ...checks import names_unknown as names_unknown
from .comparison import *
from .counts import *
from .inputs import *
from .language_model import *
from .parts import *
from .recipes import *
