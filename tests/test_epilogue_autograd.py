"""What the fused operation saves, its derivatives of both orders, and residuals of all kinds."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import tritonbn
from tests.cases import Layout
from tests.launches import recorded
from tritonbn import reference
from tritonbn.activations import NAMES, resolve
from tritonbn.functional import batch_norm
from tritonbn.plan import forced

ALL = [*NAMES, "leaky_relu(0.3)", "elu(0.5)", "softplus(2.0, 1.5)"]
INVERTIBLE = ["identity", "leaky_relu(0.2)", "elu", "elu(0.5)"]
BITS = ["relu", "relu6", "leaky_relu(0.3)", "hardsigmoid"]
PATHS = ["single", "split"]
SAVES: tuple[Any, ...] = ("output", "input")
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def random(*shape: int, seed: int = 0, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def arguments(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, weight, bias, residual; all want gradients."""
    x, residual = (random(*shape, seed=seed, device=device, dtype=dtype) for seed in (0, 1))
    own = torch.float32 if dtype.itemsize == 2 else dtype
    weight, bias = (random(shape[1], seed=seed, device=device).abs().add(0.5).to(own) for seed in (2, 3))
    return [t.requires_grad_() for t in (x, weight, bias, residual)]


def call(training: bool, **options: Any) -> Callable[..., Tensor]:
    """The function of x, weight, bias and residual, with statistics of its own."""

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        mean, var = (torch.linspace(low, 2, x.shape[1], device=x.device, dtype=x.dtype) for low in (-1, 1))
        return batch_norm(x, mean, var, weight, bias, training, eps=1e-3, residual=residual, **options)

    return function


