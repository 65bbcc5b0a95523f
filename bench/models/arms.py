"""Who is compared: the same network without batch norm, with torch's, with ours, with ours fused; and noise."""

import copy
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import tritonbn
from bench.models.settings import DTYPES, Setting
from bench.networks import zoo
from bench.networks.bare import without_batch_norm

BASELINE, AGAIN = "torch", "torch-again"
OURS = ("tritonbn", "fused", "tritonbn-folded")
SEED = 0
LEAST = 8  # examples that the running statistics are of: those of one or two are no statistics


class Start(NamedTuple):
    """What all arms of a setting begin with."""

    network: nn.Module  # with torch's batch norm
    x: Tensor
    y: Tensor  # labels
    elements: int  # that batch norm sees, per example


def names(setting: Setting, providers: Sequence[str]) -> list[str]:
    """The arms: the chosen ones, torch's a second time, and in inference what folding leaves."""
    found = list(providers)
    if BASELINE in providers:
        found.insert(found.index(BASELINE) + 1, AGAIN)
    if not setting.training:
        found += ["torch-folded"] * (BASELINE in providers)
        found += ["tritonbn-folded"] * bool({"tritonbn", "fused"} & {*providers})
    return found


def start(setting: Setting, device: torch.device, classes: int | None = None, seed: int = SEED) -> Start:
    """Network and input, the same for one seed; random numbers for images. The running statistics are theirs."""
    kind = zoo.network(setting.model)
    classes = classes or kind.classes
    torch.manual_seed(SEED)
    network = kind.build(classes)
    generator = torch.Generator().manual_seed(seed)
    sizes = (kind.features,) if setting.image is None else (kind.features, setting.image, setting.image)
    x = torch.randn(max(setting.batch, LEAST), *sizes, generator=generator)
    y = torch.randint(classes, (setting.batch,), generator=generator)
    if setting.layout == "channels_last":
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    network, x = network.to(device), x.to(device)
    elements = counted(network)
    tritonbn.recalibrate(network, [x])
    return Start(network.train(setting.training), x[: setting.batch], y.to(device), elements() // len(x))


def counted(network: nn.Module) -> Callable[[], int]:
    """How many elements batch norm gave out since; asking ends the counting."""
    sizes: list[int] = []
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_hook(lambda _, args, y: sizes.append(y.numel())) for norm in norms]

    def total() -> int:
        for hook in hooks:
            hook.remove()
        return sum(sizes)

    return total


def network_of(name: str, begin: Start) -> nn.Module:
    """The arm's network, made of a copy of the first one."""
    if name == "none":
        return without_batch_norm(begin.network, begin.x)
    if name == "torch-folded":
        return folded_by_torch(begin.network)
    network = copy.deepcopy(begin.network)
    if name in ("fused", "tritonbn-folded"):
        tritonbn.convert(network, fuse=True)
    elif name == "tritonbn":
        tritonbn.convert(network)
    return tritonbn.fold(network) if name == "tritonbn-folded" else network


def folded_by_torch(network: nn.Module) -> nn.Module:
    """A copy with batch norm folded into the layer before, by torch.fx."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of something that it imports
        folded: nn.Module = importlib.import_module("torch.fx.experimental.optimization").fuse(network)
    return folded


def precision(dtype: str, device: torch.device) -> str:
    """What is computed in what, in words."""
    if dtype != "fp32":
        scaling = ", no loss scaling" if dtype == "fp16" else ""
        return (
            f"autocast to {dtype}: convolutions, matrix products and activations; fp32: weights, gradients, momentum, "
            f"batch norm's parameters and statistics, the loss{scaling}"
        )
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return "fp32" + ", convolutions in TF32 as torch has it by default" * tf32


def itemsize(dtype: str) -> int:
    return DTYPES[dtype].itemsize
