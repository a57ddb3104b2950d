"""Model extraction attacks: from a callable that answers queries to a trained copy.

Every attack takes the API (a callable), a pool of inputs and a factory for the surrogate, and gives an
`Extraction`: the surrogate with the record of what was asked and answered.
"""

from honeytrace.extraction.interface import Api, Extraction, agreement, api, ask, fidelity, predicted_labels
from honeytrace.extraction.outliers import worst_dropped
from honeytrace.extraction.random_queries import random_queries

__all__ = [
    "Api",
    "Extraction",
    "agreement",
    "api",
    "ask",
    "fidelity",
    "predicted_labels",
    "random_queries",
    "worst_dropped",
]
