"""Each private name of torch and Triton: it is there in the tested versions, and without it the same is computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor, nn
from torch.autograd import forward_ad
from triton.compiler import CompiledKernel

from tests.launches import recorded
from tests.parity import random
from tritonbn import dispatch, launch, private
from tritonbn.functional import batch_norm

NAMES = [
    "torch:_C._len_torch_dispatch_stack", "torch:_C._functorch.is_functorch_wrapped_tensor",
    "torch:_C._are_functorch_transforms_active", "torch:_C._dynamo.guards.TensorGuards",
    "torch.autograd.forward_ad:_current_level", "torch:_C._AutoDispatchBelowAutograd", "torch.jit:is_tracing",
    "torch:_prims_common.suggest_memory_format", "torch.autograd.grad_mode:_unsafe_preserve_version_counter",
    "torch.compiler:_is_exporting_flag", "triton:knobs.runtime", "triton:knobs.compilation",
    "torch.nn.modules.module:_has_any_global_hook",
    "torch:_C._current_graph_task_id", "torch.utils._pytree:tree_leaves", "torch._compile:_disable_dynamo",
]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_the_tested_versions_have_it(name: str) -> None:
    missing = object()
    assert private.find(name, missing, "") is not missing


def test_what_is_missing_is_told_with_what_it_costs() -> None:
    with pytest.warns(UserWarning, match=r"tritonbn: torch._C._gone is missing in version .*: 3x slower"):
        assert private.find("torch:_C._gone", 5, "3x slower") == 5
    with pytest.warns(UserWarning, match=rf"triton.gone.x is missing in version {triton.__version__}"):
        assert private.find("triton.gone:x", None, "slower") is None


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "_told", set())


def gradients(device: torch.device) -> list[Tensor]:
    """Of a call whose input and running statistics are strided; and these."""
    x = random(5, 6, 4, 3).to(device).transpose(0, 1).requires_grad_()
    mean, var = torch.zeros(10, device=device).double()[::2], torch.ones(10, device=device).double()[::2]
    y = batch_norm(x, mean, var, torch.ones(5, device=device).double(), None, True, activation="silu")
    return [y.detach(), *torch.autograd.grad(y.square().sum(), x), mean, var]


def broken(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("another constructor")


WITHOUT: dict[str, tuple[str, Any, bool]] = {  # what is in its place, and whether the kernels still run
    "modes": ("dispatch_modes", lambda: 1, True),
    "transformed": ("is_transformed", lambda t: True, False),
    "transforms": ("transforms_active", lambda: True, False),
    "tracing": ("is_tracing", lambda: True, False),
    "guards": ("_guards", None, True),
    "guards-of-another-make": ("_guards", broken, True),
    "memory-format": ("_suggested", None, True),
    "versions": ("_keep_version", None, True),
    "exporting": ("_exporting", None, True),
    "knobs": ("_knobs", None, True),
    "below-autograd": ("below_autograd", None, True),
}


@pytest.mark.filterwarnings("ignore:tritonbn")
@pytest.mark.parametrize(("name", "value", "ours"), WITHOUT.values(), ids=WITHOUT)
def test_without_it_the_same_is_computed(
    name: str, value: Any, ours: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients(device)
    dispatch.forget_calls()
    monkeypatch.setattr(private, name, value)
    with recorded() as kernels:
        found = gradients(device)
    assert bool(kernels) == (ours and (launch.INTERPRETED or device.type == "cuda"))
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("error")
def test_guards_of_another_make_are_told_of_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu" and not launch.INTERPRETED:
        pytest.skip("torch computes")
    monkeypatch.setattr(private, "_guards", broken)
    with pytest.warns(UserWarning, match="calls are not recognized, each looks at its tensors anew, 3x slower"):
        gradients(device)
    gradients(device)


def test_forward_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not private.forward_derivatives()
    with forward_ad.dual_level():
        assert private.forward_derivatives()
    monkeypatch.delattr(forward_ad, "_current_level")
    assert private.forward_derivatives(), "unknown: torch computes"


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x, "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "gapped": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, ::2], "transposed": lambda x: x.mT,
    "slice": lambda x: x[:, ::2], "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "samples-last": lambda x: x.permute(1, 2, 3, 0),
}  # fmt: skip


@pytest.mark.parametrize("arrange", STRIDES.values(), ids=STRIDES)
def test_memory_formats(arrange: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x = arrange(torch.randn(4, 6, 4, 8))
    expected = private.memory_format(x)
    monkeypatch.setattr(private, "_suggested", None)
    assert private.memory_format(x) == expected


def test_copies_without_version(monkeypatch: pytest.MonkeyPatch) -> None:
    to, source = torch.zeros(3), torch.ones(3)
    private.copy_without_version(to, source)
    assert (to.tolist(), to._version) == ([1.0] * 3, 0)
    monkeypatch.setattr(private, "_keep_version", None)
    private.copy_without_version(to, source + 1)
    assert (to.tolist(), to._version) == ([2.0] * 3, 1)


def test_apply_is_that_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return 2 * dy

    x = torch.ones(3, requires_grad=True)
    for apply in (private.apply_of(Double), Double.apply):
        (dx,) = torch.autograd.grad(apply(x).sum(), x)
        assert dx.tolist() == [2.0] * 3


def test_hooks_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Callable[[nn.Module], Any]] = [
        lambda m: m.register_forward_hook(print), lambda m: m.register_forward_pre_hook(print),
        lambda m: m.register_full_backward_hook(print), lambda m: m.register_full_backward_pre_hook(print),
        lambda m: nn.modules.module.register_module_forward_hook(print),
    ]  # fmt: skip
    module = nn.ReLU()
    assert not private.has_hooks(module)
    for register in registered:
        handle = register(module)
        assert private.has_hooks(module)
        handle.remove()
    assert not private.has_hooks(module)
    del module.__dict__["_forward_hooks"]
    assert private.has_hooks(module), "unknown: nothing is fused"
    monkeypatch.setattr(private, "_global_hooks", lambda: True)
    assert private.has_hooks(nn.ReLU())


def test_backward_and_leaves(device: torch.device) -> None:
    seen = []
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda g: seen.append(private.is_backward()))  # type: ignore[no-untyped-call]
    (2 * x).sum().backward()  # type: ignore[no-untyped-call]
    assert (seen, private.is_backward()) == ([True], False)
    tree = {"a": [1, (2, 3)], "b": {"c": 4}, "d": None}
    assert private._leaves(tree) == [1, 2, 3, 4, None]
    assert private.tree_leaves({"a": [1, (2, 3)], "b": {"c": 4}}) == [1, 2, 3, 4]


def test_no_graph_is_captured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert private.capturing_graph() is None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)  # torch 2.11
    assert private.capturing_graph() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs, streams")
def test_graph_and_stream_of_a_gpu() -> None:
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.graph(graph, stream=stream):
        found = private.capturing_graph()
        assert private.raw_stream(0) == stream.cuda_stream
    assert found is (graph if hasattr(torch.cuda.CUDAGraph, "get_currently_capturing_graph") else None)


def test_compiled_kernels_of_another_make_are_not_launched_by_us(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = object.__new__(CompiledKernel)
    kernel.function = 5
    assert private.is_launchable(kernel)
    kernel.function = None
    assert not private.is_launchable(kernel)
    assert not private.is_launchable(object())
    assert private.is_kept_launch_tested()
    monkeypatch.setattr(private, "_knobs", None)
    assert not private.is_kept_launch_tested()


def test_export_is_seen(device: torch.device) -> None:
    """What is exported must run where we are not installed."""
    program = torch.export.export(Ours(), (torch.randn(4, 3, device=device),))
    assert not [node for node in program.graph.nodes if "tritonbn" in str(node.target)]


class Ours(nn.Module):
    """Ours, on the CPU or in the interpreter."""

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(x, None, None, training=True)
