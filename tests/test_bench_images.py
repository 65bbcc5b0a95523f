"""Image folders: what is read, in which order, and what is said about folders and files that are not in order."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import image_loader, images
from bench.errors import BenchError

Make = Callable[..., Path]


def picture(seed: int, width: int = 8, height: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with three images each in train, one each in val; PNG, so that pixels are exact."""
    for part, count in (("train", 3), ("val", 1)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(picture(10 * label + index)).save(folder / f"{index}.png")
    return tmp_path


def test_files_by_class_and_name(root: Path) -> None:
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / ".hidden.png").write_text("no image")
    (root / "train" / "dog" / "more").mkdir()
    Image.fromarray(picture(99)).save(root / "train" / "dog" / "more" / "9.JPG", format="jpeg")
    train, val = images.splits(root)
    assert train.classes == val.classes == ("cat", "dog")
    names = [str(path.relative_to(root / "train")) for path in train.files]
    assert names == ["cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png", "dog/more/9.JPG"]
    assert train.labels == (0, 0, 0, 1, 1, 1, 1)
    assert len(val) == 2


def test_in_memory_pixels(root: Path) -> None:
    train, _ = images.splits(root)
    held = images.in_memory(train, 8)
    expected = np.stack([picture(seed) for seed in (0, 1, 2, 10, 11, 12)]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(held.images.numpy(), expected)
    assert held.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert held.skipped == []


def test_in_memory_takes_the_middle_and_scales(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "one").mkdir(parents=True)
        wide = np.zeros((4, 12, 3), dtype=np.uint8)
        wide[:, 4:8] = (10, 20, 30)  # the square in the middle
        Image.fromarray(wide).save(tmp_path / part / "one" / "wide.png")
    held = images.in_memory(images.splits(tmp_path)[0], 2)
    assert held.images.shape == (1, 3, 2, 2)
    assert held.images[0, :, 0, 0].tolist() == [10, 20, 30]
    assert sorted(set(held.images.flatten().tolist())) == [10, 20, 30]


def test_unreadable_files_are_skipped_and_named(root: Path) -> None:
    whole = (root / "train" / "cat" / "1.png").read_bytes()
    (root / "train" / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "dog" / "0.png").write_text("not an image at all")
    (root / "train" / "dog" / "2.png").write_bytes(b"")
    held = images.in_memory(images.splits(root)[0], 8)
    np.testing.assert_array_equal(held.images[1].numpy(), picture(2).transpose(2, 0, 1))
    assert held.labels.tolist() == [0, 0, 1]
    truncated, text, empty = held.skipped
    assert truncated.startswith("train/cat/1.png: OSError: ")
    assert text == "train/dog/0.png: no image that Pillow knows"
    assert empty.startswith("train/dog/2.png: ")
    assert str(root) not in "".join(held.skipped)


def test_nothing_readable(root: Path) -> None:
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"x")
    train, _ = images.splits(root)
    with pytest.raises(BenchError, match=r"none of 6 images can be read; .*0\.png"):
        images.in_memory(train, 8)
    with pytest.raises(BenchError, match="none of 6 images can be read"):
        image_loader.Files(train, 8, training=True)[0]


def test_nothing_readable_is_known_before_workers_start(root: Path) -> None:
    """An error of a worker comes with its traceback."""
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"x")
    train, val = images.splits(root)
    with pytest.raises(BenchError, match=r"^\S+train: none of 6 images can be read$"):
        next(iter(image_loader.loader(train, 2, 8, training=True, workers=1, seed=0, pin=False)))
    chance = torch.get_rng_state()
    assert image_loader.loader(val, 2, 8, training=True, workers=0, seed=0, pin=False).files.skipped == 0
    assert torch.equal(torch.get_rng_state(), chance)


def test_more_than_memory(root: Path) -> None:
    with pytest.raises(BenchError, match=r"6 images of 1000000x1000000 take 18,000\.0 GB; expected at most half"):
        images.in_memory(images.splits(root)[0], 1_000_000)


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="expected a folder, got nothing"):
        images.splits(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BenchError, match="expected a folder, got a file"):
        images.splits(tmp_path / "file")
    with pytest.raises(BenchError, match="expected the folders train and val in it; no train, val, got file"):
        images.splits(tmp_path)


def test_folders_without_classes_or_images(root: Path) -> None:
    (root / "val" / "cat" / "0.png").rename(root / "val" / "cat" / "0.text")
    with pytest.raises(BenchError, match=r"val/cat: expected images \(\.jpg, .*\), got none"):
        images.splits(root)
    for path in sorted((root / "val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(BenchError, match="val: expected a folder per class, got an empty folder"):
        images.splits(root)
    (root / "val" / "0.png").write_text("x")
    with pytest.raises(BenchError, match="val: expected a folder per class, got 1 files"):
        images.splits(root)


def test_classes_that_differ(root: Path) -> None:
    (root / "val" / "dog").rename(root / "val" / "wolf")
    with pytest.raises(BenchError, match="the same classes in train and val; only in train: dog; only in val: wolf"):
        images.splits(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(root: Path, workers: int) -> None:
    train, _ = images.splits(root)
    batches = image_loader.loader(train, 2, 8, training=True, workers=workers, seed=0, pin=False)
    labels = []
    for pixels, label in batches:
        assert pixels.shape == (2, 3, 8, 8)
        assert pixels.dtype == torch.uint8
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        labels += label.tolist()
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]
    assert batches.files.skipped == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_counts_what_it_replaces(root: Path, workers: int) -> None:
    (root / "train" / "cat" / "2.png").write_bytes(b"x")
    train, _ = images.splits(root)
    batches = image_loader.loader(train, 6, 8, training=True, workers=workers, seed=0, pin=False)
    (pixels, labels), *rest = batches
    assert not rest
    assert len(pixels) == 6
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 1, 1]  # dog/0.png stands in
    assert batches.files.skipped == 1


def test_loader_needs_a_batch(root: Path) -> None:
    train, val = images.splits(root)
    with pytest.raises(BenchError, match="train: expected at least 7 images, one batch; got 6"):
        image_loader.loader(train, 7, 8, training=True, workers=0, seed=0, pin=False)
    (_, labels), *rest = image_loader.loader(val, 7, 8, training=False, workers=0, seed=0, pin=False)
    assert labels.tolist() == [0, 1]
    assert not rest


def test_crops_lie_within_and_vary() -> None:
    torch.manual_seed(0)
    boxes = [image_loader.random_box(40, 30) for _ in range(500)]
    areas = [(right - left) * (lower - upper) / 1200 for left, upper, right, lower in boxes]
    assert all(0 <= left < right <= 40 and 0 <= upper < lower <= 30 for left, upper, right, lower in boxes)
    assert min(areas) < 0.12
    assert 0.35 < sum(areas) / len(areas) < 0.54  # uniform from 0.08 to 1, but large ones often do not fit
    assert image_loader.random_box(1000, 1) == (499, 0, 500, 1)  # no such aspect: the middle


def test_normalized() -> None:
    bytes_ = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4).contiguous()
    found = images.normalized(bytes_.to(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    exact = (torch.tensor([0.0, 128 / 255, 1.0]) - torch.tensor(images.MEAN)) / torch.tensor(images.STD)
    torch.testing.assert_close(found[1, :, 2, 3], exact)
