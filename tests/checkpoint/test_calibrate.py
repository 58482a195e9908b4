"""Calibration: a GN network's norms put out what the BN network's do."""

import copy

import pytest
import torch
from conftest import DATASETS
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from studies.promised_moments import promised_moments
from torch import nn
from torch.testing import assert_close

from gn_det.checkpoint.calibrate import balance, calibrate, measured_moments
from gn_det.checkpoint.convert import backbone_config, build_resnet
from gn_det.checkpoint.distill import distill, feature_errors
from gn_det.data.unlabelled_images import choose_images, load_images

FACTS = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.NORM": "BN",
}
DIVISIONS = {"32 groups": {}, "1 group": {"NUM_GROUPS": 1}, "width 16": {"DIM_PER_GP": 16}}


def norms(network: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in network.named_modules() if name.endswith("norm")}


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    chosen = choose_images(DATASETS / "shapes" / "images", 12)
    return (load_images(chosen, 96, "BGR") - 110) / 57


@pytest.fixture(scope="module")
def reference(pictures) -> nn.Module:
    """A BN network whose statistics are those of the pictures, with gammas of both signs."""
    torch.manual_seed(0)
    network = backbone_with_values({})
    for norm in norms(network).values():
        nn.init.normal_(norm.weight, 0.5, 0.5)
        nn.init.normal_(norm.bias, std=0.3)
        norm.momentum = None  # the average over all batches
    network.train()
    with torch.no_grad():
        network(pictures)
    return network.eval()


def backbone_with_values(facts: dict) -> nn.Module:

    return build_backbone(backbone_config(FACTS | facts), ShapeSpec(channels=3)).eval()


def group_norm(reference: nn.Module, division: dict) -> nn.Module:
    keys = {f"MODEL.GROUP_NORM.{key}": value for key, value in division.items()}
    facts = FACTS | {"MODEL.RESNETS.NORM": "GN"} | keys
    return build_resnet(backbone_config(facts), reference.state_dict())


