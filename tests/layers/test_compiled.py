"""The kernels' machine code, compiled without a GPU: no spills, and 16-byte memory accesses."""

import json
import os
from pathlib import Path

import pytest
from conftest import ROOT, command

triton = pytest.importorskip("triton")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
    # PyTorch 2.6 has Triton 3.2, to whose compiler sources are described in another way
    pytest.skip("needs Triton 3.3", allow_module_level=True)


@pytest.mark.parametrize(
    ("capability", "dtypes"), [(80, ["bf16", "fp32"]), (90, ["bf16"]), (100, ["bf16"])]
)
def test_machine_code(capability, dtypes, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = command(Path(__file__).with_name("compiled.py"), capability, *dtypes, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = json.loads(done.stdout)
    assert len(kernels) == 28 * len(dtypes)
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        if kernel["name"].startswith("group ") or " of one" in kernel["name"]:
            continue  # these read the workspace, or single values
        # RoIs of 7 x 7 in NCHW are not aligned to 16 bytes
        if kernel["name"].startswith("whole") and not kernel["CHANNELS_LAST"]:
            continue
        assert "ld.global.v4.b32" in kernel["loads"], kernel
        assert "ld.global.b16" not in kernel["loads"], kernel
        if kernel["name"] != "moments":
            assert "st.global.v4.b32" in kernel["stores"], kernel
        if kernel["dtype"] == "bf16":
            assert not any(store.endswith("b16") for store in kernel["stores"]), kernel
