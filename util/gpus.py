"""Peak speed and memory of the usual GPUs."""

from __future__ import annotations

# Dense peak of the 16-bit matrix units with fp32 accumulation in TFLOP/s, and memory in GB, from NVIDIA's data sheets
# and architecture white papers (bf16; fp16 on GPUs without bf16). MFU is quoted against this peak for every --dtype.
# A name that contains another one stands before it. A GPU sold with two sizes of memory has the usual size under its
# name and the other one under the name with the size.
GPUS = {
    "GB200": (2500, 186), "B200": (2250, 180), "B100": (1750, 192), "GH200": (989, 96), "H200": (989, 141),
    "H100 NVL": (835, 94), "H100 PCIe": (756, 80), "H100": (989, 80), "H800": (989, 80), "H20": (148, 96),
    "A100": (312, 80), "A100 40GB": (312, 40), "A800": (312, 80), "A10G": (70, 24), "A10": (125, 24),
    "A30": (165, 24), "A40": (150, 48), "L40S": (362, 48), "L40": (181, 48), "L4": (121, 24),
    "V100": (125, 16), "V100 32GB": (125, 32), "T4": (65, 16),
    "RTX 6000 Ada": (364, 48), "RTX A6000": (155, 48),
    "RTX 5090": (209.5, 32), "RTX 5080": (112.6, 16), "RTX 5070 Ti": (87.9, 16), "RTX 5070": (61.7, 12),
    "RTX 4090": (165.2, 24), "RTX 4080 SUPER": (104.4, 16), "RTX 4080": (97.5, 16),
    "RTX 4070 Ti SUPER": (88.2, 16), "RTX 4070 Ti": (80.2, 12), "RTX 4070 SUPER": (71.0, 12), "RTX 4070": (58.3, 12),
    "RTX 4060 Ti": (44.1, 8), "RTX 4060": (30.2, 8),
    "RTX 3090 Ti": (80, 24), "RTX 3090": (71, 24), "RTX 3080 Ti": (68.2, 12), "RTX 3080": (59.5, 10),
    "RTX 3070 Ti": (43.5, 8), "RTX 3070": (40.6, 8), "RTX 3060 Ti": (32.4, 8), "RTX 3060": (25.5, 12),
}  # fmt: skip
PEAK_TFLOPS: dict[str, float] = {name: tflops for name, (tflops, _) in GPUS.items()}
GPU_MEMORY_GB: dict[str, int] = {name: memory for name, (_, memory) in GPUS.items()}


def peak_flops(device_name: str) -> float | None:
    """Returns the peak FLOP/s of a device by its name, or None if the table does not have it.

    Laptop and export versions and MIG slices have the name of a faster GPU in theirs: None for them too.
    """
    words = device_name.replace("-", " ").split()
    if {"Laptop", "Max", "MIG", "D"} & set(words):
        return None
    for name, tflops in PEAK_TFLOPS.items():
        wanted = name.split()
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            return tflops * 1e12
    return None
