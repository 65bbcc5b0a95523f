"""What a step of the Inception study trains on: which examples, and how they are distorted."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("PIL", reason="the benchmarks are an extra: pip install -e .[bench]")

import torch
from torch import Tensor

from bench.images import MEAN, STD, Memory, normalized
from bench.study.augment import GREY, Pixels
from bench.study.batches import Draws, Stream

STREAM = Stream(examples=24, batch=8, side=32, seed=3, thorough=True, jitter=0.4)
CPU = torch.device("cpu")


def epochs(stream: Stream, count: int) -> Iterator[list[list[int]]]:
    """The examples of the batches of each epoch."""
    per_epoch = stream.examples // stream.batch
    for epoch in range(count):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        yield [stream.draw(step)[0][0].tolist() for step in steps]


def compositions(epoch: list[list[int]]) -> list[frozenset[int]]:
    return sorted((frozenset(batch) for batch in epoch), key=min)


@pytest.mark.parametrize("thorough", [True, False], ids=["thorough", "fixed"])
def test_each_example_is_in_each_epoch_once(thorough: bool) -> None:
    for epoch in epochs(replace(STREAM, thorough=thorough), 4):
        assert sorted(index for batch in epoch for index in batch) == list(range(24))


def test_thorough_shuffling_draws_batches_anew_and_without_it_examples_stay_together() -> None:
    anew = list(map(compositions, epochs(STREAM, 4)))
    assert all(one != other for one, other in itertools.pairwise(anew))
    found = list(epochs(replace(STREAM, thorough=False), 6))
    assert all(compositions(epoch) == compositions(found[0]) for epoch in found)
    assert any(epoch != found[0] for epoch in found), "the order of the batches changes"


@pytest.mark.parametrize("thorough", [True, False], ids=["thorough", "fixed"])
def test_rest_of_an_epoch_is_dropped(thorough: bool) -> None:
    for epoch in epochs(replace(STREAM, examples=29, thorough=thorough), 3):
        assert len({index for batch in epoch for index in batch}) == 24


def test_draws_are_a_function_of_seed_and_step() -> None:
    once = STREAM.draws(0, 10)
    torch.rand(5)
    again = Draws(*map(torch.cat, zip(STREAM.draws(0, 4), STREAM.draws(4, 10), strict=True)))
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)
    other_seed = replace(STREAM, seed=4).draws(0, 10)
    assert not torch.equal(once.places, other_seed.places)
    assert not torch.equal(once.factors, other_seed.factors)
    assert len({tuple(factors.flatten().tolist()) for factors in once.factors}) == 10


def test_arms_see_the_same_but_for_the_strength_of_distortion() -> None:
    strong, weak = STREAM.draws(0, 5), replace(STREAM, jitter=0.1).draws(0, 5)
    assert torch.equal(strong.places, weak.places)
    torch.testing.assert_close((strong.factors - 1) / 4, weak.factors - 1, rtol=0, atol=1e-6)


def test_distortions_reach_their_limits_and_not_further() -> None:
    places, factors = STREAM.draws(0, 400)
    mirrored, moves = places[:, 1].float(), places[:, 2:]
    assert mirrored.mean() == pytest.approx(0.5, abs=0.04)
    assert set(moves.flatten().tolist()) == set(range(-4, 5)), "four pixels of 32"
    assert torch.bincount(moves.flatten() + 4).float().div(moves.numel()).sub(1 / 9).abs().max() < 0.02
    assert factors.min() == pytest.approx(0.6, abs=0.005)
    assert factors.max() == pytest.approx(1.4, abs=0.005)
    assert replace(STREAM, side=16).draws(0, 100).places[:, 2:].abs().max() == 2


def memory(count: int, side: int) -> Memory:
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, side, side), generator=chance, dtype=torch.uint8)
    return Memory(images, torch.arange(count) % 10, [])


def reference(image: Tensor, place: list[int], factors: list[float]) -> np.ndarray:
    """One image, written down again with NumPy in double precision; [side, side, 3] between 0 and 255."""
    _, mirrored, down, right = place
    side = image.shape[1]
    padded = np.pad(image.numpy().transpose(1, 2, 0).astype(np.float64), ((4, 4), (4, 4), (0, 0)))
    x = padded[4 + down : 4 + down + side, 4 + right : 4 + right + side]
    x = x[:, ::-1] if mirrored else x
    brightness, contrast, saturation = factors
    x = x * brightness
    average = (x @ GREY).mean()
    x = average + contrast * (x - average)
    grey = (x @ GREY)[..., None]
    distorted: np.ndarray = np.clip(grey + saturation * (x - grey), 0, 255)
    return distorted


def test_augmentation_is_what_it_says() -> None:
    held = memory(24, 32)
    pixels = Pixels.of(held, CPU)
    for step in range(3):
        places, factors = STREAM.draw(step)
        batch = pixels.augmented(places, factors)
        assert batch.shape == (8, 3, 32, 32)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        for index in range(8):
            place = places[:, index].tolist()
            exact = reference(held.images[place[0]], place, factors[:, index].tolist())
            expected = (exact / 255 - MEAN) / STD
            np.testing.assert_allclose(batch[index].permute(1, 2, 0).numpy(), expected, rtol=0, atol=2e-5)


def test_images_stay_as_they_are_without_distortion() -> None:
    held = memory(6, 16)
    pixels = Pixels.of(held, CPU)
    nothing = torch.zeros(4, 6, dtype=torch.int64)
    nothing[0] = torch.arange(6)
    plain = pixels.plain(slice(0, 6))
    torch.testing.assert_close(plain, normalized(held.images), rtol=0, atol=1e-5)
    torch.testing.assert_close(pixels.augmented(nothing, torch.ones(3, 6)), plain, rtol=0, atol=1e-5)
    assert plain.is_contiguous(memory_format=torch.channels_last)