@torch.no_grad()
def outputs(network: nn.Module, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    handles = [
        norm.register_forward_hook(lambda _, __, y, name=name: found.update({name: y.double()}))
        for name, norm in norms(network).items()
    ]
    network(pictures)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("division", DIVISIONS.values(), ids=DIVISIONS)
def test_every_norm_puts_out_the_reference_s_mean_and_deviation(division, reference, pictures):
    """Layer by layer through the whole network, each after the layers below it were set."""
    network = group_norm(reference, division)
    calibrate(network, reference, pictures, measured_moments(reference, pictures))
    wanted = outputs(reference, pictures)
    found = outputs(network, pictures)
    assert len(wanted) == 20
    for name, target in wanted.items():
        for moment in (torch.mean, torch.std):
            assert_close(
                moment(found[name], dim=(0, 2, 3)),
                moment(target, dim=(0, 2, 3)),
                rtol=1e-3,
                atol=1e-3,
                msg=name,
            )


def test_promises_hold_on_bn_s_own_data(reference, pictures):
    """On what BN's statistics were measured on, its outputs have mean beta and deviation gamma."""
    measured, promised = (
        measured_moments(reference, pictures),
        promised_moments(reference, pictures),
    )
    for name, (mean, std) in promised.items():
        assert_close(measured[name][0], mean, rtol=0, atol=6e-2)
        assert_close(measured[name][1], std, rtol=2e-2, atol=1e-3)


def test_filter_and_gamma_keep_their_sign_together(reference, pictures):
    """Which decides what of a channel the ReLU lets through; either alone may be flipped."""
    network = group_norm(reference, {"DIM_PER_GP": 16})
    calibrate(network, reference, pictures, measured_moments(reference, pictures))
    flipped = 0
    for name, norm in norms(network).items():
        filters = network.get_submodule(name.removesuffix(".norm")).weight
        originals = reference.get_submodule(name.removesuffix(".norm")).weight
        signs = norm.weight.sign() * norms(reference)[name].weight.sign()
        assert torch.equal(filters.sign(), originals.sign() * signs.view(-1, 1, 1, 1)), name
        flipped += (signs < 0).sum()
    assert flipped > 0


@pytest.mark.parametrize("num_groups", [2, 6])
def test_balanced_channels(num_groups):
    """Equally strong, and no channel's flip would steady the group's mean; formulas in float64."""
    torch.manual_seed(0)
    brightness = torch.randn(20, 1, 1, 1)
    x = torch.randn(20, 12, 8, 8) * torch.logspace(-1, 1, 12).view(-1, 1, 1) + 3 * brightness
    factors = balance(x, num_groups)
    y = (x * factors.view(-1, 1, 1)).double()
    deviations = y.std(dim=(0, 2, 3))
    assert_close(deviations, deviations.mean().expand(12))

    def unsteadiness(y: torch.Tensor) -> torch.Tensor:
        return y.view(20, num_groups, -1).mean(2).var(0).sum()

    for channel in range(12):
        flipped = y.clone()
        flipped[:, channel] *= -1
        assert unsteadiness(flipped) >= unsteadiness(y)
    assert unsteadiness(y) < 0.2 * unsteadiness(y * factors.sign().view(-1, 1, 1))


def test_nearer_than_copied_and_nearest_distilled(reference, pictures):
    """What the pass is for, and what distillation adds to it."""
    with torch.no_grad():
        wanted = reference(pictures)

    def error(network: nn.Module) -> float:
        with torch.no_grad():
            return sum(feature_errors(network(pictures), wanted).values()).item()

    copied = group_norm(reference, {})
    calibrated = copy.deepcopy(copied)
    calibrate(calibrated, reference, pictures, measured_moments(reference, pictures))
    distilled = copy.deepcopy(calibrated)
    torch.manual_seed(0)
    distill(distilled, reference, pictures, 12)
    errors = [error(network) for network in (distilled, calibrated, copied)]
    assert errors[0] < 0.95 * errors[1] and errors[1] < 0.7 * errors[2], errors


def test_distillation_at_any_scale_of_pixels(reference, pictures):
    """A stem for pixels a hundred times as large has filters a hundred times as small."""
    large, errors = copy.deepcopy(reference), {}
    with torch.no_grad():
        large.stem.conv1.weight /= 100
    for scale, source in ((1, reference), (100, large)):
        network = group_norm(source, {"DIM_PER_GP": 16})
        calibrate(network, source, scale * pictures, measured_moments(source, scale * pictures))
        torch.manual_seed(0)
        distill(network, source, scale * pictures, 12)
        with torch.no_grad():
            found, wanted = network(scale * pictures), source(scale * pictures)
        errors[scale] = sum(feature_errors(found, wanted).values())
    assert_close(errors[1], errors[100], rtol=1e-2, atol=0)


def test_standardised_filters(reference, pictures):
    """They keep a scale of their own: what is set has to hold for it."""
    facts = {"MODEL.RESNETS.NORM": "GN", "MODEL.RESNETS.WEIGHT_STANDARDIZATION": True}
    torch.manual_seed(0)
    source = backbone_with_values(facts)
    division = {"MODEL.GROUP_NORM.NUM_GROUPS": 1}
    network = build_resnet(backbone_config(FACTS | facts | division), source.state_dict())
    moments = measured_moments(source, pictures)
    calibrate(network, source, pictures, moments)
    for name, (mean, std) in measured_moments(network, pictures).items():
        assert_close(mean, moments[name][0], rtol=1e-3, atol=1e-3, msg=name)
        assert_close(std, moments[name][1], rtol=1e-3, atol=1e-3, msg=name)


def test_a_silent_channel_stays_finite(reference, pictures):
    """A channel without signal cannot be brought to a deviation: it puts out its mean."""
    silent = copy.deepcopy(reference)
    with torch.no_grad():
        silent.res3[0].conv1.weight[5] = 0
    network = group_norm(silent, {"DIM_PER_GP": 1})
    calibrate(network, silent, pictures, measured_moments(silent, pictures))
    norm = network.res3[0].conv1.norm
    assert norm.weight[5] == 0
    assert all(torch.isfinite(p).all() for p in network.parameters())
