"""`python -m bench models`: settings, arms and their rows, on a network of two layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("PIL", reason="the benchmarks are an extra: pip install -e .[bench]")

from PIL import Image

from bench.__main__ import main, parse
from bench.models import arms, firsts, steps, turns
from bench.models.crew import Crew
from bench.models.measured import Bench, Comparison
from bench.models.settings import Setting, fill_in, settings
from bench.models.steps import Work
from bench.networks import zoo
from tritonbn.timing import measuring

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = Setting("tiny", 4, 8, "nchw", "fp32", "eager", "training")
CLASSES = 3


def tiny(classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (3, 4):
        layers += [nn.Conv2d(inputs, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.OWN, "tiny", zoo.Network(tiny, CLASSES, side=8))


def run(out: Path, *words: str, code: int = 0) -> dict[str, Any]:
    """What the command writes about the tiny network."""
    fixed = ("--model", "tiny", "--batch", "4", "--dtype", "fp32", "--steps", "2", "--out", str(out))
    assert main(["models", *fixed, *words]) == code
    found: dict[str, Any] = json.loads((out / "models.json").read_text())
    return found


def chosen(*words: str, cuda: bool = False) -> list[Setting]:
    args = parse(["models", *words])
    fill_in(args, cuda)
    return settings(args)


def compared(setting: Setting = TINY, providers: tuple[str, ...] = ("torch", "tritonbn")) -> dict[str, Any]:
    """The rows, by provider."""
    comparison = Comparison(setting, providers, Bench(DEVICE, 2, Crew()))
    with measuring(DEVICE):
        comparison.measure()
    return comparison.rows


def test_rows_hold_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = run(tmp_path, "--mode", "eager", "--layout", "channels_last")
    rows = {(row["direction"], row["provider"]): row for row in content["rows"]}
    training = ["none", "torch", "torch-again", "tritonbn", "fused"]
    assert list(rows) == [
        *(("training", name) for name in training),
        *(("inference", name) for name in [*training, "torch-folded", "tritonbn-folded"]),
    ]
    for (direction, name), row in rows.items():
        assert row["error"] is None, name
        assert row["finite"], name
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["images_per_second"] == pytest.approx(4000 / row["ms"])
        assert (row["forward_ms"] is not None) is (direction == "training")
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["bn_elements"] == 2 * 4 * 8 * 8
        assert row["agrees"] is (None if name == "none" else True), row["difference"]
        assert name == "none" or row["deviation"] < 1e-2
        assert row["steps"] >= 2
    layers = ("norms", "swapped", "fused", "folded", "left")
    found = {name: tuple(rows["inference", name][what] for what in layers) for _, name in rows}
    assert found == {
        "none": (2, 0, 0, 0, 0), "torch": (2, 0, 0, 0, 2), "torch-again": (2, 0, 0, 0, 2), "tritonbn": (2, 2, 0, 0, 0),
        "fused": (2, 2, 2, 0, 0), "torch-folded": (2, 0, 0, 2, 0), "tritonbn-folded": (2, 0, 0, 2, 0),
    }  # fmt: skip
    assert rows["training", "none"]["shares"]["batch norm"] == 0 < rows["training", "torch"]["shares"]["batch norm"]
    assert {rows[key]["speedup"] for key in rows if key[1] == "torch"} == {1.0}
    assert content["machine"]["commit"]
    assert content["settings"]["input"] == "random numbers"
    printed = capsys.readouterr().out
    assert "input: random numbers" in printed
    assert "tiny, training, batch 4 of 8x8, channels_last, fp32, eager" in printed
    assert f"Written: {tmp_path / 'models.json'}, {tmp_path / 'models.png'}" in printed


def test_warm_up_leaves_no_trace() -> None:
    """The first losses are those of a network that was never run before."""
    rows = compared()
    torch.manual_seed(arms.SEED)
    begin = arms.start(TINY, DEVICE)
    parameters = list(begin.network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=steps.LEARNING_RATE, momentum=steps.MOMENTUM)
    losses = []
    for _ in range(firsts.STEPS):
        loss = cross_entropy(begin.network(begin.x), begin.y)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] != losses[1]
    for row in rows.values():
        assert row["first_losses"] == pytest.approx(losses, rel=1e-3)


def test_state_comes_back_in_place() -> None:
    begin = arms.start(TINY, DEVICE)
    work = Work(begin.network, begin.x, begin.y, TINY)
    state, places = work.state(), [t.data_ptr() for t in begin.network.state_dict().values()]
    turns.warm_up(work, DEVICE)
    assert work.optimizer is not None
    moved = [name for name, t in begin.network.state_dict().items() if not torch.equal(t.cpu(), state[name])]
    assert {"0.weight", "1.running_mean", "1.num_batches_tracked"} <= {*moved}
    work.restore(state)
    for name, tensor in begin.network.state_dict().items():
        assert torch.equal(tensor.cpu(), state[name]), name
    assert [t.data_ptr() for t in begin.network.state_dict().values()] == places
    buffers = [kept["momentum_buffer"] for kept in work.optimizer.state.values()]
    assert len(buffers) == len(list(begin.network.parameters()))
    assert not any(buffer.any() for buffer in buffers)


def test_one_example_is_enough_for_inference(tmp_path: Path) -> None:
    """Training needs two here: torch says so for all, and that is no failure of ours."""
    words = ("--model", "mnist-mlp", "--batch", "1", "--dtype", "fp32", "--mode", "eager", "--steps", "1")
    assert main(["models", *words, "--provider", "torch,tritonbn", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "models.json").read_text())["rows"]
    (training,) = {row["error"] for row in rows if row["direction"] == "training"}
    assert training.startswith("ValueError: Expected more than 1 value per channel when training")
    assert all(row["images_per_second"] > 0 and row["agrees"] for row in rows if row["direction"] == "inference")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_what_a_device_cannot_do_is_a_row_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, "--mode", "graph", "--training")["rows"]
    assert [row["error"] for row in rows] == ["not here: CUDA graphs need a GPU"] * 5
    assert "not here: CUDA graphs need a GPU" in capsys.readouterr().out


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_graphs_do_what_eager_steps_do() -> None:
    eager = compared(providers=("none", "torch", "tritonbn", "fused"))
    mode = Setting("tiny", 4, 8, "nchw", "fp32", "graph", "training")
    for name, row in compared(mode, ("none", "torch", "tritonbn", "fused")).items():
        assert row["error"] is None, name
        assert row["forward_ms"] is None
        assert row["first_losses"] == pytest.approx(eager[name]["first_losses"], rel=1e-4)


def test_compiled_arms_are_measured_too() -> None:
    row = compared(Setting("tiny", 4, 8, "nchw", "fp32", "compile", "training"), ("none",))["none"]
    assert row["error"] is None
    assert 1e3 * row["first_step_s"] > 10 * row["ms"], "the compiler is in the first step"
    assert not [note for note in row["notes"] if "compiled again" in note]


def failing(monkeypatch: pytest.MonkeyPatch, provider: str, error: Exception) -> None:
    """Let a provider's network fail in its forward."""
    build = arms.network_of

    def fail(*_: object) -> None:
        raise error

    def network_of(name: str, begin: arms.Start) -> nn.Module:
        network = build(name, begin)
        if name == provider:
            network.register_forward_pre_hook(fail)
        return network

    monkeypatch.setattr(arms, "network_of", network_of)


