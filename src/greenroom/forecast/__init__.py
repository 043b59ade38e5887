"""Answers before running: will it run here, how fast, and why not faster.

>>> print(greenroom.predict("FLUX.1-dev", device="rtx-4090", budget="12GiB"))

A pipeline's call is recorded once, dry on the simulated card or for real on a GPU. Everything else
is computed from the recording: the plan for a budget, and how the plan runs against the clock.
"""

from .forecast import Forecast
from .measured import trace_of
from .prediction import forecast_within, predict, record
from .recording import Recording
from .within import Share, Within

__all__ = [
    "Forecast",
    "Recording",
    "Share",
    "Within",
    "forecast_within",
    "predict",
    "record",
    "trace_of",
]
