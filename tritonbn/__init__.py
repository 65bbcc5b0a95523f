"""Batch normalization in Triton: a drop-in for torch's, forward and backward."""

from tritonbn import functional
from tritonbn.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from tritonbn.swap import SwapReport, convert, report, revert

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SwapReport",
    "convert",
    "functional",
    "report",
    "revert",
]

__version__ = "0.1.0"
