"""Models that leave for where gn_det is not installed."""

import torch


def is_exporting() -> bool:
    """Whether the caller is being traced, so that it may use PyTorch's own operators alone."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()
