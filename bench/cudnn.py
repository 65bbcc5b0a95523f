"""cuDNN's switches: enabled, benchmark (it measures its kernels and takes the fastest), allow_tf32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cudnn(**switches: bool) -> Iterator[None]:
    """Within, the switches are as given.

    torch's own context would set precisions too, which not every version lets one set back; and its properties are
    frozen by its test helpers.
    """
    before = {name: getattr(torch._C, f"_get_cudnn_{name}")() for name in switches}
    try:
        for name, value in switches.items():
            getattr(torch._C, f"_set_cudnn_{name}")(value)
        yield
    finally:
        for name, value in before.items():
            getattr(torch._C, f"_set_cudnn_{name}")(value)
