"""Image folders for tests: each class has its colour, under noise."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def write(root: Path, train: int = 16, val: int = 8, side: int = 16) -> Path:
    """`train` and `val` images of each class."""
    chance = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                noisy = np.array(colour) + chance.normal(0, 40, (side, side, 3))
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{index:03}.png")
    return root
