"""Batch normalization in Triton: a drop-in for torch's, forward and backward."""

from tritonbn import functional
from tritonbn.calibrating import autotune, calibrate
from tritonbn.explain import explain
from tritonbn.fold import fold
from tritonbn.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from tritonbn.recalibrate import recalibrate
from tritonbn.report import SwapReport, report
from tritonbn.swap import convert, revert
from tritonbn.tuning import tune
from tritonbn.version import __version__ as __version__

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "SwapReport",
    "autotune",
    "calibrate",
    "convert",
    "explain",
    "fold",
    "functional",
    "recalibrate",
    "report",
    "revert",
    "tune",
]
