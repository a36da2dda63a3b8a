__version__ = "0.1.0"

from . import core  # first of all: it sets what OpenMP reads when torch is imported
