"""Every name of torch and Triton that the library uses and that neither promises to keep, each with a way without it.

A name that is gone in another version is told of once, when the library is imported, with what is slower then. Where
only torch's own batch norm is sure to be right without it, torch computes. `tests/test_private.py` has a test of each.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

# Versions whose launcher was seen to take what `handles.py` gives it; of others Triton's own launch is taken.
TESTED_TRITON = ("3.6", "3.7")


def find(path: str, otherwise: Any, without: str) -> Any:
    """What the dotted path names, else `otherwise` with a warning; without: what happens then."""
    module, _, names = path.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for name in names.split("."):
            value = getattr(value, name)
    except (ImportError, AttributeError):
        version = triton.__version__ if path.startswith("triton") else torch.__version__
        warnings.warn(f"tritonbn: {path.replace(':', '.')} is missing in version {version}: {without}", stacklevel=2)
        return otherwise
    return value


def _one() -> int:
    return 1


def _yes(*_: Any) -> bool:
    return True


# Modes that see each operation, as FakeTensorMode: how many there are.
dispatch_modes = find("torch:_C._len_torch_dispatch_stack", _one, "eager calls go through operators, some 20 us slower")
is_transformed = find("torch:_C._functorch.is_functorch_wrapped_tensor", _yes, "torch computes batch norm")
transforms_active = find("torch:_C._are_functorch_transforms_active", _yes, "torch computes batch norm")
_guards: Any = find(
    "torch:_C._dynamo.guards.TensorGuards", None, "calls are not recognized, each looks at its tensors anew: 3x slower"
)
_forward_ad = torch.autograd.forward_ad
find("torch.autograd.forward_ad:_current_level", None, "torch computes batch norm")
below_autograd = find(
    "torch:_C._AutoDispatchBelowAutograd", None, "torch computes batch norm in compiled code and under dispatch modes"
)
is_tracing = find("torch.jit:is_tracing", _yes, "torch computes batch norm")
untraced = find("torch._compile:_disable_dynamo", lambda run: run, "torch.compile looks into operators, in vain")
_suggested = find("torch:_prims_common.suggest_memory_format", None, "strided inputs are looked at more slowly")
_keep_version = find(
    "torch.autograd.grad_mode:_unsafe_preserve_version_counter", None,
    "updates of strided running statistics count as changes in place",
)  # fmt: skip
_raw_stream: Any = torch.version.cuda and find(
    "torch:_C._cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream,
    "a microsecond per call",
)  # fmt: skip
_global_hooks = find("torch.nn.modules.module:_has_any_global_hook", _yes, "nothing is fused in models")
_task = find("torch:_C._current_graph_task_id", lambda: -1, "recalibrate counts what checkpoints compute again")
_exporting = find("torch.compiler:_is_exporting_flag", None, "exported programs may need tritonbn installed")
_knobs = find("triton:knobs.runtime", None, "kernels are launched by Triton, some 8 us slower each")
_compilation = find("triton:knobs.compilation", None, "kernels are launched by Triton, some 8 us slower each")


def guards(given: Sequence[Tensor]) -> Any:
    """What tells by `check(*tensors)` whether others are in each respect like these; None where torch cannot.

    Type, dtype, device, sizes, strides, requires_grad and whatever makes torch treat them, or this thread, specially.
    """
    if _guards is None:
        return None
    sizes: list[Any] = [list(t.shape) for t in given]
    strides: list[Any] = [list(t.stride()) for t in given]
    try:
        made = _guards(*given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return made if made.check(*given) else None
    except (AttributeError, RuntimeError, SystemError, TypeError) as error:
        tell(f"calls are not recognized, each looks at its tensors anew, 3x slower: {type(error).__name__}: {error}")
        return None


def forward_derivatives() -> bool:
    """Whether a level of forward-mode differentiation is entered."""
    return getattr(_forward_ad, "_current_level", 0) >= 0


def is_exporting() -> bool:
    """Whether torch.export follows what is called: torch.compiler.is_exporting(), True in all compiled code on 2.11."""
    return torch.compiler._is_exporting_flag if _exporting is not None else torch.compiler.is_exporting()


def memory_format(x: Tensor) -> torch.memory_format:
    """The format that torch gives the result of an elementwise operation on x [N, C, ...]."""
    if _suggested is not None:
        found: torch.memory_format = _suggested(x)
        return found
    shape = torch.empty_strided(x.shape, x.stride(), device="meta")
    y = torch.nn.functional.batch_norm(shape, None, None, training=True)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return last if last is not None and y.is_contiguous(memory_format=last) else torch.contiguous_format


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of the module runs hooks of its own or of all modules, or its compiled form; True if unknown."""
    held = module.__dict__
    return bool(
        held.get("_forward_hooks", True)
        or held.get("_forward_pre_hooks", True)
        or held.get("_backward_hooks", True)
        or held.get("_backward_pre_hooks", True)
        or held.get("_compiled_call_impl") is not None
        or _global_hooks()
    )


