"""The version, which tables of measured plans are kept by."""

__version__ = "0.1.0"