FULL = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which"


@pytest.mark.parametrize(
    ("provider", "error", "text", "code"),
    [
        pytest.param(
            "fused", torch.OutOfMemoryError(FULL),
            "out of memory at batch 4: CUDA out of memory. Tried to allocate 20.00 GiB", 1, id="memory-of-ours",
        ),
        pytest.param("torch", torch.OutOfMemoryError(FULL), "out of memory at batch 4: CUDA", 0, id="memory-of-torch"),
        pytest.param("tritonbn", ValueError("no\nway"), "ValueError: no", 1, id="ours"),
        pytest.param("none", RuntimeError("no way"), "RuntimeError: no way", 0, id="theirs"),
    ],
)  # fmt: skip
def test_a_failure_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str, error: Exception, text: str, code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    failing(monkeypatch, provider, error)
    words = ("--mode", "eager", "--training", "--provider", f"torch,{provider}")
    rows = {row["provider"]: row for row in run(tmp_path, *words, code=code)["rows"]}
    assert rows[provider]["error"].startswith(text)
    assert rows[provider]["ms"] is None
    assert rows[provider]["batch"] == 4
    assert all(row["ms"] > 0 and row["error"] is None for name, row in rows.items() if name != provider)
    printed = capsys.readouterr().out
    assert f"{provider}: {text}" in printed
    assert ("FAILED" in printed) is (code == 1)


