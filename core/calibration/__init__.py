"""What strategies learn from a text: statistics, codebooks, and the artifact that holds them."""

from .artifact import Calibration, Evidence, Recipe, Record
from .codebooks import fitted_tables, normalised_tables
from .kmeans import lloyd_max, normal_float
from .statistics import Statistics, Weights
from .strategy import CalibratedStrategy

__all__ = [
    "CalibratedStrategy",
    "Calibration",
    "Evidence",
    "Recipe",
    "Record",
    "Statistics",
    "Weights",
    "fitted_tables",
    "lloyd_max",
    "normal_float",
    "normalised_tables",
]
