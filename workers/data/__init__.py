"""Data: which images, in which order, prepared how; loaded ahead of the step that needs them."""

from workers.data.errors import DataError
from workers.data.loader import Batch, EvalLoader, TrainLoader, normalise
from workers.data.open import OpenedData, open_data

__all__ = ["Batch", "DataError", "EvalLoader", "OpenedData", "TrainLoader", "normalise", "open_data"]
