"""More than 2**31 elements: 32-bit offsets would read and write somewhere else."""

import pytest
import torch

import tritonbn

GIGABYTE = 1 << 30


def gpu_memory() -> int:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


@pytest.mark.skipif(gpu_memory() < 32 * GIGABYTE, reason="needs a GPU with 32 GB")
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        pytest.param((70, 32, 100, 100, 100), torch.contiguous_format, id="planes"),
        pytest.param((70, 32, 100, 100, 100), torch.channels_last_3d, id="rows"),
        pytest.param((1 << 16, 1 << 15, 2), torch.contiguous_format, id="folded"),
    ],
)
def test_last_elements(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """The last sample has other values than the rest: its output, its gradient and its part in the statistics show."""
    assert torch.Size(shape).numel() >= 2**31
    N, C = shape[:2]
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=memory_format).normal_()
    x[-1] += 1
    weight, bias = torch.full((C,), 2.0, device="cuda"), torch.full((C,), 0.5, device="cuda")
    mean, var = torch.zeros(C, device="cuda"), torch.ones(C, device="cuda")
    x.requires_grad_()
    y = tritonbn.functional.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0)
    dims = range(2, len(shape))
    expected_mean = torch.stack([sample.double().flatten(1).mean(1) for sample in x.detach()]).mean(0)
    torch.testing.assert_close(mean, expected_mean.float(), rtol=1e-5, atol=1e-6)
    column = (C, *[1] * len(dims))
    n = x.numel() // C
    scale = 2.0 / (var * (n - 1) / n + 1e-5).sqrt()
    expected = (x.detach()[-1].float() - mean.view(column)) * scale.view(column) + 0.5
    torch.testing.assert_close(y.detach()[-1].float(), expected, rtol=2e-3, atol=2e-3)
    dy = torch.zeros_like(y)
    dy[-1, -1] = 1
    (dx,) = torch.autograd.grad(y, x, dy)
    assert float(dx[-1, -1].float().mean()) == pytest.approx(float(scale[-1]) * (1 - 1 / N), rel=0.01)
    assert float(dx[0, 0].float().abs().max()) == 0
