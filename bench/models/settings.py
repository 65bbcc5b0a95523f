"""What is measured: every combination of the options, the most important first."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch

from bench.mnist import positive
from bench.networks import zoo

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("nchw", "channels_last")
# In the order in which they are measured: what has to compile for long comes last.
MODES = ("eager", "graph", "compile", "compile-graph")
PROVIDERS = ("none", "torch", "tritonbn", "fused")
TAX_BATCHES = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Setting:
    """What the providers that are compared have in common."""

    model: str
    batch: int  # of each process
    image: int | None  # side; None: the network takes vectors
    layout: str  # nchw, channels_last; nc of vectors
    dtype: str
    mode: str
    direction: str  # training, inference

    @property
    def compiled(self) -> bool:
        return self.mode.startswith("compile")

    @property
    def graphed(self) -> bool:
        return self.mode.endswith("graph")

    @property
    def training(self) -> bool:
        return self.direction == "training"

    def __str__(self) -> str:
        size = "" if self.image is None else f", {self.image}x{self.image}"
        return f"{self.model}, {self.direction}, batch {self.batch}{size}, {self.layout}, {self.dtype}, {self.mode}"


def listed(one: Callable[[str], object]) -> Callable[[str], list[object]]:
    """An option with commas, which may be given more than once."""

    def parse(text: str) -> list[object]:
        return [one(word.strip()) for word in text.split(",")]

    return parse


def of(*known: str) -> Callable[[str], str]:
    def parse(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}; got {word!r}")
        return word

    return parse


def add_choices(parser: argparse.ArgumentParser) -> None:
    """The options that every combination is made of; each may be given several times, or with commas."""

    def add(name: str, one: Callable[[str], object], text: str, **other: str) -> None:
        parser.add_argument(name, type=listed(one), action="extend", help=text, **other)  # type: ignore[arg-type]

    own = f"{', '.join(zoo.OWN)}; torchvision/NAME; timm/NAME"
    add("--model", str, f"{own} (default: resnet50)", metavar="NAME")
    add("--batch", positive, "examples per process (default: 256; CPU: 4)", metavar="N")
    add("--layout", of(*LAYOUTS), "nchw, channels_last (default: channels_last; CPU: nchw)", metavar="NAME")
    add("--dtype", of(*DTYPES), "fp32, bf16, fp16; the weights stay fp32 (default: bf16; CPU: fp32)", metavar="NAME")
    add("--mode", of(*MODES), f"{', '.join(MODES)}; graph: CUDA graphs (default: all; CPU: eager)", metavar="NAME")
    add("--provider", of(*PROVIDERS), f"{', '.join(PROVIDERS)} (default: all)", metavar="NAME")
    parser.add_argument("--image", type=positive, metavar="SIDE", help="of the images (default: the network's own)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--training", action="store_true", help="training steps only")
    only.add_argument("--inference", action="store_true", help="inference only")


def fill_in(args: argparse.Namespace, cuda: bool) -> None:
    """What was not chosen."""
    args.model = args.model or ["resnet50"]
    args.batch = args.batch or ([*TAX_BATCHES] if args.tax else [256 if cuda else 4])
    args.layout = args.layout or ["channels_last" if cuda else "nchw"]
    args.dtype = args.dtype or ["bf16" if cuda else "fp32"]
    args.mode = args.mode or ([*MODES] if cuda else ["eager"])
    args.provider = [name for name in PROVIDERS if name in (args.provider or PROVIDERS)]
    if args.tax and not args.inference:
        args.training = True


def settings(args: argparse.Namespace) -> list[Setting]:
    """By mode, then network, batch and the rest."""
    directions = ["training"] * (not args.inference) + ["inference"] * (not args.training)
    found = []
    for mode, model, dtype, layout, batch, direction in product(
        [mode for mode in MODES if mode in args.mode], args.model, args.dtype, args.layout, args.batch, directions
    ):
        own = zoo.network(model).side
        image, layout = (None, "nc") if own is None else (args.image or own, layout)
        found.append(Setting(model, batch, image, layout, dtype, mode, direction))
    return list(dict.fromkeys(found))
