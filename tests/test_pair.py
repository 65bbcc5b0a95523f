"""The sum of two batch norms in one pass: values, gradients, what is saved, errors, and models that are converted."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import tritonbn
from bench.networks.resnet import resnet18, resnet50
from tests import cases
from tests.cases import Layout
from tests.closeness import Distance, assert_as_good_as_torch, distance, wide
from tests.fusing import fused_in, net
from tests.launches import recorded
from tests.parity import raised_by
from tests.test_traffic import LAYOUTS as TRAFFIC
from tests.test_traffic import agrees, counted
from tritonbn import functional, launch, pair_launch, planning
from tritonbn.activations import IDENTITY, resolve
from tritonbn.functional import batch_norm_add
from tritonbn.pair_launch import Kept, Norm
from tritonbn.plan import forced
from tritonbn.traffic import PairOperands, pair_bytes

TENSORS = ("input", "weight", "bias", "other", "other_weight", "other_bias")
STATISTICS = ("running_mean", "running_var", "other_running_mean", "other_running_var")
PATHS: tuple[Any, ...] = "single", "split"
EPS, OTHER_EPS, MOMENTUM, OTHER_MOMENTUM = 1e-5, 1e-3, 0.1, 0.3
SPLIT = ["statistics_kernel", "statistics_kernel", "pair_normalize_kernel", "pair_sums_kernel", "pair_gradient_kernel"]
SINGLE = ["pair_forward_kernel", "pair_backward_kernel"]
interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter")


def drawn(layout: Layout, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a call, and dy."""
    g = torch.Generator().manual_seed(seed)
    own = torch.float32 if dtype.itemsize == 2 else dtype
    found: dict[str, Tensor] = {}
    for name in (*TENSORS, *STATISTICS, "dy"):
        full = name in ("input", "other", "dy")
        t = torch.randn(layout.shape if full else layout.shape[1:2], generator=g, dtype=torch.float64)
        t = t.abs() + 0.5 if name.endswith(("weight", "var")) else t * 1.5 + 0.7 if full else t
        found[name] = (layout.arrange(t.to(device, dtype)) if full else t.to(device, own)).contiguous(
            memory_format=layout.memory_format if full else torch.contiguous_format
        )
    return found


def run(
    tensors: dict[str, Tensor], training: bool, activation: str, function: Callable[..., Tensor], **options: Any
) -> dict[str, Tensor]:
    """Output, gradients and running statistics afterwards."""
    given = {n: t.detach().clone() for n, t in tensors.items()}
    for name in TENSORS:
        if name in given:
            given[name].requires_grad_()
    dy = given.pop("dy")
    numbers = {"eps": EPS, "other_eps": OTHER_EPS, "momentum": MOMENTUM, "other_momentum": OTHER_MOMENTUM}
    y = function(**dict.fromkeys((*TENSORS, *STATISTICS)) | given, training=training, activation=activation,
                 **numbers | options)  # fmt: skip
    torch.autograd.backward(y, dy)
    grads = {f"d{n}": t.grad for n, t in given.items() if t.grad is not None}
    return {"y": y.detach(), **grads, **{n: given[n] for n in STATISTICS if n in given}}


def apart(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    other: Tensor,
    other_running_mean: Tensor | None,
    other_running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    other_momentum: float,
    other_eps: float,
    activation: Any,
) -> Tensor:
    """What users write."""
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    z = F.batch_norm(
        other, other_running_mean, other_running_var, other_weight, other_bias, training, other_momentum, other_eps
    )
    return resolve(activation).apply(y + z)


def assert_close(
    layout: Layout, device: torch.device, dtype: torch.dtype, activation: str, training: bool = True,
    leave_out: tuple[str, ...] = (), **options: Any,
) -> None:  # fmt: skip
    def distances(seed: int) -> Iterator[tuple[str, Distance]]:
        tensors = {n: t for n, t in drawn(layout, device, dtype, seed).items() if n not in leave_out}
        ours = run(tensors, training, activation, batch_norm_add, **options)
        theirs = run(tensors, training, activation, apart, **options)
        # torch's CPU kernels get some strided gradients wrong.
        plain = {n: t.double().contiguous() for n, t in tensors.items()}
        truth = run(plain, training, activation, apart, **options)
        assert ours.keys() == truth.keys()
        for name, t in ours.items():
            if dtype == torch.float64:  # the truth is torch's own
                torch.testing.assert_close(t, truth[name], rtol=1e-10, atol=1e-10, check_stride=False)
            else:
                yield name, distance(t, theirs[name], wide(truth[name]).astype("float64"), name)

    assert_as_good_as_torch(distances)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@in_both_modes
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_every_layout(layout: Layout, path: Any, training: bool, device: torch.device) -> None:
    with forced(path), recorded() as kernels:
        assert_close(layout, device, torch.float32, "relu", training)
        x = layout.arrange(torch.empty(layout.shape, device=device))
        one_pass = not training or planning.pair_pays(x)
    assert one_pass or path == "single"
    assert any(k.startswith("pair") for k in kernels) == one_pass
    assert all(k.startswith(("pair", "statistics")) for k in kernels) == one_pass


