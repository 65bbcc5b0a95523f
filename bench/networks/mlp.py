"""The MNIST network of the batch normalization paper (arXiv:1502.03167, section 4.1)."""

import torch
from torch import nn

PIXELS = 28 * 28
HIDDEN = (100, 100, 100)
CLASSES = 10
# The paper says "small random Gaussian values" only; this one reproduces its figure.
WEIGHT_STD = 0.1


def mnist_mlp(seed: int, batch_norm: bool) -> nn.Sequential:
    """`[N, 784]` to 10 logits; batch norm stands before each sigmoid and takes over the bias there.

    One seed gives the same weights with and without batch norm.
    """
    widths = (PIXELS, *HIDDEN)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, HIDDEN, strict=False):
        layers.append(nn.Linear(inputs, outputs, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(outputs, eps=1e-5, momentum=0.1))
        layers.append(nn.Sigmoid())
    network = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], CLASSES))

    generator = torch.Generator().manual_seed(seed)
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=WEIGHT_STD, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


def last_sigmoid_input(network: nn.Sequential) -> nn.Sequential:
    """The network up to the input of its last sigmoid: what the paper's panels (b) and (c) watch."""
    return nn.Sequential(*list(network)[:-2])
