"""What a run records about itself."""

import resource
import subprocess
import sys

import numpy as np
from conftest import ROOT

CHILD = "from gn_det.engine.run_record import peak_memory_mib; print(peak_memory_mib('cpu'))"


def test_peak_memory_is_the_process_s_own():
    """A training that a large process starts does not record the large one's memory."""
    size = 2**30
    np.ones(size, dtype=np.uint8)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 100 < float(done.stdout) < largest / 2
