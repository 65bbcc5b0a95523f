"""The results in a folder: every JSON file, read and checked before anything is made of it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from bench.errors import BenchError

RESULTS = Path(__file__).parent.parent / "results"

# What the page needs of each kind of file, by its name. Others are read, and named only.
MACHINE = {"device", "commit"}
NEEDED = {
    "machine": MACHINE,
    "steps": {"steps"},
    "mnist": {"machine", "settings", "data", "check", "kernels_compared", "arms"},
    "study-mnist": {"machine", "settings", "data", "expected", "check", "kernels_compared", "notes", "arms"},
    "study-covariate-shift": {"machine", "settings", "data", "figures", "notes"},
    "bandwidth": {"machine", "rows", "constants"},
    "tune": {"machine", "rows"},
    "ops": {"machine", "rows", "wall"},
    "overhead": {"machine", "rows", "stubbed"},
    "study-inception": {"machine", "command", "settings", "data", "target", "lines", "norms_agree", "runs"},
    "models": {"machine", "settings", "rows", "tax", "with_data", "left_out"},
}
ROW = {
    "set", "shape", "count", "layout", "dtype", "epilogue", "direction", "provider", "us", "us_low", "us_high",
    "timed_by", "cold", "floor_bytes", "gb_per_s", "percent_of_floor", "ratio_to_best_peer", "plan", "error",
}  # fmt: skip
WALL = {"set", "shape", "layout", "dtype", "epilogue", "direction", "provider", "us", "us_low", "us_high", "error"}
ARM = {
    "arm", "seed", "steps", "steps_per_second", "images_per_second", "step_time_to_none", "test_accuracy",
    "steps_to_90",
}  # fmt: skip
# Of one arm of a network in one setting, of its BN tax, and with a loader of real images.
STEP_ARM = {"model", "batch", "image", "layout", "dtype", "mode", "direction", "provider", "processes", "error"}
STEP = STEP_ARM | {
    "ms", "ms_low", "ms_high", "forward_ms", "backward_ms", "optimizer_ms", "images_per_second", "speedup",
    "speedup_low", "speedup_high", "first_step_s", "peak_bytes", "shares", "kernels", "norms", "swapped", "fused",
    "left", "folded", "difference", "deviation", "agrees", "finite", "stable", "warm_up_steps", "notes",
}  # fmt: skip
TAX = (STEP_ARM - {"batch", "error"}) | {"points", "fixed_ms", "per_example_us", "pass_bytes"}
READ = STEP_ARM | {
    "data", "workers", "images_per_second", "images_per_second_low", "images_per_second_high", "waiting", "skipped",
}  # fmt: skip
ROWS = {
    "models": {"rows": STEP, "tax": TAX, "with_data": READ},
    "ops": {"rows": ROW, "wall": WALL},
    "bandwidth": {"rows": {"what", "bytes", "us", "us_low", "us_high", "timed_by", "error"}},
    "tune": {"rows": {"operation", "layout", "shape", "itemsize", "path", "us", "predicted_us", "before", "after"}},
    "overhead": {"rows": {"case", "launches", "us", "parts_us"}},
    "steps": {"steps": {"name", "result", "seconds", "last_line", "commit"}},
    "mnist": {"arms": ARM},
    "study-mnist": {"arms": ARM | {"drift"}},
    "study-covariate-shift": {"figures": {"explanation", "name", "unit", "without", "with_bn"}},
    "study-inception": {
        "lines": {"arm", "norm", "seeds", "steps_to_target", "seconds_to_target", "fewer_steps", "fewer_seconds",
                  "ms_per_step", "best", "best_step", "best_top5", "diverged_at", "paper", "agrees"},
        "runs": {"arm", "norm", "seed", "inference"},
    },
}  # fmt: skip


class Folder(NamedTuple):
    """The results of one machine."""

    name: str
    prefix: str  # of links on the page to files in this folder
    path: Path
    files: dict[str, Any]  # content by path in the folder, without .json

    def gpu(self, name: str) -> str | None:
        """The GPU that the figures in a file are of; None without such a file, and for figures of a CPU."""
        device = self.files[name]["machine"]["device"] if name in self.files else "CPU"
        return None if device == "CPU" else str(device)


def read(root: Path) -> list[Folder]:
    """The folders in `root` that hold JSON files, by name; `root` alone where it holds some itself."""
    if not root.is_dir():
        raise BenchError(f"--results {root}: expected a folder, got {'a file' if root.exists() else 'nothing'}")
    if any(root.glob("*.json")):
        return [folder(root, "")]
    found = (folder(path, f"{path.name}/") for path in sorted(root.iterdir()) if path.is_dir())
    return [each for each in found if each.files]


def folder(path: Path, prefix: str) -> Folder:
    files = {str(file.relative_to(path).with_suffix("")): file for file in sorted(path.rglob("*.json"))}
    return Folder(path.resolve().name, prefix, path, {name: content(file) for name, file in files.items()})


def content(path: Path) -> Any:
    """What the file holds, with all that the page needs of it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: expected JSON, got {error}") from None
    check(str(path), found, NEEDED.get(path.stem, set()))
    if isinstance(found, dict) and "machine" in found:
        check(f"{path}, machine", found["machine"], MACHINE)
    for part, needed in ROWS.get(path.stem, {}).items():
        if not isinstance(found[part], list):
            raise BenchError(f"{path}, {part}: expected a list, got {type(found[part]).__name__}")
        for index, row in enumerate(found[part]):
            check(f"{path}, {part}[{index}]", row, needed)
    return found


def check(where: str, found: Any, needed: set[str]) -> None:
    if needed and not isinstance(found, dict):
        raise BenchError(f"{where}: expected an object, got {type(found).__name__}")
    if needed and not needed <= found.keys():
        missing = ", ".join(sorted(needed - found.keys()))
        raise BenchError(f"{where}: expected {', '.join(sorted(needed))}; missing: {missing}")
