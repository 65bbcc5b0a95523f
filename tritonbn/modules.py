"""torch's batch norm modules with our forward; everything else is inherited from torch."""

from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonbn import functional
from tritonbn.activations import IDENTITY, ActivationLike, resolve


class TritonBatchNorm(_BatchNorm):
    """What our modules share: torch's module with one override, and the same with an epilogue."""

    def forward(self, input: Tensor) -> Tensor:
        """input: [N, C, ...] float on the module's device -> same shape, dtype and memory format.

        Raises what torch's module raises: ValueError for the number of dimensions or for one value per
        channel in training, RuntimeError for sizes, dtypes and devices that do not go together.
        """
        if (node := leaf_node(self, input)) is not None:
            return node
        return self.normalize(input)

    def normalize(
        self, input: Tensor, activation: ActivationLike | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """activation(batch norm of input + residual) with this module's parameters, statistics, counter and mode."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]  # torch's
        resolved = IDENTITY if activation is None else resolve(activation)
        mean, var, weight, bias, counter, use_batch = self._state()
        return functional.normalize(
            input, mean, var, weight, bias, use_batch, self.momentum, self.eps, resolved, residual, counter
        )

    def normalize_add(
        self, input: Tensor, norm: "TritonBatchNorm", other: Tensor, activation: ActivationLike | None = None
    ) -> Tensor:
        """activation(batch norm of input + norm's batch norm of other), in one operation where both are in one mode."""
        for module, x in ((self, input), (norm, other)):
            module._check_input_dim(x)  # type: ignore[no-untyped-call]  # torch's
        resolved = IDENTITY if activation is None else resolve(activation)
        mean, var, weight, bias, counter, use_batch = self._state()
        other_mean, other_var, other_weight, other_bias, other_counter, other_use_batch = norm._state()
        if use_batch != other_use_batch:
            return self.normalize(input, resolved, norm.normalize(other))
        return functional.normalize_add(
            (input, mean, var, weight, bias, None, counter),
            (other, other_mean, other_var, other_weight, other_bias, None, other_counter),
            use_batch, (self.momentum, norm.momentum), (self.eps, norm.eps), resolved,
        )  # fmt: skip

    def _state(self) -> tuple[Any, Any, Any, Any, Any, bool]:
        """(running_mean, running_var, weight, bias, counter, whether to use the batch's statistics) of a call now."""
        try:  # attributes of modules are slow
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            mean, var = self._buffers["running_mean"], self._buffers["running_var"]
            counter = self._buffers["num_batches_tracked"]
        except KeyError:  # parametrized, or something else in their place
            weight, bias, counter = self.weight, self.bias, self.num_batches_tracked
            mean, var = self.running_mean, self.running_var
        training = self.training
        use_batch = training or (mean is None and var is None)
        if not training:
            counter = None
        elif not self.track_running_stats:  # the function would update what is not tracked
            mean = var = counter = None
        return mean, var, weight, bias, counter, use_batch


def leaf_node(module: nn.Module, *inputs: object) -> Tensor | None:
    """The call as a node of the graph being traced by torch.fx; None outside of symbolic tracing.

    fx keeps modules defined in torch.nn as leaves and traces into all others, where the dimension check
    would fail on a proxy and the batch counter would advance while tracing instead of while running.
    """
    input = inputs[0]
    if not isinstance(input, fx.Proxy) or not isinstance(input.tracer, fx.Tracer):
        return None
    if module is input.tracer.root:  # a root has no call to record: it fails on the proxy, as torch's does
        return None
    path = input.tracer.path_of_module(module)
    return cast(Tensor, input.tracer.create_proxy("call_module", path, inputs, {}))


class BatchNorm1d(TritonBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for [N, C] and [N, C, L] inputs, computed by tritonbn."""


class BatchNorm2d(TritonBatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for [N, C, H, W] inputs, computed by tritonbn."""


class BatchNorm3d(TritonBatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` for [N, C, D, H, W] inputs, computed by tritonbn."""


class _BatchNormAct(TritonBatchNorm):
    """The constructor and the forward that the three modules with an epilogue share."""

    def __init__(
        self,
        num_features: int,
        activation: ActivationLike | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        resolved = resolve(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.activation: ActivationLike | None = resolved

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input, residual: [N, C, ...] float of one shape -> same shape, input's dtype and memory format.

        Raises what the module without activation raises, and ValueError for a residual of another shape.
        """
        if (node := leaf_node(self, input, *(() if residual is None else (residual,)))) is not None:
            return node
        return self.normalize(input, self.activation, residual)

    def extra_repr(self) -> str:
        """torch's, then the activation."""
        inherited = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{inherited}, activation={resolve(self.activation)}"


class BatchNormAct1d(_BatchNormAct, BatchNorm1d):
    """activation(BatchNorm1d(x) + residual) in one operation, forward and backward; `state_dict` as BatchNorm1d's.

    activation: a name such as "relu" or "leaky_relu(0.2)", a torch module or function. The rest as in
    `torch.nn.BatchNorm1d`; but `torch.nn.SyncBatchNorm.convert_sync_batchnorm` takes it for one, and its activation and
    residual are lost.
    Raises ValueError for an activation that cannot be fused.
    """


class BatchNormAct2d(_BatchNormAct, BatchNorm2d):
    """activation(BatchNorm2d(x) + residual) in one operation, forward and backward; `state_dict` as BatchNorm2d's.

    Arguments and errors as `BatchNormAct1d`.
    """


class BatchNormAct3d(_BatchNormAct, BatchNorm3d):
    """activation(BatchNorm3d(x) + residual) in one operation, forward and backward; `state_dict` as BatchNorm3d's.

    Arguments and errors as `BatchNormAct1d`.
    """