@in_both_modes
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.FEW_LAYOUTS)
def test_every_dtype(layout: Layout, dtype: torch.dtype, path: Any, training: bool, device: torch.device) -> None:
    with forced(path):
        assert_close(layout, device, dtype, "relu", training)


@in_both_modes
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["identity", "relu", "relu6", "leaky_relu(0.2)", "gelu", "silu", "hardsigmoid",
                                  "mish", "elu(0.5)"])  # fmt: skip
def test_activations(name: str, path: Any, training: bool, device: torch.device) -> None:
    with forced(path):
        assert_close(Layout((3, 10, 7, 7)), device, torch.float32, name, training)


@pytest.mark.parametrize("splits", [2, 3])
def test_several_programs_share_a_channel_group(splits: int, device: torch.device) -> None:
    for layout in (Layout((64, 4, 7, 7)), Layout((2100, 8)), Layout((3, 2, 70, 70))):
        with forced("split", splits):
            assert_close(layout, device, torch.float32, "gelu")


@pytest.mark.parametrize("leave_out", [("weight", "bias"), ("other_weight", "other_bias"), ("other_bias",),
                                       ("running_mean", "running_var"), STATISTICS], ids=str)  # fmt: skip
@pytest.mark.parametrize("path", PATHS)
def test_each_batch_norm_has_what_it_has(leave_out: tuple[str, ...], path: Any, device: torch.device) -> None:
    with forced(path):
        for name in ("relu", "silu"):
            assert_close(Layout((3, 10, 7, 7)), device, torch.float32, name, leave_out=leave_out)


@pytest.mark.parametrize("path", PATHS)
def test_kernels_that_run(path: Any, device: torch.device) -> None:
    tensors = drawn(Layout((4, 8, 5, 5)), device, torch.float32)
    with forced(path), recorded() as kernels:
        run(tensors, True, "relu", batch_norm_add)
    assert kernels == (SINGLE if path == "single" else SPLIT)
    with recorded() as kernels:
        run(tensors, False, "relu", batch_norm_add)
    assert kernels == ["pair_inference_kernel", "pair_sums_kernel"]


@in_both_modes
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["relu", "silu", "identity"])
def test_any_subset_of_gradients(name: str, path: Any, training: bool, device: torch.device) -> None:
    layout = Layout((3, 4, 5, 5))
    tensors = drawn(layout, device, torch.float64)
    dy = tensors.pop("dy")
    for wanted in product((False, True), repeat=6):
        if not any(wanted):
            continue
        results = []
        for function in (batch_norm_add, apart):
            given: dict[str, Any] = {n: t.clone() for n, t in tensors.items()}
            leaves = [given[n].requires_grad_() for n, want in zip(TENSORS, wanted, strict=True) if want]
            with forced(path):
                y = function(**given, training=training, activation=name, eps=EPS, other_eps=OTHER_EPS,
                             momentum=MOMENTUM, other_momentum=OTHER_MOMENTUM)  # fmt: skip
                results.append(torch.autograd.grad(y, leaves, dy))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@in_both_modes
