"""The page of results, piece by piece: each function makes one section of Markdown from one kind of result."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from bench import mnist_tables
from bench.page import bounds, inception, models, study
from bench.page.folders import Folder
from bench.page.markdown import joined, table

# Commands whose files have settings with steps and seeds, by the file.
OF_MNIST = {"mnist": "mnist", "study-mnist": "study mnist", "study-covariate-shift": "study covariate-shift"}
VERSIONS = ("python", "torch", "triton", "cuda", "cudnn", "driver")


def repeat(folders: Sequence[Folder]) -> str:
    """The commands that give each kind of result."""
    commands = [("everything that needs a GPU", "make gpu")]
    for folder in folders:
        for name, command in OF_MNIST.items():
            if name in folder.files:
                chosen = folder.files[name]["settings"]
                options = f"--data DIR --steps {chosen['steps']} --seeds {chosen['seeds']}"
                commands.append((f"{folder.prefix}{name}.json", f"python -m bench {command} {options}"))
        if "study-inception" in folder.files:
            commands.append((f"{folder.prefix}study-inception.json", folder.files["study-inception"]["command"]))
        for name in models.FILES:
            if name in folder.files:
                commands.append((f"{folder.prefix}{name}.json", folder.files[name]["settings"]["command"]))
        if "overhead" in folder.files:
            commands.append((f"{folder.prefix}overhead.json", "python -m bench overhead"))
    commands.append(("this page", "python -m bench report"))
    lines = ((what, f"`{command}`") for what, command in commands)
    return joined("### How to repeat", table(("what", "command"), lines, words=2))


def machines(folders: Sequence[Folder]) -> str:
    """Which machine, versions and commit each file is from."""
    rows = []
    for folder in folders:
        for name, content in folder.files.items():
            facts = content if name == "machine" else content.get("machine") if isinstance(content, dict) else None
            if facts:
                rows.append((f"[{folder.prefix}{name}.json]({folder.prefix}{name}.json)", *described(facts)))
    return joined("## Machines, versions, commits", table(("file", "device", "versions", "commit"), rows, words=4))


def described(facts: dict[str, Any]) -> tuple[str, str, str]:
    """(device, versions, commit)"""
    threads = mnist_tables.counted(facts["threads"], "thread") if "threads" in facts else None
    device = None if facts["device"] == "CPU" else facts["device"]
    versions = (f"{name} {facts[name]}" for name in VERSIONS if facts.get(name))
    place = (part for part in (device, facts.get("cpu"), threads) if part)
    return ", ".join(place), ", ".join(versions), short(facts["commit"])


def short(commit: str | None) -> str:
    """The commit as a reader wants it, still with -dirty where files differed from it."""
    if commit is None:
        return "unknown"
    name, dirty, _ = commit.partition("-dirty")
    return name[:10] + dirty


def mnist(folder: Folder) -> str:
    """The paper's experiment: speed, accuracy, and whether ours follows torch's."""
    content = folder.files["mnist"]
    rows = content["arms"]
    head = [" ".join(title.split()) for title in mnist_tables.COLUMNS]
    failed = [finding["what"] for finding in content["check"] if finding["passed"] is False]
    return joined(
        "### The paper's MNIST experiment",
        f"{mnist_tables.heading(rows, content['data']['name'])}; step time: median (quartiles) over blocks.",
        table(head, mnist_tables.lines(rows, " ")),
        f"**tritonbn does not follow nn.BatchNorm1d: {', '.join(failed)}.**" if failed else "",
        "" if content["kernels_compared"] else f"Mind that {mnist_tables.SWAP_ONLY}.",
        f"![accuracy, and what the last hidden layer sees]({folder.prefix}mnist.png)",
    )


def overhead(folder: Folder) -> str:
    """What a call costs the CPU, and what the cost is made of."""
    content = folder.files["overhead"]
    titles = {
        "torch": "torch", "before": "ours, before", "jit": "ours, launched by Triton's JIT",
        "unfused": "ours, not fused", "ours": "ours",
    }  # fmt: skip
    lines, parts = [], []
    for row in content["rows"]:
        figures = {**row["us"], "before": row.get("before")}
        lines.append((row["case"], row["launches"], *(quartiles(figures.get(name)) for name in titles)))
        if row["parts_us"]:
            parts.append((row["case"], *(f"{us:.1f}" for us in row["parts_us"].values())))
    names = next((list(row["parts_us"]) for row in content["rows"] if row["parts_us"]), [])
    stubbed = (
        " The driver is replaced by one that does nothing: about 3 us a launch are in no figure. torch is its own"
        " function on the same CPU tensors, arithmetic included: for scale, not to compare with."
    )
    return joined(
        "### What a call costs the CPU",
        "Microseconds per call: median (quartiles)." + stubbed * bool(content["stubbed"]),
        table(("call", "launches", *titles.values()), lines),
        "Of which, by difference of medians:" if parts else "",
        table(("call", *names), parts),
    )


def quartiles(figure: dict[str, float] | None) -> str | None:
    return None if figure is None else f"{figure['median']:.1f} ({figure['low']:.1f}-{figure['high']:.1f})"


def steps(folder: Folder) -> str:
    """What `make gpu` ran there. The page itself is one of its steps and cannot tell."""
    found = [step for step in folder.files["steps"]["steps"] if step["name"] != "report"]
    rows = [
        (step["name"], step["result"], step["last_line"], short(step["commit"]), f"{step['seconds']:.0f}")
        for step in found
    ]
    return joined("### What ran", table(("step", "result", "last line", "commit", "seconds"), rows, words=4))


# By the file that each is made of, in the order of the page.
SECTIONS: dict[str, Callable[[Folder], str]] = {
    "steps": steps,
    "mnist": mnist,
    "bandwidth": bounds.bandwidth,
    "tune": bounds.paths,
    "models": models.networks,
    "mnist/models": partial(models.networks, name="mnist/models"),
    "study-mnist": study.mnist,
    "study-inception": inception.section,
    "study-covariate-shift": study.covariate_shift,
    "overhead": overhead,
}
