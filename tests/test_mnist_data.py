"""Where MNIST comes from, and what is said when it is missing or broken."""

import gzip
import hashlib
import io
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")

from bench import mnist_data, mnist_download
from bench.errors import BenchError
from tests import idx_files

FILES = idx_files.contents(train=80, test=20)
IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = idx_files.NAMES


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gz"])
@pytest.mark.parametrize("place", ["", "MNIST/raw"], ids=["here", "torchvision"])
def test_folder_is_read(tmp_path: Path, packed: bool, place: str) -> None:
    idx_files.write(tmp_path / place, FILES, packed)
    data = mnist_data.load(tmp_path)
    images, labels = idx_files.patterns(80, seed=1)
    assert torch.equal(data.train.images, torch.from_numpy(images).flatten(1).float() / 255)
    assert data.train.labels.tolist() == labels.tolist()
    assert (len(data.train), len(data.test)) == (80, 20)
    assert "other than the original" in data.name


def test_pixels_are_on_from_128(tmp_path: Path) -> None:
    images, labels = idx_files.patterns(1, seed=1)
    images[0, 0, :4] = (0, 127, 128, 255)
    files = {IMAGES: idx_files.image_file(images), LABELS: idx_files.label_file(labels)}
    data = mnist_data.load(idx_files.write(tmp_path, FILES | files))
    assert data.train.images[0, :4].tolist() == [0, 0, 1, 1]


def test_original_files_are_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust(monkeypatch, FILES)
    assert mnist_data.load(idx_files.write(tmp_path, FILES)).name == "MNIST"


def broken(name: str, change: Callable[[bytes], bytes]) -> dict[str, bytes]:
    return FILES | {name: change(FILES[name])}


BROKEN = [
    pytest.param(
        broken(IMAGES, lambda content: content[:10]),
        IMAGES,
        "header of 16 bytes, got 10 bytes",
        id="no-header",
    ),
    pytest.param(
        broken(IMAGES, lambda content: struct.pack(">I", 2049) + content[4:]),
        IMAGES,
        "magic number 2051, got 2049",
        id="image-magic",
    ),
    pytest.param(
        broken(TEST_LABELS, lambda content: struct.pack(">I", 7) + content[4:]),
        TEST_LABELS,
        "magic number 2049, got 7",
        id="label-magic",
    ),
    pytest.param(
        broken(TEST_IMAGES, lambda content: content[:8] + struct.pack(">2I", 32, 32) + content[16:]),
        TEST_IMAGES,
        "28x28, got 32x32",
        id="dimensions",
    ),
    pytest.param(
        broken(IMAGES, lambda content: content[:-1]),
        IMAGES,
        f"{16 + 80 * 784} bytes by its own header, got",
        id="short",
    ),
    pytest.param(
        broken(LABELS, lambda content: content + b"\0"),
        LABELS,
        "88 bytes by its own header, got 89",
        id="long",
    ),
    pytest.param(
        broken(LABELS, lambda content: content[:-1] + b"\x0a"),
        LABELS,
        "labels from 0 to 9, got 10",
        id="label-range",
    ),
    pytest.param(
        broken(LABELS, lambda content: struct.pack(">2I", 2049, 79) + content[9:]),
        LABELS,
        f"expected 80 labels, as many as images in .*{IMAGES}.*, got 79",
        id="counts",
    ),
    pytest.param(
        FILES | {TEST_IMAGES: struct.pack(">4I", 2051, 0, 28, 28), TEST_LABELS: struct.pack(">2I", 2049, 0)},
        TEST_IMAGES,
        "at least one image, got none",
        id="empty",
    ),
]


@pytest.mark.parametrize(("files", "name", "message"), BROKEN)
@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gz"])
def test_broken_file_is_named(tmp_path: Path, files: dict[str, bytes], name: str, message: str, packed: bool) -> None:
    idx_files.write(tmp_path, files, packed)
    with pytest.raises(BenchError, match=f"{name}.*{message}"):
        mnist_data.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda packed: packed[:-20], id="truncated"),
        pytest.param(lambda packed: packed[:40] + bytes(20) + packed[60:], id="garbled"),
        pytest.param(lambda packed: packed[:2] + b"\xff" + packed[3:], id="method"),
    ],
)
def test_corrupt_gzip_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = idx_files.write(tmp_path, FILES, packed=True) / f"{TEST_IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BenchError, match=f"{TEST_IMAGES}.gz: expected a whole gzip file, got a corrupt one"):
        mnist_data.load(tmp_path)


