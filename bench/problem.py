"""One batch norm layer as it is measured: its tensors, and the fewest bytes that it must move."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from bench.shapes import Layer
from tritonbn.activations import resolve

Direction = Literal["forward", "backward", "both"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "both")
LAYOUTS = ("nchw", "channels_last", "nc")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Epilogue(NamedTuple):
    """What follows batch norm: the addition of a tensor of the input's shape, then an activation."""

    activation: str  # as `tritonbn.functional.batch_norm` calls it
    residual: bool = False

    @property
    def keeps_bits(self) -> bool:
        """Whether a bit per element tells the backward what it would need the residual for."""
        return self.residual and resolve(self.activation).two_valued


EPILOGUES = {
    "bn": Epilogue("identity"),
    "bn+add+relu": Epilogue("relu", residual=True),
    "bn+relu": Epilogue("relu"),
    "bn+silu": Epilogue("silu"),
    "bn+sigmoid": Epilogue("sigmoid"),
}


@dataclass(frozen=True)
class Problem:
    """What the rows of all providers and directions have in common."""

    set: str
    layer: Layer
    layout: str
    dtype: str
    epilogue: str

    @property
    def kind(self) -> str:
        """What it shares with the other layers of its set."""
        return f"{self.set} {self.dtype} {self.epilogue}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        return CHANNELS_LAST[len(self.layer.shape)] if self.layout == "channels_last" else torch.contiguous_format

    @property
    def tensor_bytes(self) -> int:
        return self.layer.numel * self.torch_dtype.itemsize

    def floor_bytes(self, direction: Direction) -> int:
        """The fewest bytes of full tensors: each is read or written once. Vectors of size C are left out.

        With s bytes per element: forward 2s (x, y), backward 3s (dy, x, dx); a residual adds s each way (itself, and
        its gradient), and a bit per element that the forward writes and the backward reads.
        """
        if direction == "both":
            return self.floor_bytes("forward") + self.floor_bytes("backward")
        epilogue = EPILOGUES[self.epilogue]
        tensors = (2 if direction == "forward" else 3) + epilogue.residual
        return tensors * self.tensor_bytes + epilogue.keeps_bits * -(-self.layer.numel // 8)


def layouts_of(shape: tuple[int, ...]) -> tuple[str, ...]:
    """The layouts in which a shape is measured."""
    if len(shape) == 2:
        return ("nc",)
    return ("nchw", "channels_last") if len(shape) in CHANNELS_LAST and shape[1] > 1 else ("nchw",)


class State(NamedTuple):
    """Parameters and running statistics, [C] in float32."""

    weight: Parameter
    bias: Parameter
    running_mean: Tensor
    running_var: Tensor


class Slot(NamedTuple):
    """The full tensors of one call, random and of one layout."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor


class Inputs(NamedTuple):
    """What calls are given: as many slots as take turns, so that no call finds its input in the cache."""

    state: State
    slots: list[Slot]

    def leaves(self, slot: int) -> list[Tensor]:
        """What gradients are taken for."""
        x, residual, _ = self.slots[slot]
        return [x, self.state.weight, self.state.bias] + ([] if residual is None else [residual])


def make_inputs(problem: Problem, slots: int, device: torch.device, seed: int = 0) -> Inputs:
    """Normally distributed tensors, each channel of x around 0.5; raises torch.OutOfMemoryError."""
    generator = torch.Generator(device).manual_seed(seed)
    C = problem.layer.shape[1]

    def tensor(mean: float) -> Tensor:
        fresh = torch.empty(
            problem.layer.shape, dtype=problem.torch_dtype, device=device, memory_format=problem.memory_format
        )
        return fresh.normal_(mean, generator=generator)

    def vector(low: float, high: float) -> Tensor:
        return torch.empty(C, device=device).uniform_(low, high, generator=generator)

    def slot() -> Slot:
        residual = tensor(0.0).requires_grad_() if EPILOGUES[problem.epilogue].residual else None
        return Slot(tensor(0.5).requires_grad_(), residual, tensor(0.0))

    state = State(
        Parameter(vector(0.5, 1.5)),
        Parameter(vector(-1.0, 1.0)),
        torch.zeros(C, device=device),
        torch.ones(C, device=device),
    )
    return Inputs(state, [slot() for _ in range(slots)])
