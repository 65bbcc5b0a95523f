"""timm's batch norm with activation as ours. Imported only where timm is in use; `convert` then knows its type."""

import importlib
from typing import Any

from torch import Tensor, nn

from tritonbn.activations import of_module
from tritonbn.modules import TritonBatchNorm, leaf_node
from tritonbn.types import OURS, TORCHS, WITH_ACTIVATION, is_bare

_Theirs: Any = importlib.import_module("timm.layers.norm_act").BatchNormAct2d


class BatchNormAct2d(TritonBatchNorm, _Theirs):  # type: ignore[misc]  # no types without timm
    """`timm.layers.BatchNormAct2d` for [N, C, H, W] inputs, computed by tritonbn."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """act(drop(batch norm of x)); x: [N, C, H, W] float on the module's device -> same shape and dtype.

        Raises what BatchNorm2d raises.
        """
        if (node := leaf_node(self, x)) is not None:
            return node
        activation = of_module(self.act) if is_bare(self.act) else None
        if activation is not None and type(self.drop) is nn.Identity and is_bare(self.drop):
            return self.normalize(x, activation)
        y: Tensor = self.act(self.drop(self.normalize(x)))
        return y


OURS[_Theirs] = BatchNormAct2d
TORCHS[BatchNormAct2d] = _Theirs
WITH_ACTIVATION.update((_Theirs, BatchNormAct2d))
