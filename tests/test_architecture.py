"""Rules about structure, as tests."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tritonbn
from tritonbn import launch, pair_launch

ROOT = Path(__file__).resolve().parent.parent
# A file imports only from files further right.
ORDER = [
    "__init__",
    "tuning",
    "explain",
    "recalibrate",
    "layers",
    "swap",
    "report",
    "fold",
    "ways",
    "uses",
    "fused_forward",
    "interpreter",
    "rewrite",
    "expressions",
    "step",
    "certainty",
    "timm",
    "types",
    "source",
    "liveness",
    "modules",
    "functional",
    "pair",
    "operators",
    "autograd",
    "dispatch",
    "calibrating",
    "plan_timing",
    "probes",
    "timing",
    "pair_launch",
    "launch",
    "planning",
    "handles",
    "occupancy",
    "reference",
    "activations",
    "tickets",
    "plan",
    "model",
    "cost",
    "traffic",
    "calibration",
    "tables",
    "store",
    "choice",
    "device",
    "geometry",
    "private",
    "version",
    "kernels",
]
KERNEL_ORDER = [
    "probes",
    "pair",
    "cooperative",
    "normalize",
    "backward",
    "gradients",
    "activations",
    "statistics",
    "tiles",
]
KERNELS = {name: k for name, k in (vars(launch) | vars(pair_launch)).items() if name.endswith("_kernel")}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports; relative ones with their dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", sources("tritonbn"), ids=lambda path: path.stem)
def test_data_flows_downhill(path: Path) -> None:
    below = ORDER[ORDER.index(path.stem) + 1 :]
    parts = [name.split(".") for name in imports(path)]
    assert not [name for name in parts if not name[0]], "relative imports hide where they lead"
    assert not [name for name in parts if name[0] == "tritonbn" and len(name) > 1 and name[1] not in below]


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda path: path.stem)
def test_kernels_import_triton_and_siblings_only(path: Path) -> None:
    below = KERNEL_ORDER[KERNEL_ORDER.index(path.stem) + 1 :]
    for name in imports(path):
        first, second, *_ = [*name.split("."), ""]
        assert first == "triton" or (first == "" and second in below), name


@pytest.mark.parametrize(
    "name", ["plan", "model", "cost", "traffic", "calibration", "tables", "store", "choice", "device", "geometry"]
)
def test_plans_are_pure_python(name: str) -> None:
    found = imports(ROOT / "tritonbn" / f"{name}.py")
    assert not {n for n in found if n.split(".")[0] in ("torch", "triton") or n.startswith("tritonbn.kernels")}


def test_nothing_imports_the_other_kernels_package() -> None:
    files = [path for folder in ("tritonbn", "bench", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in files if {n for n in imports(path) if n.split(".")[0] == "kernels"}]


def test_kernels_are_a_linked_namespace() -> None:
    link = ROOT / "tritonbn" / "kernels"
    assert link.is_symlink()
    assert str(link.readlink()) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernel_docstring_has_its_facts(name: str) -> None:
    """Formula, who owns what, shapes and dtypes, bytes moved."""
    doc = KERNELS[name].fn.__doc__
    assert "=" in doc.splitlines()[0]
    for fact in (r"Program \(?i", r"\[R, L\] any float", r"\[C\]", r"[Rr]eads (x|dy)"):
        assert re.search(fact, " ".join(doc.split())), fact


@pytest.mark.parametrize("path", [*sources("tritonbn"), *sources("kernels")], ids=lambda path: path.name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            documentation = len((ast.get_docstring(node, clean=False) or "").splitlines())
            assert (node.end_lineno or 0) - node.lineno - documentation < 60, node.name


def test_public_names_exist_and_are_documented() -> None:
    for name in tritonbn.__all__:
        assert getattr(tritonbn, name).__doc__, name


def test_import_needs_neither_bench_nor_tests_nor_extras() -> None:
    script = (
        "import sys, tritonbn; extras = {'bench', 'tests', 'rich', 'matplotlib', 'sklearn', 'pytest', 'torchvision'};"
        "print(sorted(extras & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_import_starts_no_compiler() -> None:
    """It would take four times as long."""
    script = "import sys, tritonbn; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_repository_names_no_machine_and_no_registry() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    # Spelled in two halves, so that this file passes its own test.
    unwanted = re.compile("|".join(("/wo" + "rk/", "/ro" + "ot/", "py" + "pi.org", "python" + "hosted")))
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    texts = [p for p in paths if p.is_file() and p.suffix in {".py", ".md", ".toml", ".txt", ".yml", ".json", ""}]
    assert not [str(p) for p in texts if unwanted.search(p.read_text(errors="replace"))]
