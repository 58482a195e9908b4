"""Zero-initialized residual branches and weight standardization, in every backbone."""

import pytest
import torch
from conftest import shapes_config
from detectron2.layers import CNNBlockBase, Conv2d
from detectron2.modeling import build_model
from modeling.test_backbone import C4
from torch import nn
from torch.testing import assert_close

from gn_det.modeling.conv import StandardizedConv2d

ZERO = ("MODEL.RESNETS.ZERO_INIT_RESIDUAL", True)
STANDARDIZED = ("MODEL.RESNETS.WEIGHT_STANDARDIZATION", True)
BACKBONES = {
    "R-18 FPN": (),
    "R-50 FPN": ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256),
    "R-50 C4": C4,
}


def build(*opts: object) -> nn.Module:
    torch.manual_seed(5)
    return build_model(shapes_config("mask_rcnn_R_18_FPN_gn", *opts)).eval()


def blocks(model: nn.Module) -> list[CNNBlockBase]:
    """The residual blocks: all blocks with a second convolution, that is, not the stem."""
    candidates = [m for m in model.modules() if isinstance(m, CNNBlockBase)]
    return [block for block in candidates if hasattr(block, "conv2")]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("norm", ["GN", "BN"])
def test_blocks_start_as_the_identity(backbone, norm):
    opts = (*BACKBONES[backbone], "MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", 0)
    zero, plain = build(*opts, *ZERO), build(*opts)
    assert len(blocks(zero)) == (8 if backbone == "R-18 FPN" else 16)
    for block in blocks(zero):
        x = torch.rand(2, block.in_channels, 8, 8)
        shortcut = x if block.shortcut is None else block.shortcut(x)
        assert_close(block(x), shortcut.relu(), rtol=0, atol=0)
    changed = [
        name
        for name, tensor in plain.state_dict().items()
        if not torch.equal(tensor, zero.state_dict()[name])
    ]
    assert len(changed) == len(blocks(zero))
    assert all(name.endswith("norm.weight") for name in changed)


def test_frozen_gamma_is_never_zeroed():
    """It is not trained: at 0 it would disable the residual branch for good."""
    frozen = build("MODEL.RESNETS.NORM", "FrozenBN", *ZERO)
    assert all((block.conv2.norm.weight == 1).all() for block in blocks(frozen))


def standardized(weight: torch.Tensor) -> torch.Tensor:
    """Qiao et al. 2019, Eq. 5, filter by filter in float64."""
    filters = []
    for w in weight.double():
        mean = w.sum() / w.numel()
        variance = ((w - mean) ** 2).sum() / (w.numel() - 1)
        filters.append((w - mean) / (variance.sqrt() + 1e-5))
    return torch.stack(filters).float()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("norm", ["GN", "BN"])
def test_equals_a_plain_model_with_standardized_weights(backbone, norm):
    opts = (*BACKBONES[backbone], "MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", 0)
    # In training mode, because untrained BN does not normalize in evaluation mode
    ours, plain = build(*opts, *STANDARDIZED).train(), build(*opts).train()
    state = plain.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, tensor in ours.state_dict().items():
        assert_close(tensor, state[name], rtol=0, atol=0, msg=name)
    prefixes = ("backbone.bottom_up.", "backbone.stem", "backbone.res", "roi_heads.res5.")
    count = 0
    for name, layer in plain.named_modules():
        if isinstance(layer, Conv2d) and layer.norm is not None and name.startswith(prefixes):
            layer.weight.data = standardized(layer.weight.data)
            count += 1
    assert count == (20 if backbone == "R-18 FPN" else 53)
    image = torch.rand(2, 3, 64, 64)
    for level, expected in plain.backbone(image).items():
        assert_close(ours.backbone(image)[level], expected, rtol=1e-3, atol=1e-3)
    if backbone == "R-50 C4":
        x = torch.rand(2, 1024, 4, 4)
        expected = plain.roi_heads.res5(x)
        assert_close(ours.roi_heads.res5(x), expected, rtol=1e-3, atol=1e-3)


def test_off_by_default():
    assert not any(isinstance(m, StandardizedConv2d) for m in build().modules())
