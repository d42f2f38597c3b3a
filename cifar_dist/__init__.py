"""Train an image classifier on any number of devices, with the same result on each."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "train"]


def __getattr__(name: str) -> Any:
    """Import `train` and `load` when they are used: the package itself stays light."""
    if name == "train":
        import importlib

        return importlib.import_module("cifar_dist.train")
    if name == "load":
        from cifar_dist.predict import load

        return load
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