def saved_by(function: Callable[[], Tensor]) -> list[Tensor]:
    """The tensors that autograd keeps for the backward of `function()`."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        function()
    return kept


LAYOUTS = [
    pytest.param(Layout((8, 16)), id="rows"),
    pytest.param(Layout((9, 100)), id="rows-ragged"),
    pytest.param(Layout((3, 16, 7, 7)), id="7x7"),
    pytest.param(Layout((2, 3, 8, 16)), id="planes"),
    pytest.param(Layout((2, 16, 3, 3), torch.channels_last), id="channels-last"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_residual_only_x_and_vectors_are_saved(
    layout: Layout, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, bias, _ = arguments(layout.shape, device, dtype)
    x = layout.arrange(x.detach()).requires_grad_()
    with recorded() as kernels:
        kept = saved_by(lambda: batch_norm(x, None, None, weight, bias, True, activation=name))
    assert kernels
    full = [t for t in kept if t.numel() > layout.shape[1]]
    assert [t.data_ptr() for t in full] == [x.data_ptr()], "x itself and nothing else"


@in_both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_residual_and_relu_save_one_bit_per_element(
    layout: Layout, dtype: torch.dtype, training: bool, device: torch.device
) -> None:
    x, weight, bias, residual = arguments(layout.shape, device, dtype)
    x, residual = (layout.arrange(t.detach()).requires_grad_() for t in (x, residual))
    statistics = torch.zeros(layout.shape[1], device=device), torch.ones(layout.shape[1], device=device)
    for name in BITS:
        relu = partial(batch_norm, activation=name, residual=residual)
        kept = saved_by(partial(relu, x, *statistics, weight, bias, training))
        full = [t for t in kept if t.numel() > layout.shape[1] and t.dtype != torch.uint8]
        (bits,) = [t for t in kept if t.dtype == torch.uint8]
        assert [t.data_ptr() for t in full] == [x.data_ptr()]
        rows_end_inside_a_byte = layout.shape == (9, 100)
        assert bits.numel() == (9 * 104 if rows_end_inside_a_byte else x.numel()) // 8


@pytest.mark.parametrize("name", ["silu", "gelu", "hardswish", "softplus"])
def test_a_residual_and_a_smooth_activation_save_a_reference_to_it(name: str, device: torch.device) -> None:
    x, weight, bias, residual = arguments((2, 3, 8, 16), device)
    kept = saved_by(lambda: batch_norm(x, None, None, weight, bias, True, activation=name, residual=residual))
    full = {t.data_ptr() for t in kept if t.numel() > 3}
    assert full == {x.data_ptr(), residual.data_ptr()}


def test_addition_alone_saves_neither_residual_nor_bits(device: torch.device) -> None:
    x, weight, bias, residual = arguments((2, 3, 8, 16), device)
    kept = saved_by(lambda: batch_norm(x, None, None, weight, bias, True, residual=residual))
    assert [t.data_ptr() for t in kept if t.numel() > 3] == [x.data_ptr()]


def test_nothing_is_saved_without_gradients(device: torch.device) -> None:
    x, weight, bias, residual = arguments((2, 3, 8, 16), device)
    with torch.no_grad():
        assert not saved_by(lambda: batch_norm(x, None, None, weight, bias, True, activation="relu", residual=residual))


@pytest.mark.parametrize("path", PATHS)
@in_both_modes
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name: str, residual: bool, training: bool, path: Any, device: torch.device) -> None:
    """First and second derivative in float64 against finite differences; no z is next to a jump here."""
    given = arguments((5, 3), device)[: 4 if residual else 3]
    with forced(path, splits=2):
        assert torch.autograd.gradcheck(call(training, activation=name), given, fast_mode=name not in ("relu", "silu"))
        assert torch.autograd.gradgradcheck(call(training, activation=name), given, fast_mode=True)


@pytest.mark.parametrize("path", PATHS)
@in_both_modes
@pytest.mark.parametrize("layout", [Layout((2, 2, 3, 3)), Layout((2, 9, 2, 2), torch.channels_last)], ids=str)
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_gradcheck_of_planes(name: str, layout: Layout, training: bool, path: Any, device: torch.device) -> None:
    x, weight, bias, residual = arguments(layout.shape, device)
    x, residual = (layout.arrange(t.detach()).requires_grad_() for t in (x, residual))
    with forced(path, splits=2):
        assert torch.autograd.gradcheck(call(training, activation=name), (x, weight, bias, residual), fast_mode=True)


WANTED = [(x, w, z) for x in (True, False) for w in (True, False) for z in (True, False) if x or w or z]


@pytest.mark.parametrize("path", PATHS)
@in_both_modes
@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("name", ["relu", "silu", "identity"])
def test_any_subset_of_gradients(
    name: str, wanted: tuple[bool, bool, bool], training: bool, path: Any, device: torch.device
) -> None:
    """Not only x, the parameters or the residual may want none; no kernel runs for what nobody wants."""
    given = arguments((6, 3, 5), device)
    for tensor, want in zip(given, (wanted[0], wanted[1], wanted[1], wanted[2]), strict=True):
        tensor.requires_grad_(want)
    leaves = [t for t in given if t.requires_grad]
    dy = random(6, 3, 5, seed=7, device=device)
    mean, var = (torch.linspace(low, 2, 3, device=device).double() for low in (-1, 1))
    x, weight, bias, residual = given
    exact = reference.batch_norm(x, mean, var, weight, bias, training, 1e-3, resolve(name), residual)
    with forced(path, splits=2):
        y = call(training, activation=name)(*given)
        with recorded() as kernels:
            found = torch.autograd.grad(y, leaves, dy)
    assert len(kernels) <= (2 if wanted[0] and training else 1)
    if wanted == (False, False, True) and name == "identity":
        assert not kernels
    for mine, true in zip(found, torch.autograd.grad(exact, leaves, dy), strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("name", ["relu", "silu", "identity"])
def test_residuals_of_all_kinds(name: str, device: torch.device) -> None:
    """The same tensor as x, one that wants no gradient, a strided one, one in the other memory format."""
    x, weight, bias, other = arguments((2, 3, 4, 4), device)
    kinds: dict[str, Callable[[], Tensor]] = {
        "x itself": lambda: x,
        "no gradient": lambda: other.detach(),
        "strided": lambda: other.transpose(2, 3),
        "channels last": lambda: other.contiguous(memory_format=torch.channels_last),
        "negated": lambda: torch._neg_view(other),
        "expanded": lambda: other[:1].expand(2, -1, -1, -1),
    }
    dy = random(2, 3, 4, 4, seed=5, device=device)
    for kind, make in kinds.items():
        leaves = [x, weight, bias] + ([other] if kind not in ("x itself", "no gradient") else [])
        y = batch_norm(x, None, None, weight, bias, True, eps=1e-3, activation=name, residual=make())
        true = resolve(name).apply(nn.functional.batch_norm(x, None, None, weight, bias, True, eps=1e-3) + make())
        torch.testing.assert_close(y, true, msg=kind)
        assert y.stride() == x.stride()
        for mine, theirs in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(true, leaves, dy), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_downsampling_block(device: torch.device) -> None:
    """relu(bn1(x1) + bn2(x2)): the second one plain, the first one with it as its residual."""
    x1, weight, bias, x2 = arguments((3, 4, 5, 5), device)
    leaves = [x1, x2, weight, bias]
    with recorded() as kernels:
        second = batch_norm(x2, None, None, weight, bias, True)
        y = batch_norm(x1, None, None, weight, bias, True, activation="relu", residual=second)
        found = torch.autograd.grad(y.square().sum(), leaves)
    assert len(kernels) <= 8
    plain = nn.functional.batch_norm
    true = (plain(x1, None, None, weight, bias, True) + plain(x2, None, None, weight, bias, True)).relu()
    torch.testing.assert_close(y, true)
    for mine, theirs in zip(found, torch.autograd.grad(true.square().sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_modes_and_second_derivatives_of_the_operator(name: str, device: torch.device) -> None:
    """Under a dispatch mode the operation is a torch.library operator; its results are the eager ones."""
    given = arguments((6, 3), device)

    def second() -> tuple[Tensor, ...]:
        x, weight, bias, residual = given
        y = batch_norm(x, None, None, weight, bias, True, activation=name, residual=residual)
        first = torch.autograd.grad(y.pow(3).sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), given)  # type: ignore[arg-type]

    expected = second()
    with FlopCounterMode(display=False):
        found = second()
    for mine, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["relu", "silu", "identity"])
def test_compiled(name: str, dynamic: bool, device: torch.device) -> None:
    torch.compiler.reset()  # dynamo counts the recompilations of all tests together
    module = tritonbn.BatchNormAct1d(3, name).to(device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (6, 9):
        x, _, _, residual = arguments((rows, 3), device, torch.float32)
        with recorded() as kernels:
            y = compiled(x, residual)
            found = torch.autograd.grad(y.square().sum(), [x, residual])
        assert {"input_gradient_kernel", "backward_kernel"} & set(kernels)
        true = module(x, residual)
        torch.testing.assert_close(y, true)
        for mine, eager in zip(found, torch.autograd.grad(true.square().sum(), [x, residual]), strict=True):
            torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"activation": "rellu"}, ValueError, "activation must be one of identity, relu, .* but got 'rellu'"),
        ({"activation": nn.PReLU()}, ValueError, "activation must be one of .* but got PReLU"),
        ({"activation": torch.sin}, ValueError, "activation must be one of .* but got <built-in method sin"),
        ({"activation": 3}, TypeError, "activation must be a name, a torch module or function, but got int"),
        ({"residual": torch.ones(1, 4)}, ValueError, r"shape of the input, torch.Size\(\[16, 4\]\), but got .*\[1, 4"),
        ({"residual": torch.ones(4)}, ValueError, "residual should have the shape of the input"),
        ({"residual": 1.0}, TypeError, "residual must be a Tensor or None, but got float"),
        ({"activation": "softplus(0.0)"}, ValueError, "activation must be one of .* but got 'softplus"),
        (
            {"residual": torch.ones(16, 4).half()},
            ValueError,
            "dtype of the input, torch.float.., but got torch.*16",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], text: str, device: torch.device) -> None:
    """A clear error, before a statistic is touched."""
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    with pytest.raises(error, match=text):
        batch_norm(torch.randn(16, 4, device=device), mean, var, training=True, **options)
    assert not mean.any()
    assert torch.equal(var, torch.ones_like(var))


@pytest.mark.parametrize("elsewhere", [False, True], ids=["kernels", "torch"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param(Tensor.float, "the dtype of the input, torch.bfloat16, but got torch.float32", id="dtype"),
        pytest.param(lambda r: r.to("meta"), "the device of the input, .*, but got meta", id="device"),
    ],
)
def test_residuals_of_another_dtype_or_device(
    change: Callable[[Tensor], Tensor], text: str, elsewhere: bool, device: torch.device
) -> None:
    """A clear error, whoever computes: torch's result would be of another dtype than the input."""
    x = torch.randn(16, 4, device=device).bfloat16()
    x = x.as_subclass(nn.Buffer) if elsewhere else x
    module = tritonbn.BatchNormAct1d(4).to(device)
    for call in (partial(batch_norm, x, None, None, training=True, residual=change(x)), partial(module, x, change(x))):
        with pytest.raises(ValueError, match=f"residual should have {text}"):
            call()
    assert module.num_batches_tracked is not None
    assert module.num_batches_tracked.item() == 0, "what is rejected is not counted"


