"""Train an image classifier on any number of devices, with the same result on each."""

__version__ = "0.1.0"
