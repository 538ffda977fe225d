"""recsys: train, compare, shrink and serve recommender and click-through-rate models."""

__version__ = "0.1.0"
