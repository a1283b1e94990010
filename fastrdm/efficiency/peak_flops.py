"""Peak arithmetic of known GPUs, from NVIDIA's data sheets."""

import re

# Dense TFLOP/s of the tensor cores: bf16 and fp16 with sums in fp32, and TF32. Sources: NVIDIA's data sheets of A100
# (2021), A10, A30, A40, L4, L40S, H100 (SXM, PCIe, NVL), H200 (SXM, NVL), and HGX B200 divided by its GPUs; half of
# what they print where they count the zeros of structured sparsity. The first name that is in the device's counts.
PEAKS = {
    "A100": (312.0, 156.0),
    "A10": (125.0, 62.5),
    "A30": (165.0, 82.0),
    "A40": (149.7, 74.8),
    "L4": (121.0, 60.0),
    "L40S": (362.0, 183.0),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 417.0),
    "H100": (989.0, 494.0),
    "H200 NVL": (835.0, 417.0),
    "H200": (989.0, 494.0),
    "B200": (2250.0, 1125.0),
}
COLUMNS = {"bf16": 0, "fp16": 0, "fp32": 1}  # fp32: cuDNN's convolutions use TF32 by torch's default


def peak_tflops(device: str, precision: str) -> float | None:
    """Peak TFLOP/s of the device with this name at `precision`; None if the device is not in the table."""
    column = COLUMNS.get(precision)
    found = (rates for name, rates in PEAKS.items() if re.search(rf"\b{name}\b", device))
    rates = next(found, None)
    return None if rates is None or column is None else rates[column]
