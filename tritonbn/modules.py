"""torch's batch norm modules with our forward; everything else is inherited from torch."""

from typing import cast

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonbn import functional


class _TritonForward(_BatchNorm):
    """The one override the three modules share."""

    def forward(self, input: Tensor) -> Tensor:
        """input: [N, C, ...] float on the module's device -> same shape, dtype and memory format.

        Raises what torch's module raises: ValueError for the number of dimensions or for one value per
        channel in training, RuntimeError for sizes, dtypes and devices that do not go together.
        """
        if (node := _leaf_node(self, input)) is not None:
            return node
        self._check_input_dim(input)  # type: ignore[no-untyped-call]  # torch's
        momentum = self._count_batch()
        use_batch = self.training or (self.running_mean is None and self.running_var is None)
        # In training, buffers that are not tracked must not reach the function: it would update them.
        use_buffers = not self.training or self.track_running_stats
        return functional.batch_norm(
            input,
            self.running_mean if use_buffers else None,
            self.running_var if use_buffers else None,
            self.weight,
            self.bias,
            use_batch,
            momentum,
            self.eps,
        )

    def _count_batch(self) -> float:
        """Advance the counter where torch does; return the weight of this batch in the running statistics."""
        momentum = self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if momentum is None else momentum


def _leaf_node(module: nn.Module, input: object) -> Tensor | None:
    """The call as a node of the graph being traced by torch.fx; None outside of symbolic tracing.

    fx keeps modules defined in torch.nn as leaves and traces into all others, where the dimension check
    would fail on a proxy and the batch counter would advance while tracing instead of while running.
    """
    if not isinstance(input, fx.Proxy) or not isinstance(input.tracer, fx.Tracer):
        return None
    if module is input.tracer.root:  # a root has no call to record: it fails on the proxy, as torch's does
        return None
    path = input.tracer.path_of_module(module)
    return cast(Tensor, input.tracer.create_proxy("call_module", path, (input,), {}))


class BatchNorm1d(_TritonForward, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for [N, C] and [N, C, L] inputs, computed by tritonbn."""


class BatchNorm2d(_TritonForward, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for [N, C, H, W] inputs, computed by tritonbn."""


class BatchNorm3d(_TritonForward, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` for [N, C, D, H, W] inputs, computed by tritonbn."""