ONES = ["relu", nn.ReLU(inplace=True), nn.ReLU, torch.relu, torch.relu_, nn.functional.relu, Tensor.relu]


@pytest.mark.parametrize("spelling", ONES, ids=range(len(ONES)))
def test_an_activation_has_many_names(spelling: Any, device: torch.device) -> None:
    x = torch.randn(16, 4, device=device)
    expected = batch_norm(x, None, None, training=True, activation="relu")
    assert torch.equal(batch_norm(x, None, None, training=True, activation=spelling), expected)


def test_bits_do_not_depend_on_how_the_work_is_split(device: torch.device) -> None:
    """The forward may have run on another plan than the backward."""
    x, weight, bias, residual = arguments((40, 7), device, torch.float32)
    results = []
    for path, splits in (("single", None), ("split", 1), ("split", 5)):
        with forced(path, splits):  # type: ignore[arg-type]
            y = batch_norm(x, None, None, weight, bias, True, activation="relu", residual=residual)
        with forced("split", 3):
            results.append(torch.autograd.grad(y.sum(), residual)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_a_hook_may_repack_what_is_saved(name: str, device: torch.device) -> None:
    """Bits follow the layout that x had; a hook that packs it densely changes its strides."""
    x, weight, bias, residual = arguments((2, 5, 3, 4), device)
    x, residual = (t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, residual))

    def gradients() -> tuple[Tensor, ...]:
        y = batch_norm(x, None, None, weight, bias, True, activation=name, residual=residual)
        return torch.autograd.grad(y.square().sum(), [x, weight, bias, residual])

    expected = gradients()
    with saved_tensors_hooks(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device).copy_(t), lambda t: t):
        found = gradients()
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true)