def is_backward() -> bool:
    """Whether this thread is within a backward pass."""
    return _task() != -1  # type: ignore[no-any-return]


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [leaf for part in tree for leaf in _leaves(part)] if isinstance(tree, list | tuple) else [tree]


tree_leaves = find("torch.utils._pytree:tree_leaves", _leaves, "containers of registered types are not looked into")


def copy_without_version(to: Tensor, source: Tensor) -> None:
    """to.copy_(source), which autograd does not count as a change: torch's update of running statistics is none."""
    with torch.no_grad():
        if to.is_inference() or _keep_version is None:  # has no version, or it cannot be kept
            to.copy_(source)
        else:
            with _keep_version(to):
                to.copy_(source)


def apply_of(function: type[torch.autograd.Function]) -> Any:
    """function.apply, without what it does for torch.func, whose tensors `functional` does not let in."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def raw_stream(device: int) -> int:
    """The stream that the CUDA device works on now, as a number."""
    return int(_raw_stream(device))


def capturing_graph() -> Any:
    """The CUDA graph that is being captured by this thread, on which weak references can be had; None if unknown."""
    try:
        return torch.cuda.CUDAGraph.get_currently_capturing_graph()  # since torch 2.12
    except (AttributeError, RuntimeError):
        return None


def is_kept_launch_tested() -> bool:
    """Whether compiled kernels may be launched by us: this Triton was tested, and has all that is needed."""
    if _knobs is None:
        return False
    version = ".".join(triton.__version__.split(".")[:2])
    if version not in TESTED_TRITON:
        tell(
            f"kernels are launched by Triton, some 8 us slower each: expected one of the tested versions of Triton, "
            f"{', '.join(TESTED_TRITON)}, but got {triton.__version__}"
        )
        return False
    return True


def is_launch_plain() -> bool:
    """Whether Triton's launch would do no more than launch the kernel, compiled as it usually is.

    It would with hooks, as profilers set, and with other settings that are part of its own key.
    """
    try:
        return not (
            _knobs.launch_enter_hook.calls
            or _knobs.launch_exit_hook.calls
            or _knobs.debug
            or _knobs.add_stages_inspection_hook is not None
            or _compilation.instrumentation_mode
        )
    except AttributeError:  # an older Triton, which launches itself anyway
        return False


def is_launchable(compiled: Any) -> bool:
    """Whether Triton's launch returned a compiled kernel of the make that we launch."""
    return isinstance(compiled, CompiledKernel) and isinstance(compiled.function, int)


_told: set[str] = set()


def tell(message: str) -> None:
    """Warn, once for each message."""
    if message not in _told:
        _told.add(message)
        warnings.warn(f"tritonbn: {message}", stacklevel=_outside())


def _outside() -> int:
    """Frames from `tell` to the first that is not of this library."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("tritonbn"):
        level, frame = level + 1, frame.f_back
    return level


__all__ = ["CompiledKernel", "JITFunction", "driver"]