def test_memory_that_ran_out_in_a_capture_is_named() -> None:
    try:
        try:
            raise torch.OutOfMemoryError(FULL)
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as error:
        text = Comparison(TINY, ("torch",), Bench(DEVICE, 2, Crew())).explained(error)
    assert text.startswith("out of memory at batch 4")


def test_what_is_not_finite_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "network_of", lambda name, begin: begin.network)
    start = arms.start

    def broken(*given: Any) -> arms.Start:
        begin = start(*given)
        return begin._replace(x=begin.x * float("nan"))

    monkeypatch.setattr(arms, "start", broken)
    row = compared(providers=("torch",))["torch"]
    assert row["error"] == "FloatingPointError: the loss is not finite: not timed"
    assert (row["ms"], row["finite"]) == (None, False)


class Fake(Work):
    """One step takes as long as it is told; every step writes its name into a list."""

    def __init__(self, name: str, log: list[str], fails_at: int | None = None) -> None:
        self.name, self.log, self.fails_at, self.training, self.graph = name, log, fails_at, False, None

    def step(self, mark: Callable[[], None] = lambda: None) -> None:
        mark()
        self.log.append(self.name)
        if self.log.count(self.name) == self.fails_at:
            raise ValueError("enough")
        mark()


def test_arms_take_turns_in_rotated_order() -> None:
    log: list[str] = []
    works: dict[str, Work] = {name: Fake(name, log) for name in "abc"}
    cpu = torch.device("cpu")
    rounds = list(turns.take_turns(works, 4, cpu, Crew(), lambda *_: pytest.fail("nothing failed")))
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"
    assert [{name: tuple(times.shape) for name, times in found.items()} for found in rounds] == [
        dict.fromkeys("abc", (turns.CPU.block, 1))
    ] * 4


def test_an_arm_that_fails_in_its_turn_is_left_out_from_then_on() -> None:
    log, failed = list[str](), list[str]()
    works: dict[str, Work] = {"a": Fake("a", log), "b": Fake("b", log, fails_at=2), "c": Fake("c", log)}
    told = lambda name, error: failed.append(f"{name}: {error}")  # noqa: E731
    rounds = list(turns.take_turns(works, 4, torch.device("cpu"), Crew(), told))
    assert failed == ["b: enough"]
    assert [sorted(found) for found in rounds] == [["a", "b", "c"], ["a", "c"], ["a", "c"], ["a", "c"]]
    assert log.count("b") == 2
    assert log.count("a") == log.count("c") == 4


def test_ratios_are_by_round() -> None:
    ours = [torch.tensor([[1.0, 1.0], [1.0, 3.0], [50.0, 50.0]]), torch.tensor([[4.0, 1.0]])]
    theirs = [torch.tensor([[4.0, 4.0]]), torch.tensor([[5.0, 5.0]])]
    found = turns.ratios(ours, theirs)  # medians 4 and 5; 8 and 10
    assert found == (2.0, 2.0, 2.0)
    assert turns.ratios(ours[:1], [torch.tensor([[6.0, 0.0]])]).median == 1.5


def test_settings_come_in_the_order_of_their_importance() -> None:
    found = chosen(
        "--mode", "compile,eager", "--model", "tiny", "--model", "resnet18", "--batch", "2,8", "--image", "16"
    )
    names = [(s.mode, s.model, s.batch, s.direction) for s in found]
    assert names[:4] == [
        ("eager", "tiny", 2, "training"), ("eager", "tiny", 2, "inference"),
        ("eager", "tiny", 8, "training"), ("eager", "tiny", 8, "inference"),
    ]  # fmt: skip
    assert len(names) == len(set(names)) == 16
    assert [mode for mode, *_ in names] == ["eager"] * 8 + ["compile"] * 8
    assert {s.image for s in found} == {16}


