"""Every message that a mistake in an evaluation can produce."""

from .comparison import *
from .counts import *
from .inputs import *
from .language_model import *
