"""Weight normalization against its formula, and its initialisation by the first batch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import shapes_config
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from torch import nn
from torch.testing import assert_close

import gn_det
from gn_det.config_file import read_config
from gn_det.errors import InputError
from gn_det.modeling.weight_norm import WeightNormConv2d, folded_weights, normalize_weights


def layer() -> WeightNormConv2d:
    torch.manual_seed(0)
    network = nn.Sequential(Conv2d(3, 8, 3, padding=1, bias=False, norm=nn.BatchNorm2d(8)))
    normalize_weights(network)
    return network[0].double()


def test_formula():
    """gain * v / |v|, and its gradient with respect to gain and v."""
    conv, x = layer().eval(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    gain, v = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
    with torch.no_grad():
        gain.uniform_(0.5, 2)
        conv.bias.normal_()
    length = v.square().sum((1, 2, 3), keepdim=True).sqrt()
    expected = F.conv2d(x, gain * v / length, conv.bias, padding=1)
    assert_close(conv(x), expected)
    wanted = torch.autograd.grad(expected.square().sum(), [gain, v, conv.bias])
    assert_close(torch.autograd.grad(conv(x).square().sum(), [gain, v, conv.bias]), wanted)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_the_first_training_batch_sets_gain_and_bias(scale):
    conv, x = layer(), torch.randn(4, 3, 9, 9, dtype=torch.float64) * 7 + 3
    conv.scale = scale
    before = copy.deepcopy(conv.state_dict())
    conv.eval()(x)
    assert_close(conv.state_dict(), before), "evaluation changes nothing"
    y = conv.train()(x)
    assert_close(y.mean((0, 2, 3)), torch.zeros(8).double(), atol=1e-6, rtol=0)
    assert_close(y.std((0, 2, 3)), torch.full((8,), scale).double(), atol=1e-6, rtol=0)
    after = copy.deepcopy(conv.state_dict())
    conv(x + 5)
    assert_close(conv.state_dict(), after), "only the first batch"
    resumed = layer()
    resumed.load_state_dict(after)
    resumed.train()(x + 5)
    assert_close(resumed.state_dict(), after), "as after --resume"


def test_fifty_layers_start_with_features_of_unit_scale():
    """Of a ResNet-50 whose residual branches do not start at 0."""
    opts = ("MODEL.RESNETS.NORM", "WN", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256")
    opts = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "50", *opts]
    torch.manual_seed(0)
    model = build_model(read_config("Shapes/pretrain_R_18_gn.yaml", opts)).train()
    convs = [m for m in model.modules() if isinstance(m, WeightNormConv2d)]
    assert len(convs) == 53 and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    seen = []
    for conv in convs:
        conv.register_forward_hook(lambda _, __, y: seen.append((y.mean().item(), y.std().item())))
    images = torch.randint(256, (8, 3, 64, 64))
    with torch.no_grad():
        model.logits(images)
    assert len(seen) == 53
    for mean, std in seen:
        assert abs(mean) < 1e-3 and abs(std - 1) < 0.02  # the last stage has 32 positions


def test_folded_weights_compute_the_same():
    conv, x = layer(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    network = nn.Sequential(conv)
    y = network.train()(x)
    weights = folded_weights(network)
    assert weights.keys() == {"0.weight", "0.bias"}
    assert_close(F.conv2d(x, weights["0.weight"], weights["0.bias"], padding=1), y)


def test_detectors_refuse_it():
    cfg = shapes_config("mask_rcnn_R_18_FPN_frozenbn", "MODEL.RESNETS.NORM", "WN")
    with pytest.raises(InputError, match=r"MODEL\.RESNETS\.NORM.*pretraining"):
        gn_det.check_config(cfg)