def test_defaults_depend_on_the_device() -> None:
    (cpu, *_), gpu = chosen(), chosen(cuda=True)
    assert (cpu.model, cpu.batch, cpu.image, cpu.layout, cpu.dtype, cpu.mode) == (
        "resnet50",
        4,
        224,
        "nchw",
        "fp32",
        "eager",
    )
    assert {(s.batch, s.layout, s.dtype) for s in gpu} == {(256, "channels_last", "bf16")}
    assert [s.mode for s in gpu if s.training] == ["eager", "graph", "compile", "compile-graph"]
    assert [s.batch for s in chosen("--tax")] == [16, 32, 64, 128, 256, 512]
    assert {s.layout for s in chosen("--model", "mnist-mlp")} == {"nc"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "resnet5"), "--model resnet5: expected one of resnet50, "),
        (("--model", "torchvision/"), "--model torchvision/: expected one of resnet50, "),
        (("--workers", "-1"), "--workers -1: expected 0 or more"),
        (("--budget", "nan"), "--budget nan: expected seconds, 0 or more"),
        (("--threads", "100000"), "--threads 100000: expected at most"),
        (("--ddp",), "--ddp: expected processes started by torchrun"),
        (("--data", "nowhere"), "--data nowhere: expected a folder, got nothing"),
        (("--device", "tpu"), "--device tpu: expected cpu or cuda"),
    ],
)
def test_bad_options_are_told_in_a_line(
    tmp_path: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "--out", str(tmp_path / "out"), *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch", "4,0"), "expected a whole number from 1, got 0"),
        (("--mode", "eager,fast"), "expected some of eager, graph, compile, compile-graph; got 'fast'"),
        (("--provider", "apex"), "expected some of none, torch, tritonbn, fused; got 'apex'"),
        (("--dtype", "fp8"), "expected some of fp32, bf16, fp16; got 'fp8'"),
        (("--training", "--inference"), "not allowed with argument"),
    ],
)
def test_unknown_choices_are_refused(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["models", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_unwritable_folder_is_told_before_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["models", "--model", "tiny", "--out", str(tmp_path / "file")]) == 2
    assert "expected a folder, got a file" in capsys.readouterr().err


def test_budget_leaves_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = run(tmp_path, "--mode", "eager", "--budget", "0")
    assert content["rows"] == []
    assert [text.split(", ")[:2] for text in content["left_out"]] == [["tiny", "training"], ["tiny", "inference"]]
    assert capsys.readouterr().out.count("left out, the budget was spent: tiny, ") == 2


def image_folder(root: Path, count: int = 6) -> Path:
    """Two classes; one training file is no image."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels: Tensor = torch.randint(256, (12, 10, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{index}.png")
    (root / "train" / "cat" / "broken.jpg").write_bytes(b"no image")
    return root


def test_real_images_are_read_while_steps_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "pets")
    words = ("--mode", "eager", "--provider", "torch", "--data", str(folder), "--workers", "0")
    content = run(tmp_path / "out", *words)
    rows = content["with_data"]
    assert [(row["direction"], row["provider"]) for row in rows][:3] == [
        ("training", "torch"), ("training", "torch-again"), ("inference", "torch"),
    ]  # fmt: skip
    for row in rows:
        assert row["error"] is None
        assert 0 < row["waiting"] < 1
        assert row["images_per_second_low"] <= row["images_per_second"] <= row["images_per_second_high"]
        assert row["data"] == "pets"
        assert (row["skipped"] > 0) is (row["direction"] == "training")
    assert content["settings"]["input"] == "random numbers; rows with data: pets"
    assert "With the images of pets, 0 workers" in capsys.readouterr().out


def test_too_few_images_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "pets", count=1)
    (folder / "train" / "cat" / "other.png").write_bytes((folder / "train" / "cat" / "0.png").read_bytes())
    words = ["--model", "tiny", "--batch", "4", "--steps", "2", "--out", str(tmp_path), "--data", str(folder)]
    assert main(["models", *words]) == 2
    assert "val: expected at least 4 images, one batch; got 2" in capsys.readouterr().err
    assert main(["models", *words[2:], "--model", "mnist-mlp"]) == 2
    assert "--data: expected networks that take images" in capsys.readouterr().err
