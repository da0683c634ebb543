"""The version: the only place where it is written (setup.py and CMake read it from here)."""

__version__ = "0.1.0"
