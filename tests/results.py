"""Results made by hand, for tests of what is made of results. Never a measurement."""

import math
import random
from pathlib import Path
from typing import Any

from bench.files import write_json
from bench.summary import ITEMSIZE, fill_ratios

Row = dict[str, Any]
GPU = "NVIDIA Pretend 9000"
COPY = 4000.0  # GB/s
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "commit": "0123456789abcdef0123456789abcdef01234567"}
MACHINE = {"device": GPU, "cpu": "Pretend CPU", "threads": 4, "python": "3.12.3", "cuda": "13.0"} | VERSIONS
LAYERS = [
    ((256, 64, 112, 112), 1), ((256, 64, 56, 56), 6), ((256, 256, 56, 56), 4), ((256, 128, 28, 28), 7),
    ((256, 512, 28, 28), 5), ((256, 256, 14, 14), 11), ((256, 512, 7, 7), 5), ((256, 2048, 7, 7), 4),
]  # fmt: skip
PASSES = {"bn": (2, 3), "bn+relu": (2, 3), "bn+add+relu": (3, 4), "bn+sigmoid": (2, 3)}
SPEEDS = {"tritonbn": 0.9, "eager": 0.5, "eager-no-cudnn": 0.35, "compile": 0.7, "compile-max-autotune": 0.75}


def row(shape: tuple[int, ...] = (256, 64, 56, 56), provider: str = "tritonbn", us: float | None = 100.0,
        **other: Any) -> Row:  # fmt: skip
    """A row of ops.json, timed unless `us` is None."""
    made: Row = {
        "set": "resnet50-256", "shape": list(shape), "count": 1, "layout": "nchw", "dtype": "bf16", "epilogue": "bn",
        "direction": "forward", "provider": provider, "us": us, "us_low": us and us * 0.98, "us_high": us and us * 1.05,
        "timed_by": "graph", "slots": 4, "cold": True, "ratio_to_best_peer": None, "peak_bytes": 0,
        "plan": "single [8, 256]" if provider == "tritonbn" else None, "path": None, "error": None, "gpu": GPU,
    } | VERSIONS | other  # fmt: skip
    one_way = PASSES[made["epilogue"]][made["direction"] == "backward"]
    made["floor_bytes"] = one_way * math.prod(shape) * ITEMSIZE[made["dtype"]]
    made["gb_per_s"] = us and made["floor_bytes"] / us / 1e3
    made["percent_of_floor"] = us and 100 * made["gb_per_s"] / COPY
    return made


def network(seed: int = 0, **other: Any) -> list[Row]:
    """Rows of every provider on some layers of ResNet-50, with noise and launch cost, so that plots look like plots."""
    noise = random.Random(seed)
    rows = []
    for shape, count in LAYERS:
        for layout in ("nchw", "channels_last"):
            for epilogue in ("bn", "bn+relu", "bn+add+relu"):
                for direction in ("forward", "backward"):
                    for provider, speed in SPEEDS.items():
                        kind = {"layout": layout, "epilogue": epilogue, "direction": direction, "count": count} | other
                        floor_us = row(shape, us=None, **kind)["floor_bytes"] / COPY / 1e3
                        us = floor_us / (speed * noise.uniform(0.8, 1.05)) + 4
                        rows.append(row(shape, provider, us, **kind))
    fill_ratios(rows)  # type: ignore[arg-type]
    return rows


def wall(ours: float = 20.0, eager: float = 30.0) -> list[Row]:
    kind = {"set": "mnist", "layout": "nc", "dtype": "fp32", "epilogue": "bn+sigmoid", "timed_by": "wall", "count": 3}
    return [row((60, 100), name, us, **kind) for name, us in (("tritonbn", ours), ("eager", eager))]


def ops(rows: list[Row], wall: list[Row], **machine: Any) -> Row:
    facts = MACHINE | {"copy_gb_per_s": COPY, "l2_bytes": 1 << 26, "peers_absent": {"apex": "no module apex"}} | machine
    return {"machine": facts, "rows": rows, "wall": wall}


def write(folder: Path, **files: Any) -> Path:
    """The files, by name, in a new folder; tuned_ops is tuned/ops.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_json(folder / f"{name.replace('_', '/')}.json", content)
    return folder
