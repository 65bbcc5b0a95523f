"""What is made of the figures of networks: the BN tax, shares of kernels, tables, the page. None here is measured."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

from bench.__main__ import main
from bench.models import pictures, profiles, rows, tables, tax
from bench.models.profiles import KINDS
from bench.models.settings import Setting
from bench.page import targets
from tests import results

Row = dict[str, Any]
HEADLINE = Setting("resnet50", 256, 224, "channels_last", "bf16", "eager", "training")
BN, ACT, CONV, COPY, OTHER = KINDS
# What a step without batch norm takes, ms + us per image; and what each provider adds to it, us per image.
FIXED, SLOPE = 4.0, 250.0
EXTRA = {"none": 0.0, "torch": 100.0, "torch-again": 100.0, "tritonbn": 50.0, "fused": 40.0}


def row(setting: Setting = HEADLINE, provider: str = "fused", ms: float | None = 50.0, **other: Any) -> Row:
    found = rows.blank(setting, provider, 1) | {"bn_elements": 11_000_000, "norms": 53}
    if ms is not None:
        spread = {"ms_low": 0.98 * ms, "ms_high": 1.02 * ms, "steps": 60, "stable": True, "finite": True}
        found |= {"ms": ms, "images_per_second": 1e3 * setting.batch / ms} | spread
    return found | other


def taxed(batches: tuple[int, ...] = (16, 64, 256), mode: str = "eager", **faster: float) -> list[Row]:
    """Rows of every provider whose times lie on a line over the batch."""
    made = []
    for batch in batches:
        setting = Setting("resnet50", batch, 224, "channels_last", "bf16", mode, "training")
        times = {name: FIXED + batch * (SLOPE + extra) / 1e3 for name, extra in (EXTRA | faster).items()}
        made += [row(setting, name, ms, speedup=times["torch"] / ms, speedup_low=1.0, speedup_high=2.0)
                 for name, ms in times.items()]  # fmt: skip
    return made


def content(made: list[Row], **machine: Any) -> Row:
    chosen = {"command": "python -m bench models", "input": "random numbers", "optimizer": "SGD",
              "precision": {"bf16": "autocast to bf16"}, "kernels_compared": True}  # fmt: skip
    facts = results.MACHINE | {"copy_gb_per_s": 4000.0} | machine
    return {"machine": facts, "settings": chosen, "rows": made, "tax": tax.lines(made), "with_data": [], "left_out": []}


def page(root: Path) -> str:
    assert main(["report", "--results", str(root)]) == 0
    return (root / "README.md").read_text()


def test_fit_is_the_line_through_the_points() -> None:
    assert tax.fit([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx((3.0, 2.0))
    assert tax.fit([0, 1, 2], [0.0, 3.0, 3.0]) == pytest.approx((0.5, 1.5)), "least squares"
    assert tax.fit([8, 8], [1.0, 2.0]) is None
    assert tax.fit([8], [1.0]) is None


def test_tax_is_what_is_added_per_image() -> None:
    lines = {line["provider"]: line for line in tax.lines(taxed())}
    assert set(lines) == {"none", "torch", "tritonbn", "fused"}, "noise is no provider"
    for name, line in lines.items():
        assert [p["batch"] for p in line["points"]] == [16, 64, 256]
        assert [p["extra_us"] for p in line["points"]] == pytest.approx([EXTRA[name]] * 3)
        assert line["fixed_ms"] == pytest.approx(FIXED)
        assert line["per_example_us"] == pytest.approx(SLOPE + EXTRA[name])
        assert line["pass_bytes"] == 22_000_000
    assert lines["torch"]["points"][2]["ratio"] == pytest.approx((4 + 0.35 * 256) / (4 + 0.25 * 256))
    # 8 passes of 22 MB at 4 TB/s
    assert tax.floor_us(lines["torch"], 4e12) == pytest.approx(44.0)
    assert tax.floor_us(lines["torch"], None) is None


def test_tax_keeps_modes_apart_and_counts_training_only() -> None:
    inference = Setting("resnet50", 16, 224, "channels_last", "bf16", "eager", "inference")
    made = [*taxed((16,)), *taxed((16,), mode="compile", torch=10.0), row(inference, "torch"), row(ms=None)]
    lines = tax.lines(made)
    assert [(line["mode"], line["provider"]) for line in lines] == [
        (mode, name) for mode in ("eager", "compile") for name in ("none", "torch", "tritonbn", "fused")
    ]
    assert {len(line["points"]) for line in lines} == {1}
    assert {line["fixed_ms"] for line in lines} == {None}
    assert tax.share_of_torchs(lines, "fused", "eager", 16) == pytest.approx(0.4)
    assert tax.share_of_torchs(lines, "fused", "compile", 16) == pytest.approx(4.0)
    assert tax.share_of_torchs(lines, "fused", "graph", 16) is None
    assert tax.share_of_torchs(lines, "fused", "eager", 32) is None


def test_tax_without_a_step_without_batch_norm_is_not_known() -> None:
    (line,) = tax.lines([row(provider="torch")])
    assert (line["points"][0]["ratio"], line["points"][0]["extra_us"]) == (None, None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void at::native::batch_norm_collect_statistics_channels_last_kernel<at::native::InvStd, c10::BFloat16>", BN),
        ("void at::native::batch_norm_backward_elemt_channels_last_kernel_impl<4, float, c10::BFloat16>", BN),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>", BN),
        ("void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 512, true, 1>", BN),
        ("void cudnn::batchnorm_fwtr_nhwc_semiPersist<__half, float, float, 512, true>", BN),
        ("triton_poi_fused__native_batch_norm_legit_functional_add_relu_12", BN),
        ("triton_red_fused_native_batch_norm_backward_threshold_backward_7", BN),
        ("forward_kernel", BN),
        ("cooperative_backward_kernel", BN),
        ("gradient_sums_kernel", BN),
        ("aten::native_batch_norm_backward", BN),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::launch_clamp_scalar",
            ACT,
        ),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::threshold_kernel_impl<float>", ACT),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>>", ACT),
        ("triton_poi_fused_add_relu_3", ACT),
        ("aten::clamp_min_", ACT),
        ("aten::threshold_backward", ACT),
        ("aten::add_", ACT),
        (
            "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1",
            CONV,
        ),
        ("sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize64x64x32", CONV),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_64x256_32x4_nhwc>", CONV),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", CONV),
        ("void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, float, int>", CONV),
        ("aten::mkldnn_convolution", CONV),
        ("aten::convolution_backward", CONV),
        ("aten::addmm", CONV),
        ("aten::mm", CONV),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true>", COPY),
        ("void cudnn::cnn::nhwcToNchwKernel<float>", COPY),
        ("Memcpy DtoD (Device -> Device)", COPY),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)",
            COPY,
        ),
        ("void at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)", COPY),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<OpaqueType<2u>>", COPY),
        ("triton_poi_fused__to_copy_2", COPY),
        ("triton_poi_fused_convolution_1", COPY),
        ("aten::copy_", COPY),
        ("aten::cat", COPY),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<BinaryOpListAlphaFunctor<float>>", OTHER),
        ("void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::BFloat16, int>", OTHER),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", OTHER),
        ("void at::native::(anonymous namespace)::softmax_warp_forward<float, float, float, 10, true, false>", OTHER),
        ("aten::_foreach_add_", OTHER),
        ("aten::empty", OTHER),
    ],
)
def test_kernels_are_sorted_by_their_names(name: str, kind: str) -> None:
    assert profiles.kind(name) == kind


def test_shares_are_of_all_time() -> None:
    found = profiles.summed([("forward_kernel", 30.0, 6), ("nchwToNhwcKernel", 10.0, 3), ("gemm", 60.0, 9)], "GPU", 3)
    assert found is not None
    assert found.share == {BN: 0.3, ACT: 0.0, CONV: 0.6, COPY: 0.1, OTHER: 0.0}
    assert (found.kernels, found.changed_layout) == (6.0, True)
    assert profiles.summed([], "GPU", 3) is None


def test_profiler_sees_batch_norm() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    norm, x = nn.BatchNorm2d(8).to(device), torch.randn(16, 8, 32, 32, device=device)
    found = profiles.shares(lambda: torch.autograd.backward(norm(x).sum()), device)
    assert found is not None
    assert found.share[BN] > 0.3
    assert sum(found.share.values()) == pytest.approx(1)
    assert (found.kernels is None) is (device.type == "cpu")


def test_times_of_parts_and_whole() -> None:
    rounds = [torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 4.0]])]
    found = rows.times(rounds, [2 * part for part in rounds], images=12)
    assert (found["ms"], found["steps"], found["images_per_second"]) == (7.0, 3, pytest.approx(12e3 / 7))
    assert (found["forward_ms"], found["backward_ms"], found["optimizer_ms"]) == (2.0, 2.0, 3.0)
    assert found["speedup"] == 2.0
    of_a_graph = rows.times([torch.tensor([[5.0]])], None, images=1)
    assert "forward_ms" not in of_a_graph
    assert "speedup" not in of_a_graph


def test_losses_that_differ_are_a_failure_of_ours_alone() -> None:
    exact = torch.tensor([2.0, 1.0])
    made = {}
    for provider, far in (("torch", 0.01), ("torch-again", 0.5), ("tritonbn", 0.12), ("fused", 0.09), ("none", 1.0)):
        made[provider] = row(provider=provider)
        made[provider] |= rows.compared(made[provider], exact + far, exact + 0.01, exact)
    assert made["fused"]["difference"] == pytest.approx(0.08 / 2.01)
    assert made["fused"]["deviation"] == pytest.approx(0.09 / 2)
    # bf16: torch's own 0.005 twice, and 0.02
    assert {name: each["agrees"] for name, each in made.items()} == {
        "torch": True, "torch-again": False, "tritonbn": False, "fused": False, "none": None,
    }  # fmt: skip
    assert rows.failed([*made.values()]) == [made["tritonbn"], made["fused"]]


def test_what_rounding_explains_is_no_failure() -> None:
    exact = torch.tensor([2.0, 1.0])
    ours = row(provider="fused")
    found = rows.compared(ours, exact + 0.4, exact - 0.2, exact)
    assert (found["deviation"], found["agrees"]) == (pytest.approx(0.2), True), "twice torch's own 0.1"
    assert rows.compared(ours, exact + 0.45, exact - 0.2, exact)["agrees"] is False
    assert rows.compared(ours, exact + 0.4, exact - 0.2, None)["agrees"] is None, "nobody knows"
    assert rows.compared(ours, exact + 0.01, exact, None)["agrees"] is True
    assert rows.compared(ours, torch.tensor([2.0, float("nan")]), exact, exact)["agrees"] is False


def test_what_torch_cannot_do_either_is_no_failure_of_ours() -> None:
    other = Setting("resnet50", 128, 224, "channels_last", "bf16", "eager", "training")
    ours, torchs = (row(provider=name, ms=None, error="not finite") for name in ("fused", "torch"))
    assert rows.failed([ours, torchs]) == []
    assert rows.failed([ours]) == [ours]
    assert rows.failed([ours, row(other, "torch", ms=None, error="not finite")]) == [ours]
    assert rows.failed([ours, row(provider="torch")]) == [ours]
    assert rows.failed([row(ms=None, error="not here: CUDA graphs need a GPU")]) == []


def test_tables_shorten_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    made = taxed((16, 256))
    tables.print_rows(made[5:])
    tables.print_tax(tax.lines(made), 4e12)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith("torch 93.60 (91.73-95.47) 2,735 1.000 (1.000-2.000)")]
    assert "torch 256 93.60 1.376 100.0" in lines
    assert "torch: a step takes 4.00 ms +350.0 us per image" in lines
    assert "8 passes over what batch norm sees, as fast as a copy: 44.0 us per image" in lines


def test_page_has_the_targets_of_networks(tmp_path: Path) -> None:
    results.write(tmp_path / "gpu", models=content([*taxed(), *taxed((256,), mode="compile", torch=20.0)]))
    text = page(tmp_path)
    found = [line.split(" | ")[1:] for line in text.splitlines() if line.startswith(f"| {targets.RESNET50_STEP}")]
    ours = FIXED + 256 * (SLOPE + EXTRA["fused"]) / 1e3
    eager = (FIXED + 256 * (SLOPE + 100) / 1e3) / ours
    compiled = (FIXED + 256 * (SLOPE + 20) / 1e3) / ours
    assert eager > 1.15
    assert found == [
        ["at least 1.15", f"{eager:.4g}", "yes |"],
        ["at least 1", f"{compiled:.4g}", "**no** |"],
        ["at most 0.5", "0.4", "yes |"],
    ]
    assert "### Whole networks" in text
    assert "Measured on a CPU" not in text
    assert "| resnet50 | bf16 | channels_last | eager | torch | 16: 1.200, 64: 1.320, 256: 1.376 |" in text
    assert {pictures.STEPS, pictures.TAX} < {path.name for path in (tmp_path / "gpu").iterdir()}


def test_figures_of_a_cpu_are_called_that(tmp_path: Path) -> None:
    failed = row(provider="none", ms=None, error="out of memory at batch 256: 20 GiB")
    results.write(tmp_path / "cpu", models=content([*taxed((256,)), failed], device="CPU"))
    text = page(tmp_path)
    assert "**Measured on a CPU.**" in text
    assert text.count("not measured | - |") == 14
    assert "none: out of memory at batch 256: 20 GiB" in text
    assert "The BN tax**" not in text, "one batch size is no line"
