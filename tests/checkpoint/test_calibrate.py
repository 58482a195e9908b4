"""Calibration and distillation: a GN network approximates the features of a BN network."""

import copy

import pytest
import torch
from conftest import DATASETS
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from studies.promised_moments import promised_moments
from torch import nn
from torch.testing import assert_close

import gn_det.checkpoint.distill as distill_module
from gn_det.checkpoint.calibrate import balance, calibrate, measured_moments
from gn_det.checkpoint.convert import backbone_config, build_network
from gn_det.checkpoint.distill import distill, feature_errors
from gn_det.data.unlabelled_images import choose_images, load_images

FACTS = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.NORM": "BN",
}
GROUPINGS = {
    "32 groups": {},
    "1 group": {"NUM_GROUPS": 1},
    "16 channels per group": {"DIM_PER_GP": 16},
}


def norms(network: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in network.named_modules() if name.endswith("norm")}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    chosen = choose_images(DATASETS / "shapes" / "images", 12)
    return (load_images(chosen, 96, "BGR") - 110) / 57


@pytest.fixture(scope="module")
def reference(images) -> nn.Module:
    """A BN network with running statistics of the images and gammas of both signs."""
    torch.manual_seed(0)
    network = backbone_with_values({})
    for norm in norms(network).values():
        nn.init.normal_(norm.weight, 0.5, 0.5)
        nn.init.normal_(norm.bias, std=0.3)
        norm.momentum = None  # the average over all batches
    network.train()
    with torch.no_grad():
        network(images)
    return network.eval()


def backbone_with_values(facts: dict) -> nn.Module:
    return build_backbone(backbone_config(FACTS | facts), ShapeSpec(channels=3)).eval()


def group_norm(reference: nn.Module, grouping: dict) -> nn.Module:
    keys = {f"MODEL.GROUP_NORM.{key}": value for key, value in grouping.items()}
    facts = FACTS | {"MODEL.RESNETS.NORM": "GN"} | keys
    return build_network(backbone_config(facts), reference.state_dict())


