"""One record of a call: what hooks, threads, callers of all kinds and drivers that refuse do to it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

import tritonbn
from tests.launches import recorded
from tests.parity import random
from tritonbn import calibrating, dispatch, handles, launch, planning, private, reference, tickets
from tritonbn.activations import resolve
from tritonbn.functional import batch_norm
from tritonbn.plan import forced

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(12, 5), (3, 5, 4, 4), (2, 5, 3, 3)]
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
on_kernels = pytest.mark.skipif(
    not (launch.INTERPRETED or torch.cuda.is_available()), reason="needs kernels: a GPU or the interpreter"
)
pytestmark = on_kernels


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "_told", set())


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[dispatch.Tensors]:
    """The tensors of each call that was looked at, not recognized."""
    seen: list[dispatch.Tensors] = []
    look = dispatch._look

    def note(tensors: dispatch.Tensors, training: bool) -> dispatch.Call:
        seen.append(tensors)
        return look(tensors, training)

    monkeypatch.setattr(dispatch, "_look", note)
    return seen


def strided(t: Tensor) -> Tensor:
    """The same values, each beside another one."""
    return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]


def permuted(t: Tensor) -> Tensor:
    """The same values in another order in memory."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


HOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": strided, "permuted": permuted, "copied": Tensor.clone, "negated": lambda t: torch._neg_view(-t),
}  # fmt: skip


