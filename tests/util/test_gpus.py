"""Peak speed and memory of GPUs."""

import pytest

from util.gpus import GPUS, peak_flops


@pytest.mark.parametrize(
    "name,tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("Tesla T4", 65),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
    ],
)
def test_a_device_has_the_peak_of_the_first_name_in_its_own(name, tflops):
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "NVIDIA T400",
        "NVIDIA A1000",
        "AMD Instinct MI300X",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 2080",
    ],
)
def test_an_unknown_device_has_no_peak(name):
    assert peak_flops(name) is None


def test_every_gpu_in_the_table_is_found_by_its_name():
    for name, (tflops, memory) in GPUS.items():
        assert peak_flops(f"NVIDIA {name}") == tflops * 1e12 and memory > 0
