"""greenroom runs PyTorch pipelines of several models on accelerators too small to hold them all:
weights wait in host memory, the green room, and are on the device only while they are needed.
"""

__all__ = ["__version__"]

__version__ = "0.1.0.dev0"
