"""Every message that a mistake in an evaluation can produce."""

from .counts import *
from .inputs import *
from .language_model import *
from .parts import *
from .recipes import *