@in_both_modes
@pytest.mark.parametrize("path", ["single", "split"])
@pytest.mark.parametrize("name", ["identity", "relu", "silu"])
@pytest.mark.parametrize("hook", HOOKS)
def test_saved_tensors_that_hooks_laid_out_anew(
    hook: str, name: str, path: Any, training: bool, device: torch.device
) -> None:
    """Kernels read addresses: whatever a hook returns is made dense first; both derivatives."""
    for shape in SHAPES:
        x, r = (random(*shape, seed=seed).to(device).requires_grad_() for seed in (0, 1))
        w, b = (random(5, seed=seed, low=0.5).to(device).requires_grad_() for seed in (2, 3))
        mean, var = random(5, seed=4).to(device), random(5, seed=5, low=0.5).to(device)
        act = resolve(name)
        unpack = HOOKS[hook]

        def change(t: Tensor, unpack: Callable[[Tensor], Tensor] = unpack) -> Tensor:
            return unpack(t) if t.is_floating_point() else strided(t)

        with forced(path, splits=2), saved_tensors_hooks(lambda t: t, change):
            y = batch_norm(x, mean.clone(), var.clone(), w, b, training, activation=act, residual=r)
            dy = random(*shape, seed=6).to(device)
            first = torch.autograd.grad(y, (x, w, b, r), dy, create_graph=True)
            second = torch.autograd.grad(first[0].square().sum(), (x, w), materialize_grads=True)
        y = reference.batch_norm(x, mean, var, w, b, training, activation=act, residual=r)
        true = torch.autograd.grad(y, (x, w, b, r), dy, create_graph=True)
        true += torch.autograd.grad(true[0].square().sum(), (x, w), materialize_grads=True)
        for ours, theirs in zip((*first, *second), true, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_bits_that_a_hook_put_at_an_odd_address(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read words of them: they are moved to where words may be."""
    x, r = (random(4, 64, seed=seed).to(device).requires_grad_() for seed in (0, 1))
    start = launch._launch
    given: list[Tensor] = []

    def note(kernel: Any, grid: Any, plan: Any, *args: Any, **rest: Any) -> None:
        given.extend(t for t in args if isinstance(t, Tensor) and t.dtype == torch.uint8)
        start(kernel, grid, plan, *args, **rest)

    def odd(t: Tensor) -> Tensor:
        if t.dtype != torch.uint8:
            return t
        room = torch.empty(t.numel() + 1, dtype=torch.uint8, device=device)[1:]
        return room.copy_(t)

    y = batch_norm(x, None, None, training=True, activation="relu", residual=r)
    true = torch.autograd.grad(y.square().sum(), (x, r))
    with saved_tensors_hooks(lambda t: t, odd):
        y = batch_norm(x, None, None, training=True, activation="relu", residual=r)
    monkeypatch.setattr(launch, "_launch", note)
    with forced("split"):
        ours = torch.autograd.grad(y.square().sum(), (x, r))
    assert given
    assert all(t.data_ptr() % 4 == 0 for t in given)
    for mine, theirs in zip(ours, true, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        pytest.param(lambda t: t.float(), "of torch.float32 on", id="dtype"),
        pytest.param(lambda t: t[..., :2], r"2\] of torch.float64", id="shape"),
        pytest.param(lambda t: t.to("meta"), "on meta", id="device"),
    ],
)
def test_saved_tensors_that_hooks_replaced(change: Callable[[Tensor], Tensor], got: str, device: torch.device) -> None:
    x = random(12, 5).to(device).requires_grad_()
    for index in range(4):  # x, weight, mean, rstd
        unpacked: list[Tensor] = []

        def unpack(t: Tensor, index: int = index, unpacked: list[Tensor] = unpacked) -> Tensor:
            unpacked.append(t)
            return change(t) if len(unpacked) == index + 1 else t

        with saved_tensors_hooks(lambda t: t, unpack):
            y = batch_norm(x, None, None, torch.ones(5, device=device, dtype=torch.float64), training=True)
            with pytest.raises(
                RuntimeError, match=f"what a hook of saved tensors returned for .* expected .*, got .*{got}"
            ):
                torch.autograd.grad(y.sum(), x)


def test_records_hold_for_fresh_tensors_and_in_turn(looked: list[dispatch.Tensors], device: torch.device) -> None:
    """Fresh parameters, other layouts, dtypes and gradients in turn: each sort of a call is looked at once."""
    module = tritonbn.BatchNorm2d(3).to(device)
    inputs = [
        torch.randn(4, 3, 5, 5, device=device),
        torch.randn(4, 3, 5, 5, device=device).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 3, 5, 5, device=device).bfloat16(),
        torch.randn(4, 3, 5, 5, device=device, requires_grad=True),
    ]
    for turn in range(4):
        for x in inputs:
            state = {name: t.clone() for name, t in module.state_dict().items()}
            y = functional_call(module, state, (x,))
            exact = nn.functional.batch_norm(x.double(), None, None, training=True)
            tolerance = 2e-2 if x.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
            module.weight.requires_grad_(turn % 2 == 0)
            module(x)
        if turn == 1:
            assert len(looked) == 12  # 4 inputs; parameters that are fresh, learn or do not
    assert len(looked) == 12


def test_the_oldest_records_are_forgotten(
    looked: list[dispatch.Tensors], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "LIMIT", 3)
    for N in (2, 3, 4, 5):
        batch_norm(torch.randn(N, 3, device=device), None, None, training=True)
    assert len(dispatch._calls) == 3
    looked.clear()
    for N in (3, 4, 5):
        batch_norm(torch.randn(N, 3, device=device), None, None, training=True)
    assert not looked
    batch_norm(torch.randn(2, 3, device=device), None, None, training=True)
    assert len(looked) == 1


def test_a_shape_has_so_many_records(device: torch.device) -> None:
    x = torch.randn(4, 3, device=device)
    for step in range(dispatch.EACH + 3):
        batch_norm(torch.randn(4, 3 * (step + 1), device=device)[:, :: step + 1], None, None, training=True)
    batch_norm(x, None, None, training=True)
    assert [len(entries) for entries in dispatch._calls.values()] == [dispatch.EACH]


def test_all_is_forgotten_by_one_function(device: torch.device) -> None:
    with forced("split", splits=2):
        batch_norm(torch.randn(8, 3, device=device), None, None, training=True)
    planning.refuse_together(device)
    assert all((dispatch._calls, tickets._pool, tickets._partials))
    assert not planning.holds_together(device)
    dispatch.forget()
    assert not any((dispatch._calls, handles._handles, launch._too_many, tickets._pool, tickets._partials))
    assert planning.holds_together(device)


def test_no_tensor_gets_torchs_error_after_a_call_that_is_known(device: torch.device) -> None:
    x, w = torch.randn(4, 3, device=device), torch.ones(3, device=device)
    batch_norm(x, None, None, w, training=True)
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        batch_norm(x, None, None, [1.0, 1.0, 1.0], training=True)  # type: ignore[arg-type]


class Own(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("call", "why"),
    [
        pytest.param(
            lambda x: batch_norm(x.as_subclass(Own), None, None, training=True), "Own is not Tensor", id="subclass"
        ),
        pytest.param(
            lambda x: torch.func.vmap(lambda v: batch_norm(v, None, None, training=True))(x[None]),
            "a transform of torch.func is active", id="vmap",
        ),
        pytest.param(
            lambda x: batch_norm(x, *torch.ones(2, 1, device=x.device).expand(2, 3)), "running statistics are expanded",
            id="expanded",
        ),
    ],
)  # fmt: skip
def test_a_call_that_torch_computes_is_told_once(
    call: Callable[[Tensor], Tensor], why: str, device: torch.device, recwarn: pytest.WarningsRecorder
) -> None:
    x = torch.randn(4, 3, device=device)
    with recorded() as kernels:
        for _ in range(3):
            call(x)
    assert not kernels
    told = [str(w.message) for w in recwarn if "tritonbn" in str(w.message)]
    assert len(told) == 1
    assert told[0].startswith(f"tritonbn: torch computes batch norm: {why}")


def test_calls_that_are_no_loss_are_not_told(device: torch.device, recwarn: pytest.WarningsRecorder) -> None:
    batch_norm(torch.empty(0, 3, device=device), None, None, training=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(torch.randn(1, 3, device=device), None, None, training=True)
    assert not [w for w in recwarn if "tritonbn" in str(w.message)]


def test_training_calls_ask_for_a_calibration_and_no_others(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured holds for the call itself; compiled code and evaluation do not ask."""
    asked: list[torch.device] = []
    monkeypatch.setattr(calibrating, "settled", set())
    monkeypatch.setattr(calibrating, "on_first_call", asked.append)
    x = torch.randn(6, 3, device=device)
    batch_norm(x, torch.zeros(3, device=device), torch.ones(3, device=device))
    assert not asked
    batch_norm(x, None, None, training=True)
    assert asked == [x.device]
    torch.compile(lambda t: batch_norm(t, None, None, training=True), backend="aot_eager")(x)
    assert asked == [x.device]


@pytest.mark.parametrize("frozen", [False, True], ids=["learning", "frozen"])
@pytest.mark.parametrize("path", ["single", "split"])
def test_results_and_what_is_saved_are_all_that_is_allocated(
    path: Any, frozen: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y, mean and rstd; gradients. A second launch reads the sums there, or in vectors where they are not wanted."""
    x, dy = (torch.randn(12, 5, device=device) for _ in range(2))
    module = tritonbn.BatchNorm1d(5).to(device).requires_grad_(not frozen)
    made: list[str] = []

    def noted(name: str, make: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return make(*args, **kwargs)

        return run

    for name in ("empty", "empty_like", "zeros", "zeros_like", "ones", "full"):
        monkeypatch.setattr(torch, name, noted(name, getattr(torch, name)))
    monkeypatch.setattr(Tensor, "clone", lambda t, **k: pytest.fail("a copy"))
    x.requires_grad_()
    with forced(path, splits=2):
        module(x).backward(dy)  # the memory that is kept
        for _ in range(2):
            made.clear()
            y = module(x)
            assert made == ["empty_like"] * 3
            made.clear()
            y.backward(dy)
            sums = 2 * (frozen and path == "split")
            assert len(made) == (1 if frozen else 3) + sums


# Counter and average in the kernels.


def paths_of(name: str) -> Any:
    return {"single": forced("single"), "split": forced("split", splits=3)}[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["single", "split"])
@pytest.mark.parametrize("shape", [(40, 70), (4, 70, 5, 5), (300, 3)], ids=str)
def test_the_average_over_all_batches(
    shape: tuple[int, ...], path: str, dtype: torch.dtype, device: torch.device
) -> None:
    """momentum=None: running statistics and counter of torch's module, in float64; also from a large count on."""
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    for begin in (0, 7, (1 << 24) + 1):
        theirs: Any = kind(shape[1], momentum=None, dtype=torch.float64)
        theirs.num_batches_tracked.fill_(begin)
        parameters = torch.float64 if dtype == torch.float64 else torch.float32
        ours: Any = tritonbn.convert(kind(shape[1], momentum=None, dtype=parameters, device=device))
        ours.num_batches_tracked.fill_(begin)
        for seed in range(3):
            x = random(*shape, seed=seed).to(dtype)
            with paths_of(path), recorded() as kernels:
                ours(x.to(device))
            theirs(x.double())
            assert kernels
        assert ours.num_batches_tracked.item() == theirs.num_batches_tracked.item() == begin + 3
        for name in ("running_mean", "running_var"):
            tolerance = 1e-12 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(
                getattr(ours, name).double().cpu(), getattr(theirs, name), rtol=tolerance, atol=tolerance
            )


def test_batches_are_counted_by_the_kernels_and_by_torch_alike(device: torch.device) -> None:
    """Each call once, also one that torch computes, or refuses as torch's module does; none in evaluation."""
    ours, theirs = tritonbn.BatchNorm1d(3).to(device), nn.BatchNorm1d(3).to(device)
    x = torch.randn(6, 3, device=device)

    def calls(module: Any) -> list[int]:
        counts = []
        for given in (x, x.as_subclass(Own), x[:0], x[:1], x.double()):
            try:
                module(given)
            except (ValueError, RuntimeError):
                counts.append(-1)
            counts.append(module.num_batches_tracked.item())
        module.eval()
        module(x)
        return [*counts, module.num_batches_tracked.item()]

    assert calls(ours) == calls(theirs)


@pytest.mark.parametrize("counter", [torch.tensor(2.0), torch.tensor(2, dtype=torch.int32)], ids=["float", "int32"])
def test_counters_of_other_dtypes_are_torchs(counter: Tensor, device: torch.device) -> None:
    module = tritonbn.BatchNorm1d(3, momentum=None).to(device)
    module.num_batches_tracked = counter.to(device)
    module(torch.randn(6, 3, device=device))
    assert module.num_batches_tracked.item() == 3


def test_a_counter_elsewhere_does_not_keep_the_statistics_from_their_update(device: torch.device) -> None:
    module = tritonbn.BatchNorm1d(3).to(device)
    module.num_batches_tracked = torch.zeros((), dtype=torch.int64, device="meta")
    x = torch.randn(6, 3, device=device)
    module(x)
    torch.testing.assert_close(module.running_mean, 0.1 * x.mean(0))


def test_compiled_modules_average_over_all_batches(device: torch.device) -> None:
    """In one graph: nothing is read by the host. Two forwards come before one backward."""
    ours: Any = tritonbn.BatchNorm1d(3, momentum=None).to(device)
    theirs: Any = nn.BatchNorm1d(3, momentum=None).to(device).double()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    xs = [random(6, 3, seed=seed).float().to(device).requires_grad_() for seed in range(2)]
    with recorded() as kernels:
        torch.stack([compiled(x).sin().sum() for x in xs]).sum().backward()  # type: ignore[no-untyped-call]
    assert len(kernels) == 4
    exact = [x.detach().double().requires_grad_() for x in xs]
    torch.stack([theirs(x).sin().sum() for x in exact]).sum().backward()  # type: ignore[no-untyped-call]
    for mine, true in zip(xs, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]
    assert ours.num_batches_tracked.item() == 2
    torch.testing.assert_close(ours.running_var.double(), theirs.running_var, rtol=1e-6, atol=1e-6)


STUBBED = """
import threading, warnings
import torch, tritonbn
from bench.stub import StubDriver, active
from tritonbn import calibrating, dispatch, handles, launch, planning
from tritonbn.device import H200
from tritonbn.functional import batch_norm
from tritonbn.plan import forced


class Refusing(StubDriver):
    '''A driver under which programs cannot wait for each other.'''

    attempts = 0

    def launcher_cls(self, source, metadata):
        start = super().launcher_cls(source, metadata)

        def run(*args):
            if metadata.launch_cooperative_grid:
                self.attempts += 1
                raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
            start(*args)

        return run


launch.INTERPRETED = True  # what lets CPU tensors in
torch.set_num_threads(1)
"""

THREADS = """
stub = StubDriver()
stub.keep = True
N, THREADS = 40, 8
with active(stub):
    owner, errors, ready = {}, [], threading.Barrier(THREADS)

    def work(index):
        try:
            C = 32
            dtype = (torch.float32, torch.bfloat16)[index % 2]
            xs = [torch.randn(16, C, dtype=dtype, requires_grad=True), torch.randn(4, C, 2, 2, dtype=dtype)]
            xs.append(xs[1].contiguous(memory_format=torch.channels_last).requires_grad_())
            module = tritonbn.BatchNorm1d(C), tritonbn.BatchNorm2d(C, momentum=None)
            mine = [*xs, *(t for m in module for t in (*m.parameters(), *m.buffers()))]
            owner.update((t.data_ptr(), index) for t in mine)
            ready.wait()
            for turn in range(N):
                for x in xs:
                    m = module[x.dim() > 2]
                    m.weight.requires_grad_(turn % 3 != 0)
                    y = m(x)
                    if y.requires_grad:
                        torch.autograd.grad(y, [t for t in (x, m.bias) if t.requires_grad], torch.ones_like(y))
            kept.append(mine)
        except BaseException as error:
            errors.append(error)

    kept = []
    with forced("split", splits=2):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
        [t.start() for t in threads], [t.join() for t in threads]
    if errors:
        raise errors[0]
    for one in stub.launches:
        addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in one.args]
        assert len({owner[a] for a in addresses if isinstance(a, int) and a in owner}) == 1, "another thread's tensor"
    print(len(stub.launches) == THREADS * N * (4 + 3 + 4), len(handles._handles) < 60, len(dispatch._calls) < 20)
"""

KEYS = """
import contextlib, random
from torch.utils.flop_counter import FlopCounterMode
from tritonbn.activations import resolve
from tritonbn.functional import normalize

draw, compiled, wrong = random.Random(0), {}, []
stub = StubDriver()
stub.keep = True
start = handles.start


def watched(kernel, grid, plan, *args, launches=None, which=None, **constants):
    start(kernel, grid, plan, *args, launches=launches, which=which, **constants)
    key = handles._key(kernel, plan, -1, args, constants)[0]
    if compiled.setdefault(key, stub.launches[-1].metadata.hash) != stub.launches[-1].metadata.hash:
        wrong.append((kernel.__name__, which, constants))


def call(path):
    learns = [draw.random() < 0.5] * 4 if draw.random() < 0.5 else [draw.random() < 0.5 for _ in range(4)]
    x, r = (torch.randn(4, 8, 16, 16, requires_grad=learn) for learn in learns[:2])
    w, b = (torch.ones(8, requires_grad=learn) for learn in learns[2:])
    training = draw.random() < 0.7
    counter = torch.tensor(1) if training and draw.random() < 0.7 else None
    momentum = None if counter is not None and draw.random() < 0.4 else 0.1
    act = resolve(draw.choice(["identity", "relu", "silu", "hardswish", "leaky_relu(0.1)", "leaky_relu(0.2)", "elu"]))
    r = r if draw.random() < 0.6 else None
    mode = FlopCounterMode(display=False) if draw.random() < 0.4 else contextlib.nullcontext()
    with mode, torch.set_grad_enabled(draw.random() < 0.6):
        y = normalize(x, torch.zeros(8), torch.ones(8), w, b, training, momentum, 1e-5, act, r, counter)
        if y.requires_grad:
            leaves = [t for t in (x, r, w, b) if t is not None and t.requires_grad]
            torch.autograd.grad(y, draw.sample(leaves, draw.randint(1, len(leaves))), torch.ones_like(y))


launch._launch = watched
with active(stub):
    for path in ("single", "split"):
        with forced(path):
            for _ in range(500):
                call(path)
print(wrong, len(compiled) > 150)
"""

REFUSED = """
planning.device_of = launch.device_of = lambda device: H200
stub = Refusing()
with active(stub), warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(3):
        x = torch.randn(4096, 64, requires_grad=True)
        with forced("cooperative"):
            batch_norm(x, None, None, training=True).sum().backward()
    with forced("stream"):
        batch_norm(torch.randn(16, 64, 56, 56), None, None, training=True)
print(stub.attempts, stub.count, sum("refuses programs that wait" in str(w.message) for w in told))
"""


KEPT = """
stub = StubDriver()
stub.keep = True
x, r = (torch.randn(64, 32) for _ in range(2))
vectors = [torch.ones(32) for _ in range(4)]
with active(stub), torch.no_grad():
    for path in ("single", "split"):
        with forced(path):
            for training in (True, False):
                found = {}
                for keep in (True, False) * 3:
                    act = ("relu", 0.0, 0.0)
                    stub.launches.clear()
                    rest = None, training, 0.1, 1e-5, *act, keep, keep
                    out = torch.ops.tritonbn.batch_norm(x, *vectors[:2], r, *vectors[2:], *rest)
                    assert (out[1].numel() > 0) == keep
                    last = stub.launches[-1]
                    given = [a is not None for a in last.args], id(last.metadata)
                    assert given == found.setdefault(keep, given)
                assert sum(found[True][0]) == sum(found[False][0]) + (1 if training else 3), "bits, and mean and rstd"
                assert found[True][1] != found[False][1], "of another kernel"
print("apart")
"""


@pytest.mark.parametrize(
    ("script", "printed"),
    [
        pytest.param(THREADS, "True True True", id="8-threads"),
        pytest.param(KEYS, "[] True", id="each-key-has-one-kernel"),
        pytest.param(REFUSED, "1 14 1", id="driver-refuses"),
        pytest.param(KEPT, "apart", id="what-is-kept"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a driver")
def test_with_a_pretended_driver(script: str, printed: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", STUBBED + script], capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == printed
