"""Which examples a step trains on and how they are distorted: a function of seed and step alone.

So arms with one seed see the same data, and a run that was interrupted goes on with the data it would have seen.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

SHIFT = 8  # a crop moves by an eighth of the image at most: 4 pixels of 32


class Draws(NamedTuple):
    """What chance decides in consecutive steps; on any device."""

    places: Tensor  # [steps, 4, batch] int64: index of the example, 1 if mirrored, rows and columns that it moves by
    factors: Tensor  # [steps, 3, batch] float32: brightness, contrast, saturation; 1 changes nothing


@dataclass(frozen=True)
class Stream:
    """The batches of a run.

    Thorough: each epoch divides the examples into batches anew. Otherwise they are divided once, and an epoch only
    changes the order of the batches. What is left of an epoch when no batch fits is dropped.
    """

    examples: int
    batch: int
    side: int  # of an image
    seed: int
    thorough: bool
    jitter: float  # factors are within 1 - jitter and 1 + jitter

    def draws(self, start: int, stop: int) -> Draws:
        """Of the steps from `start` up to `stop`, without `stop`."""
        steps = [self.draw(step) for step in range(start, stop)]
        return Draws(*map(torch.stack, zip(*steps, strict=True)))

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        chance = torch.rand(6, self.batch, generator=generator(self.seed, "distortion", step))
        reach = self.side // SHIFT
        moves = (chance[1:3] * (2 * reach + 1)).long().clamp(max=2 * reach) - reach
        places = torch.stack([self.indices(step), (chance[0] < 0.5).long(), *moves])
        return places, 1 + self.jitter * (2 * chance[3:] - 1)

    def indices(self, step: int) -> Tensor:
        """[batch], the examples of one step."""
        per_epoch = self.examples // self.batch
        epoch, place = divmod(step, per_epoch)
        if self.thorough:
            return order(self.examples, self.seed, "examples", epoch)[place * self.batch : (place + 1) * self.batch]
        fixed = order(self.examples, self.seed, "examples", 0)[: per_epoch * self.batch].view(per_epoch, self.batch)
        return fixed[order(per_epoch, self.seed, "batches", epoch)[place]]


@lru_cache(maxsize=4)  # of this epoch, and what it was divided into at first
def order(count: int, seed: int, what: str, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, what, epoch))


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """Chance that nothing else has used."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # it takes no more than 32 bits