@pytest.mark.parametrize("name", ["relu", "silu", "identity"])
def test_gradients_of_both_orders(name: str, training: bool, device: torch.device) -> None:
    tensors: dict[str, Any] = drawn(Layout((3, 2, 2, 2)), device, torch.float64, seed=3)
    leaves = [tensors[n].requires_grad_() for n in TENSORS]
    fixed = {n: tensors[n] for n in STATISTICS}

    def function(*given: Tensor) -> Tensor:
        copies: dict[str, Any] = {n: t.clone() for n, t in fixed.items()}
        leaves: dict[str, Any] = dict(zip(TENSORS, given, strict=True))
        return batch_norm_add(**leaves, **copies, training=training, eps=1e-2, activation=name)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_strides_are_copied_once(device: torch.device) -> None:
    tensors = drawn(Layout((4, 6, 5, 5)), device, torch.float32)
    gapped = {n: torch.stack([t, t], -1)[..., 0] if t.dim() == 1 or n == "other" else t for n, t in tensors.items()}
    assert not gapped["other_weight"].is_contiguous() or gapped["other_weight"].numel() == 1
    plain: list[Any] = [tensors[n].clone() for n in STATISTICS]
    strided: list[Any] = [gapped[n] for n in STATISTICS]
    a, b, c, d = plain
    expected = batch_norm_add(tensors["input"], a, b, tensors["other"], c, d, training=True)
    a, b, c, d = strided
    with recorded() as kernels:
        found = batch_norm_add(gapped["input"], a, b, gapped["other"], c, d, training=True)
    assert "pair_forward_kernel" in kernels
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(strided, plain, rtol=0, atol=0)


def test_tensors_of_two_memory_formats_are_two_operations(device: torch.device) -> None:
    tensors = drawn(Layout((4, 6, 5, 5)), device, torch.float64)
    mixed = tensors | {"other": tensors["other"].contiguous(memory_format=torch.channels_last)}
    with recorded() as kernels:
        found = run(mixed, True, "relu", batch_norm_add)
    assert kernels
    assert not any(k.startswith("pair") for k in kernels)
    assert found["y"].is_contiguous()
    torch.testing.assert_close(found, run(tensors, True, "relu", apart), rtol=1e-10, atol=1e-10, check_stride=False)


def test_batch_norms_that_share_their_statistics_update_them_in_order(device: torch.device) -> None:
    t = drawn(Layout((4, 6, 5, 5)), device, torch.float64)
    mean, var = (t[n].clone() for n in STATISTICS[:2])
    batch_norm_add(t["input"], mean, var, t["other"], mean, var, training=True)
    for x in (t["input"], t["other"]):
        F.batch_norm(x, t["running_mean"], t["running_var"], training=True)
    torch.testing.assert_close([mean, var], [t["running_mean"], t["running_var"]])


def test_what_is_saved(device: torch.device) -> None:
    """Both tensors and vectors; bits for relu; the biases where what entered the activation is computed again."""
    for name, bits, biases in (("relu", 1, 0), ("identity", 0, 0), ("silu", 0, 2)):
        kept: list[Tensor] = []

        def pack(t: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(t)
            return t

        t = drawn(Layout((4, 8, 5, 5)), device, torch.float32)
        with saved_tensors_hooks(pack, lambda t: t):
            run(t, True, name, batch_norm_add)
        full = [k for k in kept if k.numel() == t["dy"].numel()]
        assert len(full) == 2, name
        assert sum(k.dtype == torch.uint8 for k in kept) == bits
        assert len(kept) == 2 + 2 + 4 + bits + biases


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_hooks_may_move_or_repack_what_is_saved(name: str, device: torch.device) -> None:
    tensors = drawn(Layout((4, 8, 5, 5), torch.channels_last), device, torch.float32)
    expected = run(tensors, True, name, batch_norm_add)
    for hooks in (save_on_cpu(), saved_tensors_hooks(lambda t: t, lambda t: torch.stack([t, t], -1)[..., 0])):
        with hooks:
            torch.testing.assert_close(run(tensors, True, name, batch_norm_add), expected, rtol=0, atol=0)


def test_a_hook_that_returns_something_else_is_told(device: torch.device) -> None:
    tensors = drawn(Layout((4, 8, 5, 5)), device, torch.float32)
    with (
        saved_tensors_hooks(lambda t: t, lambda t: t[:1] if t.dim() == 4 else t),
        pytest.raises(RuntimeError, match="not what was saved"),
    ):
        run(tensors, True, "relu", batch_norm_add)


BAD: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "weight of another size": lambda t: {"weight": t["weight"][:2]},
    "other weight of another size": lambda t: {"other_weight": t["other_weight"][:2]},
    "other statistics of another size": lambda t: {"other_running_mean": t["other_running_mean"][:2]},
    "statistics of another size": lambda t: {"running_var": t["running_var"][:2]},
    "one value per channel": lambda t: {"input": t["input"][:1, :, :1, :1], "other": t["other"][:1, :, :1, :1]},
    "eps is no number": lambda t: {"eps": "small"},
    "the other's momentum is no number": lambda t: {"other_momentum": "large"},
}


