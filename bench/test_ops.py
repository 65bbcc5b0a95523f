"""`pytest bench/`: ours beside torch's on a few layers, with pytest-benchmark's comparisons between commits.

Each round is one call of a fresh input, the work on the device included, so launches count. For kernel times alone, and
for all layers and peers, see `python -m bench ops`. Without a GPU tiny shapes show that the benchmarks work.
"""

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.measure import synchronize
from bench.problem import EPILOGUES, Direction, Problem, make_inputs
from bench.providers import PROVIDERS
from bench.rows import call_for
from bench.shapes import Layer
from bench.timing import l2_bytes
from bench.verify import verify
from tritonbn.timing import slots_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPARED = ("tritonbn", "eager")
LAYERS = [
    Problem("resnet50-256", Layer((256, 64, 56, 56)), "nchw", "bf16", "bn+relu"),
    Problem("resnet50-256", Layer((256, 64, 56, 56)), "channels_last", "bf16", "bn+relu"),
    Problem("resnet50-256", Layer((256, 1024, 14, 14)), "nchw", "bf16", "bn+add+relu"),
    Problem("resnet50-256", Layer((256, 512, 7, 7)), "nchw", "bf16", "bn"),
    Problem("mnist", Layer((60, 100)), "nc", "fp32", "bn+sigmoid"),
]
TINY = [
    Problem("tiny", Layer((4, 6, 5, 5)), "nchw", "bf16", "bn+add+relu"),
    Problem("tiny", Layer((4, 8, 2, 3)), "channels_last", "fp32", "bn+relu"),
    Problem("tiny", Layer((6, 10)), "nc", "fp32", "bn+sigmoid"),
]


def name(problem: Problem) -> str:
    return f"{'x'.join(map(str, problem.layer.shape))}-{problem.layout}-{problem.dtype}-{problem.epilogue}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of torch's own would only fight with other workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(benchmark: BenchmarkFixture, problem: Problem, provider: str, direction: Direction, rounds: int) -> None:
    """Time one call a round, on inputs that take turns; the setup before each waits for the device."""
    slots = slots_for(problem.tensor_bytes, l2_bytes(DEVICE))
    inputs = make_inputs(problem, slots, DEVICE)
    with PROVIDERS[provider].scope():
        operation = PROVIDERS[provider].build(EPILOGUES[problem.epilogue], inputs.state)
        verify(operation, problem, inputs)
        call = call_for(direction, operation, inputs)
        turn = 0

        def setup() -> tuple[tuple[int], dict[str, object]]:
            nonlocal turn
            turn += 1
            synchronize(DEVICE)
            return (turn % slots,), {}

        def finished(slot: int) -> None:
            call(slot)
            synchronize(DEVICE)

        benchmark.group = f"{name(problem)} {direction}"
        benchmark.extra_info["floor_bytes"] = problem.floor_bytes(direction)
        benchmark.pedantic(finished, setup=setup, rounds=rounds, warmup_rounds=2)  # type: ignore[no-untyped-call]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU: the tiny shapes below run instead")
@pytest.mark.parametrize("provider", COMPARED)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("problem", LAYERS, ids=name)
def test_layer(benchmark: BenchmarkFixture, problem: Problem, direction: Direction, provider: str) -> None:
    run(benchmark, problem, provider, direction, rounds=100)


@pytest.mark.parametrize("provider", COMPARED)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("problem", TINY, ids=name)
def test_tiny(benchmark: BenchmarkFixture, problem: Problem, direction: Direction, provider: str) -> None:
    run(benchmark, problem, provider, direction, rounds=2)
