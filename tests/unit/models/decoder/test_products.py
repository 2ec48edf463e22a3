"""Products of float32 rows on a CPU: both libraries give the product, and AMD's processors with AVX-512 get oneDNN's."""

from __future__ import annotations

import pytest
import torch

from qwench.models.decoder import products


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("num_rows", [3, 64])
def test_rows_times_a_matrix_are_the_sums_of_float64(onednn: bool, num_rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "prefers_onednn", lambda: onednn and torch.backends.mkldnn.is_available())
    source = torch.Generator().manual_seed(num_rows)
    x, weight = torch.randn(num_rows, 256, generator=source), torch.randn(2 * 300, 256, generator=source)[:300]
    assert (num_rows * weight.numel() >= products.SMALLEST) == (num_rows == 64)
    bias = torch.randn(300, generator=source)
    for some_x, some_weight in ((x, weight), (x, weight.T.contiguous().T), (x.T.contiguous().T, weight)):
        exact = x.double() @ weight.double().T
        with torch.inference_mode():
            torch.testing.assert_close(products.linear(some_x, some_weight).double(), exact, rtol=0, atol=1e-4)
            torch.testing.assert_close(products.linear(some_x, some_weight, bias).double(), exact + bias, rtol=0, atol=1e-4)
    halves = products.linear(x.bfloat16(), weight.bfloat16())
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.double(), x.bfloat16().double() @ weight.bfloat16().double().T, rtol=2**-7, atol=0.5)


def test_rows_of_every_number_reach_onednn_in_few_shapes(monkeypatch: pytest.MonkeyPatch):
    shapes = set()

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        shapes.add(len(x))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "_onednn", product)
    x, weight = torch.randn(1100, 64, generator=torch.Generator().manual_seed(0)), torch.eye(64).repeat(1024, 1)
    for num_rows in (64, 65, 512, 513, 1025, 1100):
        assert torch.equal(products.linear(x[:num_rows], weight), x[:num_rows].repeat(1, 1024))
    assert shapes == {16, 64, 80, 512}


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_amd_with_avx512_gets_onednn(vendor: str, capability: str, expected: bool, tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {vendor}\n")
    monkeypatch.setattr(products, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert products.prefers_onednn.__wrapped__() == (expected and both)
