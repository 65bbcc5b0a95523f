"""The lines to cross, what each GPU measured, and whether that was enough."""

from collections.abc import Sequence
from typing import Any

from bench.models import tax
from bench.page.folders import Folder
from bench.page.markdown import joined, table
from bench.summary import HEAD, Target, targets

FILES = ("ops", "models", "mnist/models")
OURS = "fused"
STEP = {"direction": "training", "processes": 1}
RESNET50 = STEP | {"model": "resnet50", "batch": 256, "image": 224, "layout": "channels_last", "dtype": "bf16"}
MNIST = STEP | {"model": "mnist-mlp", "batch": 60, "dtype": "fp32"}
RESNET50_STEP = "ResNet-50, training step, bf16, channels_last, batch 256"
MNIST_STEP = "MNIST, training step, fp32, batch 60"
# File, setting, which step, how it is run, and at least how many times as fast as torch's.
STEPS = (
    ("models", RESNET50 | {"mode": "eager"}, RESNET50_STEP, "eager", 1.15),
    ("models", RESNET50 | {"mode": "compile"}, RESNET50_STEP, "torch.compile", 1.0),
    ("mnist/models", MNIST | {"mode": "eager"}, MNIST_STEP, "eager", 1.0),
)
TERMS = """\
Percent of the floor: the time that the fewest possible bytes take at the bandwidth of a plain copy, measured in the
same run, over the time measured; 100 is the speed of a copy. Speed-up: a peer's time over ours, both of the same run;
above 1 we are faster. Means are weighted by how often a network has the layer and by its bytes: those of percents are
all floors over all times, those of speed-ups geometric. Times are medians, with quartiles in parentheses."""


def section(folders: Sequence[Folder]) -> str:
    """The lines and what each GPU measured; "not measured" where there is no figure."""
    found = [(gpu, lines_to_cross(folder)) for folder in folders if (gpu := gpu_of(folder))]
    answers = [lines for _, lines in found] or [lines_to_cross(None)]
    names = [f"{gpu}: " for gpu, _ in found] or [""]
    head = [*HEAD[:2], *(name + what for name in names for what in HEAD[2:])]
    same = zip(*answers, strict=True)
    rows = [(*each[0].cells[:2], *(bold(cell) for answer in each for cell in answer.cells[2:])) for each in same]
    none = "" if found else "**No GPU has been measured yet.**"
    return joined("## Targets", none, table(head, rows), TERMS)


def bold(cell: str) -> str:
    """What was not reached shall be seen."""
    return "**no**" if cell == "no" else cell


def gpu_of(folder: Folder) -> str | None:
    return next((gpu for name in FILES if (gpu := folder.gpu(name))), None)


def lines_to_cross(folder: Folder | None) -> list[Target]:
    """All of them, of one GPU; of figures of a CPU none is measured."""
    gpu = folder and gpu_of(folder)
    files = {name: folder.files[name] for name in FILES if folder.gpu(name) == gpu} if folder and gpu else {}
    ops = files.get("ops", {"rows": [], "wall": []})
    steps = []
    for name, setting, step, how, least in STEPS:
        text = f"{step}: torch's time over ours, fused; both {how}"
        steps.append(faster(files.get(name, {"rows": []})["rows"], setting, text, least))
    return [*targets(ops["rows"], ops["wall"]), *steps, taxed(files.get("models", {"tax": []})["tax"])]


def faster(rows: Sequence[dict[str, Any]], setting: dict[str, Any], text: str, least: float) -> Target:
    """How many times as fast as torch in the same mode, in turns with it."""
    like = setting | {"provider": OURS}
    value = next((row["speedup"] for row in rows if all(row[key] == value for key, value in like.items())), None)
    return Target(text, least, value, None if value is None else value >= least)


def taxed(lines: Sequence[tax.Line]) -> Target:
    """What our batch norm adds to a step of ResNet-50, to what torch's adds."""
    mine = [line for line in lines if all(line[key] == RESNET50[key] for key in tax.KEYS if key != "mode")]
    share = tax.share_of_torchs(mine, OURS, "eager", 256)
    text = f"{RESNET50_STEP}: the time that our batch norm adds, over what torch's adds; both eager"
    return Target(text, 0.5, share, None if share is None else share <= 0.5, at_most=True)
