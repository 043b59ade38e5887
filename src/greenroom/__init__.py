"""greenroom runs PyTorch pipelines of several models on accelerators too small to hold them all:
weights wait in host memory, the green room, and are on the device only while they are needed.

>>> import greenroom
>>> greenroom.enable_model_cpu_offload(pipe)
>>> image = pipe("a red circle above a blue square").images[0]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import observe
    from .drop_in import install, uninstall
    from .errors import (
        BudgetTooSmall,
        DeviceOutOfMemory,
        GreenroomError,
        NoAcceleratorError,
        UsageError,
        WeightsError,
    )
    from .forecast import Forecast, Recording, predict, trace_of
    from .observe import Report, report
    from .pipeline import (
        OffloadMixin,
        disable_model_cpu_offload,
        enable_model_cpu_offload,
        offload_now,
    )

__all__ = [
    "BudgetTooSmall",
    "DeviceOutOfMemory",
    "Forecast",
    "GreenroomError",
    "NoAcceleratorError",
    "OffloadMixin",
    "Recording",
    "Report",
    "UsageError",
    "WeightsError",
    "__version__",
    "disable_model_cpu_offload",
    "enable_model_cpu_offload",
    "install",
    "observe",
    "offload_now",
    "predict",
    "report",
    "trace_of",
    "uninstall",
]

__version__ = "0.1.0.dev0"

_HOMES = {
    "BudgetTooSmall": "errors",
    "DeviceOutOfMemory": "errors",
    "Forecast": "forecast",
    "GreenroomError": "errors",
    "NoAcceleratorError": "errors",
    "Recording": "forecast",
    "Report": "observe",
    "UsageError": "errors",
    "WeightsError": "errors",
    "install": "drop_in",
    "predict": "forecast",
    "report": "observe",
    "trace_of": "forecast",
    "uninstall": "drop_in",
}


def __getattr__(name: str) -> Any:
    # torch and accelerate take seconds to import; `greenroom --help` should not wait for them.
    if name not in __all__:
        raise AttributeError(f"module 'greenroom' has no attribute {name!r}")
    from importlib import import_module

    if name == "observe":
        return import_module(".observe", __name__)
    return getattr(import_module(f".{_HOMES.get(name, 'pipeline')}", __name__), name)
