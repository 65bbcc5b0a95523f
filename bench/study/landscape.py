"""How smooth the loss is around the point that training has reached, as Santurkar et al. 2018 look at it.

arXiv:1805.11604, section 3.1 and figure 4: from the parameters theta, with the gradient g of the loss L there, steps
along the gradient lead to theta - eta g, for step sizes eta around the learning rate. Lengths are l2 norms over all
parameters together. Definition 2.1 is their measure of internal covariate shift.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FACTORS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)  # eta / learning rate

Loss = Callable[[], Tensor]  # at the present values of the parameters


class Landscape(NamedTuple):
    loss: float  # L(theta), in nats
    gradient: float  # |g|
    loss_low: float  # the smallest L(theta - eta g) over the step sizes
    loss_high: float  # the largest: the variation of the loss is their difference
    change_low: float  # the smallest |g(theta - eta g) - g|: how well the gradient predicts the next ones
    change_high: float
    beta: float  # the largest |g(theta - eta g) - g| / (eta |g|): effective beta-smoothness


class Shift(NamedTuple):
    """Internal covariate shift of a layer, between its gradients G before and G' after the layers below it moved."""

    distance: float  # |G - G'|
    cosine: float  # of the angle between them


def landscape(loss: Loss, parameters: Sequence[Tensor], rate: float) -> Landscape:
    """Along the gradient at the parameters, which have their values again afterwards."""
    start = [parameter.detach().clone() for parameter in parameters]
    value, gradient = gradients(loss, parameters)
    length = norm(gradient)
    losses, changes, betas = [], [], []
    for factor in FACTORS:
        move(parameters, start, gradient, factor * rate)
        there, other = gradients(loss, parameters)
        change = norm([a - b for a, b in zip(other, gradient, strict=True)])
        losses.append(there)
        changes.append(change)
        betas.append(change / (factor * rate * length))
    move(parameters, start, gradient, 0.0)
    extremes = [pick(torch.stack(values)) for values in (losses, changes) for pick in (torch.amin, torch.amax)]
    return Landscape(*[float(figure) for figure in (value, length, *extremes, torch.stack(betas).amax())])


def internal_shift(loss: Loss, layers: Sequence[Sequence[Tensor]], rate: float) -> list[Shift]:
    """Of every layer but the first, which has none: when all layers below it made a step of SGD with the same loss.

    layers: their parameters, the lowest first; they have their values again afterwards.
    """
    parameters = [parameter for layer in layers for parameter in layer]
    start = [parameter.detach().clone() for parameter in parameters]
    _, gradient = gradients(loss, parameters)
    before = list(gradient)
    found, moved = [], 0
    for below, layer in itertools.pairwise(layers):
        until = moved + len(below)
        move(parameters[moved:until], start[moved:until], gradient[moved:until], rate)
        moved = until
        ours = before[moved : moved + len(layer)]
        _, theirs = gradients(loss, layer)
        product = sum(((a * b).sum() for a, b in zip(ours, theirs, strict=True)), torch.zeros(()))
        distance = norm([a - b for a, b in zip(ours, theirs, strict=True)])
        found.append(Shift(float(distance), float(product / (norm(ours) * norm(theirs)))))
    move(parameters, start, gradient, 0.0)
    return found


def gradients(loss: Loss, parameters: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    value = loss()
    return value.detach(), torch.autograd.grad(value, list(parameters))


def norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt()


@torch.no_grad()
def move(parameters: Sequence[Tensor], start: Sequence[Tensor], gradient: Sequence[Tensor], eta: float) -> None:
    """To start - eta * gradient; exactly to start where eta is 0."""
    for parameter, origin, slope in zip(parameters, start, gradient, strict=True):
        parameter.copy_(origin - eta * slope if eta else origin)