@torch.no_grad()
def outputs(network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    results = {}
    handles = [
        norm.register_forward_hook(lambda _, __, y, name=name: results.update({name: y.double()}))
        for name, norm in norms(network).items()
    ]
    network(images)
    for handle in handles:
        handle.remove()
    return results


@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
def test_moments_of_every_norm_match_the_reference(grouping, reference, images):
    """Mean and standard deviation of each channel agree in all layers after calibration."""
    network = group_norm(reference, grouping)
    calibrate(network, reference, images, measured_moments(reference, images))
    expected = outputs(reference, images)
    actual = outputs(network, images)
    assert len(expected) == 20
    for name, target in expected.items():
        for moment in (torch.mean, torch.std):
            assert_close(
                moment(actual[name], dim=(0, 2, 3)),
                moment(target, dim=(0, 2, 3)),
                rtol=1e-3,
                atol=1e-3,
                msg=name,
            )


def test_promised_moments_hold_on_training_data(reference, images):
    """On the images of BN's statistics, its outputs have mean beta and deviation |gamma|."""
    measured, promised = (
        measured_moments(reference, images),
        promised_moments(reference, images),
    )
    for name, (mean, std) in promised.items():
        assert_close(measured[name][0], mean, rtol=0, atol=6e-2)
        assert_close(measured[name][1], std, rtol=2e-2, atol=1e-3)


def test_product_of_filter_and_gamma_keeps_its_sign(reference, images):
    """The sign decides which values pass the ReLU; filter and gamma may only flip together."""
    network = group_norm(reference, {"DIM_PER_GP": 16})
    calibrate(network, reference, images, measured_moments(reference, images))
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
    """Equal deviations, and no flip of a channel lowers the variance of the group's mean."""
    torch.manual_seed(0)
    brightness = torch.randn(20, 1, 1, 1)
    x = torch.randn(20, 12, 8, 8) * torch.logspace(-1, 1, 12).view(-1, 1, 1) + 3 * brightness
    factors = balance(x, num_groups)
    y = (x * factors.view(-1, 1, 1)).double()
    deviations = y.std(dim=(0, 2, 3))
    assert_close(deviations, deviations.mean().expand(12))

    def variance_of_means(y: torch.Tensor) -> torch.Tensor:
        return y.view(20, num_groups, -1).mean(2).var(0).sum()

    for channel in range(12):
        flipped = y.clone()
        flipped[:, channel] *= -1
        assert variance_of_means(flipped) >= variance_of_means(y)
    assert variance_of_means(y) < 0.2 * variance_of_means(y * factors.sign().view(-1, 1, 1))


def test_calibration_and_distillation_lower_the_feature_errors(reference, images):
    """Calibration improves on copied gamma and beta, and distillation improves on calibration."""
    with torch.no_grad():
        target = reference(images)

    def error(network: nn.Module) -> float:
        with torch.no_grad():
            return sum(feature_errors(network(images), target).values()).item()

    copied = group_norm(reference, {})
    calibrated = copy.deepcopy(copied)
    calibrate(calibrated, reference, images, measured_moments(reference, images))
    distilled = copy.deepcopy(calibrated)
    torch.manual_seed(0)
    distill(distilled, reference, images, 12)
    errors = [error(network) for network in (distilled, calibrated, copied)]
    assert errors[0] < 0.95 * errors[1] and errors[1] < 0.7 * errors[2], errors


def test_distillation_does_not_depend_on_the_pixel_scale(reference, images):
    """For pixels a hundred times larger, the stem's filters are a hundred times smaller."""
    large, errors = copy.deepcopy(reference), {}
    with torch.no_grad():
        large.stem.conv1.weight /= 100
    for scale, source in ((1, reference), (100, large)):
        network = group_norm(source, {"DIM_PER_GP": 16})
        calibrate(network, source, scale * images, measured_moments(source, scale * images))
        torch.manual_seed(0)
        distill(network, source, scale * images, 12)
        with torch.no_grad():
            features, target = network(scale * images), source(scale * images)
        errors[scale] = sum(feature_errors(features, target).values())
    assert_close(errors[1], errors[100], rtol=1e-2, atol=0)


def test_an_interrupted_distillation_resumes(reference, images, tmp_path, monkeypatch):
    """Its result is bit-equal to that of an undisturbed one; other settings start anew."""
    state = tmp_path / "state.partial"
    monkeypatch.setattr(distill_module, "SAVE_PERIOD", 2)

    def start(steps: int, fail_at: int | None = None) -> dict:
        network = group_norm(reference, {})
        calls = iter(range(100))

        def errors(*args):
            if next(calls) == fail_at:
                raise KeyboardInterrupt
            return feature_errors(*args)

        monkeypatch.setattr(distill_module, "feature_errors", errors)
        torch.manual_seed(0)
        distill(network, reference, images[:4], steps, state)
        return network.state_dict()

    undisturbed = start(4)
    with pytest.raises(KeyboardInterrupt):
        start(4, fail_at=3)
    assert state.is_file()
    resumed = start(4, fail_at=3)  # two steps are left
    assert all(torch.equal(resumed[name], tensor) for name, tensor in undisturbed.items())
    assert not state.exists()
    with pytest.raises(KeyboardInterrupt):
        start(4, fail_at=3)
    other, again = start(3), start(3)
    assert all(torch.equal(again[name], tensor) for name, tensor in other.items())


def test_standardised_filters(reference, images):
    """Standardisation ignores the scale of filters, and the moments must match all the same."""
    facts = {"MODEL.RESNETS.NORM": "GN", "MODEL.RESNETS.WEIGHT_STANDARDIZATION": True}
    torch.manual_seed(0)
    source = backbone_with_values(facts)
    grouping = {"MODEL.GROUP_NORM.NUM_GROUPS": 1}
    network = build_network(backbone_config(FACTS | facts | grouping), source.state_dict())
    moments = measured_moments(source, images)
    calibrate(network, source, images, moments)
    for name, (mean, std) in measured_moments(network, images).items():
        assert_close(mean, moments[name][0], rtol=1e-3, atol=1e-3, msg=name)
        assert_close(std, moments[name][1], rtol=1e-3, atol=1e-3, msg=name)


def test_a_silent_channel_stays_finite(reference, images):
    """A constant channel cannot reach a deviation above 0: it outputs the target mean."""
    silent = copy.deepcopy(reference)
    with torch.no_grad():
        silent.res3[0].conv1.weight[5] = 0
    network = group_norm(silent, {"DIM_PER_GP": 1})
    calibrate(network, silent, images, measured_moments(silent, images))
    norm = network.res3[0].conv1.norm
    assert norm.weight[5] == 0
    assert all(torch.isfinite(p).all() for p in network.parameters())