@pytest.mark.parametrize("elsewhere", [False, True], ids=["kernels", "torch"])
@pytest.mark.parametrize("what", BAD)
def test_nothing_is_written_where_either_is_refused(
    what: str, elsewhere: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if elsewhere:
        monkeypatch.setattr(launch, "INTERPRETED", False)
        device = torch.device("cpu")
    given = drawn(Layout((4, 6, 5, 5)), device, torch.float32)
    given.pop("dy")
    bad = BAD[what](given)
    before = {n: given[n].clone() for n in STATISTICS}
    numbers = {"eps": EPS, "other_eps": OTHER_EPS, "momentum": MOMENTUM, "other_momentum": OTHER_MOMENTUM}
    ours = raised_by(lambda: batch_norm_add(**numbers | given | bad, training=True))
    torch.testing.assert_close({n: given[n] for n in STATISTICS}, before, rtol=0, atol=0)
    theirs = raised_by(lambda: apart(**numbers | given | bad, training=True, activation=None))
    assert ours is not None
    assert ours == theirs


@pytest.mark.parametrize(
    ("other", "error", "text"),
    [
        (lambda x: x[:2], ValueError, "other should have the shape of the input"),
        (lambda x: x.double(), ValueError, "other should have the dtype of the input"),
        (lambda x: None, TypeError, "other must be a Tensor, but got NoneType"),
    ],
)
def test_what_cannot_be_added(other: Any, error: type[Exception], text: str, device: torch.device) -> None:
    x = torch.randn(4, 3, 2, 2, device=device)
    with pytest.raises(error, match=text):
        batch_norm_add(x, None, None, other(x), None, None, training=True)


@pytest.mark.parametrize("path", PATHS)
def test_counters_and_cumulative_averages(path: Any, device: torch.device) -> None:
    torch.manual_seed(0)
    for momenta in ((None, 0.1), (0.1, None), (None, None)):
        ours = [tritonbn.BatchNorm2d(6, momentum=m).to(device).double() for m in momenta]
        theirs = [nn.BatchNorm2d(6, momentum=m).to(device).double() for m in momenta]
        for _ in range(3):
            x, z = torch.randn(2, 4, 6, 5, 5, device=device, dtype=torch.float64)
            with forced(path), recorded() as kernels:
                found = ours[0].normalize_add(x, ours[1], z, "relu")
            assert kernels == (SINGLE[:1] if path == "single" else SPLIT[:3])
            torch.testing.assert_close(found, torch.relu(theirs[0](x) + theirs[1](z)))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_compiled(name: str, device: torch.device) -> None:
    torch.compiler.reset()
    tensors = drawn(Layout((4, 6, 5, 5)), device, torch.float64)
    compiled = torch.compile(batch_norm_add, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        found, expected = (run(tensors, training, name, f) for f in (compiled, batch_norm_add))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@interpreted
@in_both_modes
@pytest.mark.parametrize("name", ["identity", "relu", "silu"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", TRAFFIC)
def test_kernels_move_what_the_plan_says(layout: Layout, path: Any, name: str, training: bool) -> None:
    x, z, dy = (layout.arrange(torch.randn(layout.shape)).bfloat16() for _ in range(3))
    weight, bias, mean, var = torch.rand(4, layout.shape[1])
    activation = resolve(name)
    keep_bits = activation.two_valued
    one, two = (Norm(t, weight, bias, mean, var, None, 0.1, 1e-5) for t in (x, z))
    with forced(path):
        with counted(x.numel()) as forward:
            if training:
                _, bits, *_ = pair_launch.forward(one, two, activation, keep_bits)
            else:
                _, bits, *_ = pair_launch.inference(one, two, activation, keep_bits)
        plan = planning.pair_plan_for("forward" if training else "inference", x)
        assert agrees(forward[0], pair_bytes(plan, PairOperands(training, keep_bits)), plan)

        needs_z = activation != IDENTITY and not keep_bits
        first, second = (Kept(t, weight, bias if needs_z else None, mean, var) for t in (x, z))
        plan = planning.pair_plan_for("backward", x, training)
        for dx, dother, parameters in product((True, False), repeat=3):
            wanted = (dx, parameters, parameters, dother, parameters, parameters)
            with counted(x.numel()) as backward:
                dtypes = torch.float32, torch.float32
                pair_launch.backward(dy, first, second, bits, training, activation, dtypes, wanted)
            operands = PairOperands(training, keep_bits, needs_z, dx, dother, parameters)
            assert agrees(backward[0], pair_bytes(plan, operands), plan), operands


def test_bytes_are_those_of_the_design() -> None:
    """2s less forward and 3s less backward than two operations, where neither keeps anything."""
    x = torch.empty(256, 256, 56, 56, dtype=torch.bfloat16, device="meta")
    values = x.numel()
    for operation, per_value in (("forward", 5 * 2 + 1 / 8), ("backward", 8 * 2 + 2 / 8), ("inference", 3 * 2 + 1 / 8)):
        plan = planning.pair_plan_for(operation, x)  # type: ignore[arg-type]
        assert pair_bytes(plan, PairOperands(bits=True)) == per_value * values
    assert planning.pair_pays(x)


# Models that are converted


class Block(nn.Module):
    """torchvision's BasicBlock with a shortcut."""

    def __init__(self, inputs: int, outputs: int, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = shortcut or nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        activated: Tensor = self.relu(out)
        return activated


def block(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made = Block(3, 6)
    for norm in (norm for norm in made.modules() if isinstance(norm, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return made


def converted(model: nn.Module) -> Any:
    return tritonbn.convert(copy.deepcopy(model), fuse=True)


def pairs_of(model: nn.Module, x: Tensor) -> int:
    """How many sums of two batch norms a call of a copy computes in one operation."""
    seen: list[Any] = []
    real = functional.normalize_add

    def note(*args: Any) -> Tensor:
        seen.append(args)
        return real(*args)

    functional.normalize_add = note  # type: ignore[assignment]
    try:
        copy.deepcopy(model)(x)
    finally:
        functional.normalize_add = real
    return len(seen)


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y))
    gradients = {f"d{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **gradients, **{n: b.clone() for n, b in model.named_buffers()}}


@in_both_modes
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels-last"])
def test_a_downsampling_block_is_as_good_as_torch(training: bool, last: bool, device: torch.device) -> None:
    memory_format = torch.channels_last if last else torch.contiguous_format

    def distances(seed: int) -> Iterator[tuple[str, Distance]]:
        model = block(seed).to(device, memory_format=memory_format).train(training)
        x = torch.randn(4, 3, 9, 9, device=device).contiguous(memory_format=memory_format)
        ours = converted(model)
        assert pairs_of(ours, x) == 1
        with recorded() as kernels:
            mine = trained(ours, x)
        assert sum(k.startswith("pair") for k in kernels) in (2, 3)
        assert list(ours.state_dict()) == list(model.state_dict())
        exact = trained(copy.deepcopy(model).double(), x.double())
        theirs = trained(model, x)
        for name, t in mine.items():
            if t.is_floating_point():
                yield name, distance(t, theirs[name], wide(exact[name]).astype("float64"), name)
            else:
                assert torch.equal(t, theirs[name])

    assert_as_good_as_torch(distances)


def test_report_says_so() -> None:
    rows = {row.name: row for row in tritonbn.report(converted(block())).rows}
    assert (rows["bn2"].fused, rows["bn2"].other) == ("add + relu", "downsample.1")
    assert (rows["downsample.1"].fused, rows["downsample.1"].other) == ("add + relu", "bn2")
    assert "in the same pass as downsample.1" in str(tritonbn.report(converted(block())))
    rows = {row.name: row for row in tritonbn.report(block()).rows}
    assert rows["bn2"].fused == rows["bn2"].other == ""
    assert rows["bn2"].alone == rows["downsample.1"].alone == "convert(fuse=True) fuses add + relu"


def test_explain_says_so(device: torch.device) -> None:
    text = tritonbn.explain(converted(block()).to(device), torch.randn(2, 3, 8, 8, device=device))
    assert "bn2: in the same pass as downsample.1" in text
    assert "downsample.1: in the same pass as bn2" in text


@contextmanager
def launch_elsewhere() -> Iterator[None]:
    """Torch computes: whole networks take long in the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "INTERPRETED", False)
        yield


def test_networks_compute_their_shortcuts_in_the_same_pass() -> None:
    model = resnet18(width=4, classes=5).double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with launch_elsewhere():
        assert pairs_of(converted(model), x) == 3
        assert pairs_of(converted(resnet50(width=4, classes=5)), x.float()) == 4


@pytest.mark.parametrize(("name", "shortcuts"), [("resnet18", 3), ("resnet50", 4)])
def test_torchvision_networks(name: str, shortcuts: int) -> None:
    models = pytest.importorskip("torchvision.models")
    with launch_elsewhere():
        assert pairs_of(converted(getattr(models, name)(weights=None)).eval(), torch.rand(1, 3, 64, 64)) == shortcuts


@pytest.mark.parametrize(("name", "shortcuts"), [("resnet18", 3), ("resnet50", 4)])
def test_timm_networks(name: str, shortcuts: int) -> None:
    timm = pytest.importorskip("timm")
    with launch_elsewhere():
        assert pairs_of(converted(timm.create_model(name)).eval(), torch.rand(1, 3, 64, 64)) == shortcuts


def hook(*_: Any) -> None:
    """One that does nothing."""


def halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x.repeat(1, 2, 1, 1), 2)


WATCHED: dict[str, Callable[[Any], object]] = {
    "forward hook on the shortcut's norm": lambda m: m.downsample[1].register_forward_hook(hook),
    "forward pre-hook on the shortcut's norm": lambda m: m.downsample[1].register_forward_pre_hook(hook),
    "backward hook on the shortcut's norm": lambda m: m.downsample[1].register_full_backward_hook(hook),
    "backward pre-hook on the shortcut's norm": lambda m: m.downsample[1].register_full_backward_pre_hook(hook),
    "forward hook on the shortcut": lambda m: m.downsample.register_forward_hook(hook),
    "forward pre-hook on the shortcut": lambda m: m.downsample.register_forward_pre_hook(hook),
    "backward hook on the shortcut": lambda m: m.downsample.register_full_backward_hook(hook),
    "forward hook on the main norm": lambda m: m.bn2.register_forward_hook(hook),
    "forward hook on the shortcut's convolution": lambda m: m.downsample[0].register_forward_hook(hook),
    "the shortcut's norm is frozen": lambda m: m.downsample[1].eval(),
    "the shortcut has no norm": lambda m: m.downsample.pop(1),
    "the shortcut's norm has a forward of its own": lambda m: setattr(m.downsample[1], "forward", lambda x: x + 1),
    "the shortcut has a forward of its own": lambda m: setattr(m.downsample, "forward", halved),
    "the shortcut ends with an activation": lambda m: m.downsample.append(nn.ReLU()),
    "the shortcut's norm is the main one": lambda m: m.downsample.__setitem__(1, m.bn2),
    "they share their statistics": lambda m: m.downsample[1]._buffers.update(m.bn2._buffers),
}


@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("how", WATCHED)
def test_what_is_watched_or_other_is_not_computed_in_one_pass(how: str, later: bool) -> None:
    """Hooks and changes, before and after the conversion: one pass does not happen, and nothing else changes."""
    model = block().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    if not later:
        WATCHED[how](model)
    ours = converted(model)
    if later:
        WATCHED[how](ours)
        WATCHED[how](model)
    with recorded() as kernels:
        mine = trained(ours, x)
    assert not any(k.startswith("pair") for k in kernels)
    torch.testing.assert_close(mine, trained(model, x), rtol=1e-9, atol=1e-9)


def test_global_hooks_suspend_it() -> None:
    ours, x = converted(block()), torch.randn(2, 3, 8, 8)
    assert pairs_of(ours, x) == 1
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert pairs_of(ours, x) == 0
    finally:
        handle.remove()


FORWARDS: dict[str, tuple[Callable[..., Any], list[str]]] = {}


def pattern(*expected: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def note(forward: Callable[..., Any]) -> Callable[..., Any]:
        FORWARDS[forward.__name__] = forward, list(expected)
        return forward

    return note


@pattern("add + relu", "add + relu")
def in_one_expression(self: Any, x: Tensor) -> Any:
    return self.relu(self.bn(self.conv(x)) + self.bn2(self.conv2(x)))


@pattern("add + gelu", "add + gelu")
def a_smooth_activation(self: Any, x: Tensor) -> Any:
    y = self.bn(self.conv(x))
    return F.gelu(y + self.bn2(self.conv2(x)))


@pattern("add", "add")
def no_activation(self: Any, x: Tensor) -> Any:
    return self.bn(self.conv(x)).add_(self.bn2(self.conv2(x)))


@pattern("add", "add")
def the_sum_is_used_twice(self: Any, x: Tensor) -> Any:
    y = self.bn(self.conv(x)) + self.bn2(self.conv2(x))
    return y.relu(), y


@pattern("", "add + relu")
def the_shortcut_is_used_twice(self: Any, x: Tensor) -> Any:
    y = self.bn(self.conv(x))
    z = self.bn2(self.conv2(x))
    return F.relu(y + z), z


@pattern("", "add + relu")
def one_norm_twice(self: Any, x: Tensor) -> Any:
    y = self.bn(self.conv(x))
    return F.relu(y + self.bn(self.conv2(x)))


@pattern("add", "add + relu", "add")
def three_of_them(self: Any, x: Tensor) -> Any:
    y = self.bn(self.conv(x)) + self.bn2(self.conv2(x))
    return F.relu(y + self.more(x))


@pattern("", "add + relu")
def the_other_operand_can_tell(self: Any, x: Tensor) -> Any:
    return F.relu(self.bn(self.conv(x)) + self.tells(x))


@pattern("", "add", "add")
def in_a_loop(self: Any, x: Tensor) -> Any:
    y = self.bn(self.conv(x))
    for part in self.parts:
        y += part(x)
    return y


@pattern("", "")
def of_other_shapes(self: Any, x: Tensor) -> Any:
    y = self.bn(self.conv(x))
    return y + self.bn2(self.conv2(x[:, :, :1, :1]))


@pattern("", "")
def multiplied(self: Any, x: Tensor) -> Any:
    y = self.bn(self.conv(x))
    return y * self.bn2(self.conv2(x))


class Tells(nn.Module):
    """A module that may look at anything."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            print(end="")
        return x * 1.5


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_that_add_batch_norms(name: str) -> None:
    forward, expected = FORWARDS[name]
    bodies = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(3)]
    tells = nn.Sequential(Tells(), bodies[1])
    model = net(forward, more=bodies[0], tells=tells, parts=nn.ModuleList([nn.Sequential(Tells(), bodies[2])] * 2))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    ours = tritonbn.convert(copy.deepcopy(model), fuse=True)
    assert sorted(fused_in(ours, x)) == sorted(expected)
    rows = tritonbn.report(ours).rows
    if name != "of_other_shapes":  # which code does not tell
        assert {steps for row in rows for steps in row.fused.split(", ") if steps} == {*filter(None, expected)}
    leaves = [torch.utils._pytree.tree_leaves(m(x)) for m in (ours, model)]
    torch.testing.assert_close(*leaves, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.state_dict(), model.state_dict())
    for outputs in leaves:
        torch.autograd.backward([t.sin().sum() for t in outputs])
    gradients = [[p.grad for p in m.parameters()] for m in (ours, model)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_compiled_models() -> None:
    torch.compiler.reset()
    model = block().double()
    ours, x = converted(model), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = trained(torch.compile(ours, backend="aot_eager", fullgraph=True), x)  # type: ignore[arg-type]
    expected = trained(model, x)
    torch.testing.assert_close(
        {n.replace("_orig_mod.", ""): t for n, t in found.items()}, expected, rtol=1e-9, atol=1e-9
    )


def test_copies_and_reverted_models() -> None:
    ours, x = converted(block()), torch.randn(2, 3, 8, 8)
    assert pairs_of(copy.deepcopy(ours), x) == 1
    assert type(ours.downsample) is not nn.Sequential
    assert pairs_of(tritonbn.revert(ours), x) == 0
    assert type(ours.downsample) is nn.Sequential


@interpreted
def test_a_small_network_moves_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of full tensors that the batch norms of a block load and store, with the shortcut's norm apart and not."""
    x = torch.randn(4, 3, 9, 9)
    moved = []
    for one_pass in (False, True):
        ours = converted(block())
        with nullcontext() if one_pass else monkeypatch.context() as m, forced("split"):
            if m is not None:
                m.setattr("tritonbn.step._add_up", lambda left, right: False)
            with counted(4 * 6 * 5 * 5) as total:
                trained(ours, x)
        moved.append(total[0])
    y = torch.empty(4, 6, 5, 5)
    assert moved[0] - moved[1] == (2 + 3) * y.nbytes - planning.pair_plan_for("forward", y).bit_bytes


class Sums(nn.Module):
    """Two norms that are added, and what else runs `b`."""

    def __init__(self, forward: Callable[[Any, Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.a, self.b = (nn.BatchNorm2d(3, dtype=torch.float64) for _ in range(2))
        self.relu, self.again = nn.ReLU(), nn.Sequential(self.b, nn.Conv2d(3, 3, 1, dtype=torch.float64))


class Interleaved(Sums):
    def forward(self, x: Tensor, z: Tensor) -> Any:
        s = self.a(x) + self.b(x)
        t = self.again(z)
        return self.relu(s) + t


class Added(Sums):
    def forward(self, x: Tensor) -> Any:
        return self.relu(self.a(x) + self.b(x * 2))


class Hidden(Sums):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.b]
        del self.b, self.again

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.a(x) + self.hidden[0](x * 2))


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 3 * seed


def test_a_norm_that_waits_as_the_other_one_runs_in_its_turn(device: torch.device) -> None:
    model = Interleaved().to(device)
    ours = tritonbn.convert(copy.deepcopy(model), fuse=True)
    x, z = images().to(device), images(1).to(device)
    torch.testing.assert_close(ours(x, z), model(x, z), rtol=1e-9, atol=1e-9)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer, rtol=1e-9, atol=1e-9, msg=name)


def test_recalibrate_sees_both_norms(device: torch.device) -> None:
    model = Added().to(device)
    ours = tritonbn.convert(copy.deepcopy(model), fuse=True)
    batches = [images(seed).to(device) for seed in range(3)]
    for each in (model, ours):
        tritonbn.recalibrate(each, batches)
    for one, other in ((model.a, ours.a), (model.b, ours.b)):
        torch.testing.assert_close(other.running_mean, one.running_mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other.running_var, one.running_var, rtol=1e-9, atol=1e-9)
    assert ours.b.running_mean is not None
    assert float(ours.b.running_mean.abs().min()) > 0.1


def test_a_norm_outside_of_the_model_is_told(device: torch.device) -> None:
    ours = tritonbn.convert(Hidden().to(device), fuse=True)
    tritonbn.convert(ours.hidden[0])
    str(tritonbn.report(ours))
    tritonbn.explain(ours, images().to(device))


def test_what_torch_does_not_save_may_be_written_to(device: torch.device) -> None:
    """A frozen shortcut's input is kept by nobody."""
    model = Added().to(device)
    ours = tritonbn.convert(copy.deepcopy(model), fuse=True)
    grads = []
    for each in (model, ours):
        each.b.requires_grad_(False)
        w = torch.ones((), dtype=torch.float64, device=device, requires_grad=True)
        x, z = images().to(device), images(1).to(device)
        y = each.relu(each.a(x * w) + each.b(z)) if each is model else None
        if y is None:
            y = batch_norm_add(x * w, None, None, z, None, None, each.a.weight, each.a.bias, training=True,
                               activation="relu")  # fmt: skip
        z.zero_()
        y.square().sum().backward()
        grads.append(w.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)


def test_subclasses_that_look_at_their_arguments(device: torch.device) -> None:
    class Wrapped(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            plain = [a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
            return func(*plain, **(kwargs or {}))

    model = Added().to(device)
    ours = tritonbn.convert(copy.deepcopy(model), fuse=True)
    x = images().to(device)
    torch.testing.assert_close(ours(x.as_subclass(Wrapped)), model(x), rtol=1e-9, atol=1e-9)


def test_statistics_in_one_memory_are_updated_in_order(device: torch.device) -> None:
    x, z = images().to(device), images(1).to(device).contiguous(memory_format=torch.channels_last)
    means = []
    functions: tuple[Callable[..., Tensor], ...] = apart, batch_norm_add
    for function in functions:
        mean, var = (torch.full((3,), value, dtype=torch.float64, device=device) for value in (0.0, 1.0))
        given = {"input": x, "other": z, "running_mean": mean, "running_var": var, "other_running_mean": mean.view(3),
                 "other_running_var": var.view(3)}  # fmt: skip
        function(**dict.fromkeys((*TENSORS, *STATISTICS)) | given, training=True, momentum=0.1, eps=1e-5,
                 other_momentum=0.3, other_eps=1e-5, activation="relu")  # fmt: skip
        means.append(mean)
    torch.testing.assert_close(means[1], means[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("broken", ["momentum", "input"])
def test_nothing_is_written_before_torchs_error(broken: str, device: torch.device) -> None:
    statistics = [torch.zeros(3, dtype=torch.float64, device=device) for _ in range(4)]
    x, mean, var, other_mean, other_var = images().to(device), *statistics
    given: dict[str, Any] = {"input": x, "momentum": 0.1, "other_momentum": 0.1} | {broken: None}
    function: Callable[..., Tensor] = batch_norm_add
    with pytest.raises((TypeError, AttributeError), match=r"momentum|float|size"):
        function(running_mean=mean, running_var=var, other=x, other_running_mean=other_mean,
                 other_running_var=other_var, training=True, **given)  # fmt: skip
    assert all(int(s.count_nonzero()) == 0 for s in statistics)
