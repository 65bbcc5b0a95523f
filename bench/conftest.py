"""Without a GPU the benchmarks that `pytest bench/` collects run in Triton's interpreter, on tiny shapes."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined
