"""Compile every kernel for a GPU, which need not be present, and print spills, loads and stores.

Arguments: the compute capability, as 90, and data types, as bf16 fp32. The output is JSON.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gn_det.layers.kernels import combine, frozen_bn, split, whole

IMAGES = ("X", "Y", "DX", "DY", "RESIDUAL", "DRESIDUAL")
SIZES = ("C", "HW", "CHUNK", "S", "G", "ROWS", "SHARES")
BIN = Path(nvidia.__file__).parent / "bin"


def kernels():
    """Name, kernel, number of warps and constants, as the launchers choose them for R50-FPN."""
    flags = {"HAS_RESIDUAL": True, "RELU": True}
    for last, p, c in ((False, 2048, 1), (True, 32, 64)):
        tile = {"ALIGNED": True, "CHANNELS_LAST": last, "BLOCK_P": p, "BLOCK_C": c}
        yield "moments", split._moments_kernel, 4, tile
        yield "sums", split._gradient_sums_kernel, 4, {**flags, **tile}
        for fold in (False, True)[: 1 if last else 2]:
            ends = {**tile, "FOLD": fold, "BLOCK_D": 8, "BLOCK_S": 16}
            name = " that combines chunks" * fold
            yield f"normalize{name}", split._normalize_kernel, 4, {**flags, **ends}
            yield f"input gradient{name}", split._input_gradient_kernel, 4, {"RELU": True, **ends}
        yield "frozen bn", frozen_bn._forward_kernel, 4, {**flags, **tile}
        yield "frozen bn backward", frozen_bn._backward_kernel, 4, {**flags, **tile}
    small = {"BLOCK_D": 64, "BLOCK_S": 16}
    yield "group moments", combine.group_moments_kernel, 4, small
    yield "group gradients", combine.group_gradients_kernel, 4, small
    for last, p, g in ((False, 64, 1), (False, 512, 1), (True, 64, 8), (True, 256, 2)):
        tile = {"CHANNELS_LAST": last, "BLOCK_P": p, "GROUPS": g, "D": 8, "BLOCK_D": 8}
        warps = max(1, p * g * 8 // 256)
        yield "whole", whole._forward_kernel, warps, {**flags, **tile}
        yield "whole backward", whole._backward_kernel, warps, {**flags, **tile}
    # Triton treats sizes of 1 and missing tensors as constants
    one = {"HW": 1, "HAS_RESIDUAL": False, "RELU": False}
    tile = {"CHANNELS_LAST": False, "BLOCK_P": 1, "GROUPS": 1, "D": 8, "BLOCK_D": 8}
    yield "whole of one", whole._forward_kernel, 1, {"RESIDUAL": None, **one, **tile}
    yield "whole of one, backward", whole._backward_kernel, 1, {"Y": None, **one, **tile}
    tile = {"ALIGNED": False, "CHANNELS_LAST": False, "BLOCK_P": 1, "BLOCK_C": 1}
    yield "sums of one", split._gradient_sums_kernel, 4, {"Y": None, **one, **tile}
    yield "moments of one", split._moments_kernel, 4, {"HW": 1, "CHUNK": 1, **tile}


def compile_one(kernel, warps: int, constants: dict, dtype: str, capability: int) -> dict:
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in SIZES:
            signature[name] = "i32"
        else:
            pointer = f"*{dtype}" if name in IMAGES else "*fp32"
            signature[name] = "fp32" if name == "eps" else pointer
        # The launchers promise nothing about HW and CHUNK except by ALIGNED
        if name == "C" or signature[name].startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", capability, 32)
    source = ASTSource(kernel, signature, constants, attributes)
    ptx = triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        assembler = BIN / ("ptxas-blackwell" if capability >= 100 else "ptxas")
        arch = f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}"
        words = [assembler, "-v", arch, file.name, "-o", "/dev/null"]
        report = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    pattern = r"(\d+) bytes spill stores, (\d+) bytes spill loads"
    return {
        "spills": sum(int(n) for counts in re.findall(pattern, report) for n in counts),
        "loads": re.findall(r"ld\.global\.(?:\w+\.)*(?:v\d\.)?b\d+", ptx),
        "stores": re.findall(r"st\.global\.(?:\w+\.)*(?:v\d\.)?b\d+", ptx),
    }


if __name__ == "__main__":
    capability, dtypes = int(sys.argv[1]), sys.argv[2:]
    results = [
        {"name": name, "dtype": dtype, **constants}
        | compile_one(k, w, constants, dtype, capability)
        for name, k, w, constants in kernels()
        for dtype in dtypes
    ]
    print(json.dumps(results))
