"""The networks of `python -m bench models`, by name: our own, and those of torchvision and timm where they are."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.errors import BenchError
from bench.networks import bn_inception, mlp, mobilenet, resnet

SIDE = 224
SIDES = {"inception_v3": 299}  # of the others' networks


class Network(NamedTuple):
    """How to build a network, and what it takes: images of 3 channels, or vectors."""

    build: Callable[[int], nn.Module]  # with so many classes, its weights from torch's generator
    classes: int = 1000
    side: int | None = SIDE  # of its images; None: it takes vectors
    features: int = 3  # channels of its images, or the length of its vectors


def inception(**options: Any) -> Callable[[int], nn.Module]:
    """It has a generator of its own, which is given a seed of torch's."""
    return lambda classes: bn_inception.bn_inception(torch.initial_seed() % 2**32, classes=classes, **options)


def vectors(classes: int) -> nn.Module:
    if classes != mlp.CLASSES:
        raise BenchError(f"mnist-mlp: expected {mlp.CLASSES} classes, got {classes}")
    return mlp.mnist_mlp(torch.initial_seed() % 2**32, batch_norm=True)


OWN = {
    "resnet50": Network(lambda classes: resnet.resnet50(classes=classes)),
    "resnet18": Network(lambda classes: resnet.resnet18(classes=classes)),
    "mobilenet_v2": Network(lambda classes: mobilenet.MobileNetV2(classes=classes)),
    "bn-inception": Network(inception()),
    "bn-inception-sigmoid": Network(inception(activation="sigmoid")),
    "bn-inception-small": Network(inception(stem="small"), classes=10, side=32),
    "mnist-mlp": Network(vectors, classes=mlp.CLASSES, side=None, features=mlp.PIXELS),
}
# What is known to be worth measuring; any other name of theirs is taken too.
THEIRS = {
    "torchvision": (
        "resnet50", "densenet121", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf",
        "inception_v3", "vgg16_bn",
    ),
    "timm": (
        "resnet50", "densenet121", "mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_b0", "regnety_004",
        "inception_v3", "vgg16_bn",
    ),
}  # fmt: skip
# Their auxiliary classifiers would make another output in training.
WITHOUT_AUXILIARY = {"inception_v3": {"aux_logits": False, "init_weights": True}}


def network(name: str) -> Network:
    """The network of this name; BenchError if there is none, or its library cannot be imported."""
    package, _, model = name.partition("/")
    if name in OWN:
        return OWN[name]
    if package not in THEIRS or not model:
        raise BenchError(f"--model {name}: expected one of {', '.join(OWN)}, or torchvision/NAME or timm/NAME")
    library = imported(package, name)
    known = library.list_models() if package == "timm" else library.models.list_models()
    if model not in known:
        raise BenchError(f"--model {name}: expected a model of {package}, such as {', '.join(THEIRS[package])}")

    def build(classes: int) -> nn.Module:
        if package == "timm":
            made: nn.Module = library.create_model(model, pretrained=False, num_classes=classes)
        else:
            extra = WITHOUT_AUXILIARY.get(model, {})
            made = library.models.get_model(model, weights=None, num_classes=classes, **extra)
        return made

    return Network(build, side=SIDES.get(model, SIDE))


def imported(package: str, name: str) -> Any:
    """torchvision beside a torch that it was not built for raises RuntimeError, and so does timm, which imports it."""
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise BenchError(
            f"--model {name}: expected {package} made for torch {torch.__version__}, got: {why}; pip install {package} "
            "in the version that goes with this torch"
        ) from None