def test_compiled_training_leaves_the_statistics_without_history(device: torch.device) -> None:
    torch.compiler.reset()
    module = tritonbn.BatchNormAct1d(3).to(device)
    eager = tritonbn.BatchNormAct1d(3).to(device)
    compiled = torch.compile(module, backend="aot_eager", dynamic=True)
    for rows in (6, 9):
        x, _, _, residual = arguments((rows, 3), device, torch.float32)
        torch.autograd.backward(compiled(x, residual).sum())
        eager(x, residual)
        for mine, true in zip(module.buffers(), eager.buffers(), strict=True):
            assert not mine.requires_grad
            torch.testing.assert_close(mine, true)


def test_inference_tensors_that_would_have_to_be_saved(device: torch.device) -> None:
    """torch's error, before the statistics are written."""
    with torch.inference_mode():
        x = torch.randn(8, 3, device=device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        batch_norm(x, mean, var, torch.ones(3, device=device, requires_grad=True), None, True, activation="relu")
    assert not mean.any()


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_second_derivatives_can_be_traced(name: str, device: torch.device) -> None:
    """Under a tracing mode the operators are all there is: no kernel may be launched on tensors without memory."""
    given = arguments((6, 3), device)

    def second(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias, residual = tensors
        y = batch_norm(x, None, None, weight, bias, True, activation=name, residual=residual)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, weight, residual])

    traced = make_fx(second)(*given)
    for mine, eager in zip(traced(*given), second(*given), strict=True):
        torch.testing.assert_close(mine, eager)