def test_false_gzip_is_named(tmp_path: Path) -> None:
    path = idx_files.write(tmp_path, FILES, packed=True) / f"{LABELS}.gz"
    path.write_bytes(FILES[LABELS])
    with pytest.raises(BenchError, match=f"{LABELS}.gz: is named .gz but is no gzip file"):
        mnist_data.load(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    (idx_files.write(tmp_path, FILES) / LABELS).unlink()
    with pytest.raises(BenchError, match=f"{LABELS}: expected this file or its .gz"):
        mnist_data.load(tmp_path)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="nowhere: expected a folder, got nothing"):
        mnist_data.load(tmp_path / "nowhere")


def trust(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(mnist_download, "SHA256", sums)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a first mirror that has nothing before the one in tmp_path/mirror."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trust(monkeypatch, FILES)
    idx_files.write(tmp_path / "mirror", FILES, packed=True)
    monkeypatch.setattr(mnist_download, "MIRRORS", tuple(f"{(tmp_path / at).as_uri()}/" for at in ("no", "mirror")))
    return tmp_path / "cache" / "tritonbn" / "mnist"


def test_download_fills_the_cache_and_the_cache_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded = mnist_data.load(None)
    assert downloaded.name == "MNIST"
    assert sorted(path.name for path in cache.iterdir()) == sorted(f"{name}.gz" for name in FILES)
    monkeypatch.setattr(mnist_download, "MIRRORS", ())
    again = mnist_data.load(None)
    assert str(cache) in again.origin
    assert torch.equal(again.train.images, downloaded.train.images)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x1f\x8bnot gzip", gzip.compress(b"other bytes")],
    ids=["empty", "not-gzip", "other"],  # not the bytes: gzip writes the time into them, and workers must agree
)
def test_damaged_cache_is_fetched_anew(cache: Path, content: bytes) -> None:
    cache.mkdir(parents=True)
    (cache / f"{LABELS}.gz").write_bytes(content)
    assert mnist_data.load(None).name == "MNIST"
    assert gzip.decompress((cache / f"{LABELS}.gz").read_bytes()) == FILES[LABELS]


def test_download_goes_on_without_a_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.parent.parent.write_text("a file where the cache would be")
    assert mnist_data.load(None).name == "MNIST"
    assert "Not kept for the next run" in capsys.readouterr().out


class Interrupted(io.BytesIO):
    headers: dict[str, str] = {}  # noqa: RUF012

    def read(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise KeyboardInterrupt
        return super().read(10)


def test_interrupted_download_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(url: str, timeout: float) -> Any:
        return Interrupted(gzip.compress(FILES[IMAGES]))

    monkeypatch.setattr("urllib.request.urlopen", opened)
    with pytest.raises(KeyboardInterrupt):
        mnist_data.load(None)
    assert not cache.exists() or not list(cache.iterdir())


def test_interrupted_write_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, content: bytes) -> None:
        path.open("wb").write(content[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        mnist_data.load(None)
    assert not list(cache.iterdir())


def test_wrong_bytes_from_a_mirror_end_in_the_digits(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    trust(monkeypatch, dict.fromkeys(FILES, b""))
    data = mnist_data.load(None)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "wrong checksum" in said
    assert "scikit-learn's digits instead" in said
    assert not cache.exists()
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.train.images.shape == (1437, 784)
    assert set(data.train.images.flatten().tolist()) == {0, 1}
    assert torch.equal(data.test.labels, mnist_data.digits().test.labels)


def test_digits_are_tested_on_others_than_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    numbered = datasets.load_digits()
    numbered.target = torch.arange(1797).numpy()  # each label tells which example it is
    monkeypatch.setattr(datasets, "load_digits", lambda: numbered)
    data = mnist_data.digits()
    assert torch.equal(torch.cat([data.train.labels, data.test.labels]).sort().values, torch.arange(1797))


def test_silent_mirror_is_left_in_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist_download, "SECONDS_TO_ANSWER", 0.1)
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: time.sleep(2))
    start = time.perf_counter()
    with pytest.raises(mnist_download.DownloadError, match=r"no answer within 0\.1 s"):
        mnist_download.cached_or_downloaded()
    assert time.perf_counter() - start < 1
