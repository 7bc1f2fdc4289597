"""The version, in one place: the build reads it from here, so does `mlxsup --version`."""

__version__ = "0.1.0"
