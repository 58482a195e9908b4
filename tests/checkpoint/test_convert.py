"""Converted backbones compute the same features as the original models."""

import pickle
import re

import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import shapes_config
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import nn
from torch.testing import assert_close

from gn_det.checkpoint.convert import build_network, convert, fold_input
from gn_det.checkpoint.read import WeightsFile, read_weights
from gn_det.checkpoint.save import save_backbone
from gn_det.errors import InputError

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)  # RGB
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
STAGES = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """A photograph, (1, 3, 96, 96), RGB, 0 to 255."""
    with get_sample_data("grace_hopper.jpg") as file:
        photograph = Image.open(file).convert("RGB").resize((96, 96))
    return torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None].float()


def trained(model: nn.Module) -> nn.Module:
    """Give every norm random parameters and statistics, as after training."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0, generator=generator)
            nn.init.normal_(module.bias, std=0.1, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)
    return model.eval()


def torch_model(name: str, norm: str = "BN") -> nn.Module:
    layer = {"BN": nn.BatchNorm2d, "GN": lambda channels: nn.GroupNorm(32, channels)}[norm]
    torch.manual_seed(0)
    return trained(torchvision.models.get_model(name, norm_layer=layer))


@torch.no_grad()
def features(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of the stages layer1 to layer4 of a model."""
    outputs = {}
    for name, layer in STAGES.items():
        getattr(model, layer).register_forward_hook(
            lambda _, __, output, name=name: outputs.update({name: output})
        )
    model(x)
    return outputs


VGG = {"vgg11": 16, "vgg16": 26, "vgg19": 32, "vgg11_bn": 40, "vgg16_bn": 65}


@pytest.mark.parametrize("name", VGG)
def test_vgg_of_torchvision(name, image):
    """Features before each max pooling, with biases before BatchNorm that are not 0."""
    torch.manual_seed(0)
    model = trained(torchvision.models.get_model(name))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias, std=0.2)
    conversion = convert(WeightsFile(model.state_dict()))
    conversion.check_complete()
    assert conversion.source == "vgg" and len(conversion.tensors) == VGG[name]
    assert len(conversion.tensors) + len(conversion.dropped) == len(model.state_dict())
    keys = conversion.cfg.MODEL.VGG
    assert (keys.DEPTH, keys.NORM) == (int(name[3:5]), "BN" if "bn" in name else "")
    x, expected, stage = (image - MEAN) / STD, {}, 1
    with torch.no_grad():
        for layer in model.features:
            if isinstance(layer, nn.MaxPool2d):
                expected[f"conv{stage}"] = x
                stage += 1
            x = layer(x)
    del expected["conv1"]  # not an output of the conversion
    assert_same(ours(conversion, image), expected, atol=1e-5)


@torch.no_grad()
def ours(conversion, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """The features of the converted ResNet for an RGB image, with its config's pixel settings."""
    keys = conversion.cfg
    resnet = build_network(keys, conversion.tensors)
    x = image if keys.INPUT.FORMAT == "RGB" else image.flip(1)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (keys.MODEL.PIXEL_MEAN, keys.MODEL.PIXEL_STD)
    )
    return resnet((x - mean) / std)


def assert_same(actual, expected, atol=1e-4):
    assert actual.keys() == expected.keys()
    for stage, features_ in expected.items():
        scale = features_.abs().max().item()
        assert scale > 1e-3
        assert_close(actual[stage] / scale, features_ / scale, rtol=0, atol=atol, msg=stage)


TORCHVISION = {
    **{"resnet18": 100, "resnet34": 180, "resnet50": 265, "resnet101": 520, "resnet152": 775},
    **{"resnext50_32x4d": 265, "wide_resnet50_2": 265},
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, image):
    model = torch_model(name)
    conversion = convert(WeightsFile(model.state_dict()))
    conversion.check_complete()
    assert conversion.source == "torchvision" and len(conversion.tensors) == TORCHVISION[name]
    dropped = set(conversion.dropped)
    assert {"fc.weight", "fc.bias", "bn1.num_batches_tracked"} <= dropped
    assert all(n.startswith("fc.") or n.endswith("num_batches_tracked") for n in dropped)
    assert_same(ours(conversion, image), features(model, (image - MEAN) / STD))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50_gn", "resnext50_32x4d"])
def test_timm(name, image):
    timm = pytest.importorskip("timm")
    model = trained(timm.create_model(name))
    conversion = convert(WeightsFile(model.state_dict()))
    conversion.check_complete()
    assert len(conversion.tensors) == {"resnet18": 100, "resnet50_gn": 159}.get(name, 265)
    assert model.default_cfg["mean"] == (0.485, 0.456, 0.406)
    assert_same(ours(conversion, image), features(model, (image - MEAN) / STD))


def to_groupnorm_reproduce(state):
    return {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 100, "arch": "r"}


def to_mmdetection(state):
    return {
        "meta": {"epoch": 1},
        "state_dict": {
            re.sub(r"bn(\d)", r"gn\1", k): v for k, v in state.items() if not k.startswith("fc")
        },
    }


def to_tensorpack(state):
    """Layout and names of tensorpack's ResNet example."""
    arrays = {}
    for name, tensor in state.items():
        *layers, kind = name.split(".")
        if layers[0] == "fc":
            arrays[f"linear/{'W' if kind == 'weight' else 'b'}"] = tensor.numpy()
            continue
        place = "" if len(layers) == 1 else f"group{int(layers[0][-1]) - 1}/block{layers[1]}/"
        layer = layers[-1] if "downsample" not in layers else "convshortcut"
        if tensor.dim() == 4:
            layer = layer if place else "conv0"
            arrays[f"{place}{layer}/W"] = tensor.permute(2, 3, 1, 0).numpy()
        else:
            layer = layer.replace("bn", "conv") if place else "conv0"
            arrays[f"{place}{layer}/gn/{'gamma' if kind == 'weight' else 'beta'}"] = tensor.numpy()
    return arrays


def to_detectron(state, norm="gn"):
    """Caffe2 blobs with the names of Detectron's ResNet.py."""
    blobs = {}
    for name, tensor in state.items():
        *layers, kind = name.split(".")
        if layers[0] == "fc":
            blobs[f"pred_{kind[0]}"] = tensor.numpy()
            continue
        if len(layers) == 1:
            # Detectron's BN stem has a prefix, its GN stem has none
            blob = "conv1" if tensor.dim() == 4 or norm == "gn" else "res_conv1"
        else:
            branch = "1" if "downsample" in layers else f"2{'abc'[int(layers[-1][-1]) - 1]}"
            blob = f"res{int(layers[0][-1]) + 1}_{layers[1]}_branch{branch}"
        suffix = "w" if tensor.dim() == 4 else f"{norm}_{'s' if kind == 'weight' else 'b'}"
        blobs[f"{blob}_{suffix}"] = tensor.numpy()
    return blobs


BGR_MEAN = (103.53, 116.28, 123.675)
GN_SOURCES = {
    "groupnorm-reproduce": (to_groupnorm_reproduce, "RGB", STD),
    "mmdetection": (to_mmdetection, "BGR", torch.ones(3, 1, 1)),
    "tensorpack": (to_tensorpack, "BGR", STD.flip(0)),
    "detectron": (to_detectron, "BGR", torch.ones(3, 1, 1)),
}


def write(content, path):
    if path.suffix == ".npz":
        np.savez_compressed(path, **content)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("source", "depth"), [*((source, 50) for source in GN_SOURCES), ("detectron", 101)]
)
def test_gn_sources(source, depth, image, tmp_path):
    model = torch_model(f"resnet{depth}", "GN")
    rename, image_format, std = GN_SOURCES[source]
    suffix = {"tensorpack": ".npz", "detectron": ".pkl"}.get(source, ".pth")
    conversion = convert(read_weights(write(rename(model.state_dict()), tmp_path / f"w{suffix}")))
    conversion.check_complete()
    # GroupNorm-reproduce has the same names as torchvision
    assert conversion.source in (source, "torchvision")
    assert len(conversion.tensors) == {50: 159, 101: 312}[depth]
    rgb = image_format == "RGB"
    x, mean = (image, MEAN) if rgb else (image.flip(1), MEAN.flip(0))
    assert_same(ours(conversion, image), features(model, (x - mean) / std))


def test_fused_bn_as_detectron2_loads_it(image, tmp_path):
    """MSRA's files: BN fused into an affine transform, stride on the first 1x1 convolution."""
    state = {
        k: v
        for k, v in torch_model("resnet50").state_dict().items()
        if "running" not in k and "tracked" not in k
    }
    path = write(to_detectron(state, "bn"), tmp_path / "R-50.pkl")
    conversion = convert(read_weights(path))
    conversion.check_complete()
    assert len(conversion.tensors) == 265 and len(conversion.added) == 106
    assert conversion.cfg.MODEL.RESNETS.STRIDE_IN_1X1
    cfg = conversion.cfg.clone()
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    resnet = build_backbone(cfg, ShapeSpec(channels=3)).eval()
    DetectionCheckpointer(resnet).load(str(path))
    with torch.no_grad():
        expected = resnet(image.flip(1) - MEAN.flip(0))
    assert_same(ours(conversion, image), expected)


def test_backbone_of_a_detectron2_detector(image, tmp_path):
    """The backbone of a detector computes the same features after saving and reading."""
    detector = trained(build_model(shapes_config("mask_rcnn_R_18_FPN_gn")))
    path = write({"model": detector.state_dict(), "iteration": 7}, tmp_path / "model_final.pth")
    keys = ["MODEL.PIXEL_STD", "[57.375, 57.12, 58.395]"]
    conversion = convert(read_weights(path), opts=keys)
    conversion.check_complete()
    (reason,) = set(conversion.dropped.values())
    assert "detector" in reason
    save_backbone(conversion.tensors, conversion.cfg, tmp_path / "backbone.pth")
    again = convert(read_weights(tmp_path / "backbone.pth"))
    mean, std = torch.tensor(BGR_MEAN).view(3, 1, 1), STD.flip(0)
    with torch.no_grad():
        expected = detector.backbone.bottom_up((image.flip(1) - mean) / std)
    assert_same(ours(again, image), expected)


def test_pixel_format_of_files_in_detectron2_format():
    """Detectron2's converter of torchvision models records the author, but no pixel format."""
    state = convert(WeightsFile(torch_model("resnet50").state_dict())).tensors
    for author, image_format, stride in (("torchvision", "RGB", False), ("", "BGR", True)):
        keys = convert(WeightsFile(state, author=author)).cfg
        assert keys.INPUT.FORMAT == image_format and keys.MODEL.RESNETS.STRIDE_IN_1X1 is stride


def test_folding_standardised_filters_is_rejected():
    keys = ["MODEL.RESNETS.WEIGHT_STANDARDIZATION", "True"]
    with pytest.raises(InputError, match="--fold-input"):
        fold_input(convert(WeightsFile(torch_model("resnet18", "GN").state_dict()), opts=keys))


@pytest.mark.parametrize("opts", [(), ("INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", BGR_MEAN)])
def test_fold_input(image, opts):
    """The features stay the same with Detectron2's default pixel format."""
    conversion = convert(WeightsFile(torch_model("resnet18").state_dict()), opts=opts)
    before = ours(conversion, image)
    fold_input(conversion)
    keys = conversion.cfg
    assert keys.INPUT.FORMAT == "BGR" and list(keys.MODEL.PIXEL_STD) == [1, 1, 1]
    assert tuple(keys.MODEL.PIXEL_MEAN) == BGR_MEAN
    assert_same(ours(conversion, image), before)


def test_facts_are_in_both_files(tmp_path):
    model = torch_model("resnet50", "GN")
    keys = ["MODEL.GROUP_NORM.NUM_GROUPS", "16"]
    conversion = convert(WeightsFile(model.state_dict()), opts=keys)
    save_backbone(conversion.tensors, conversion.cfg, tmp_path / "R-50.pth")
    facts = read_weights(tmp_path / "R-50.pth").facts
    snippet = yaml.safe_load((tmp_path / "R-50.yaml").read_text())
    assert snippet["MODEL"].pop("WEIGHTS") == str(tmp_path / "R-50.pth")
    for key, value in facts.items():
        node = snippet
        for part in key.split("."):
            node = node[part]
        assert node == value
    assert facts["MODEL.GROUP_NORM.NUM_GROUPS"] == 16
    assert facts["MODEL.RESNETS.STRIDE_IN_1X1"] is False and facts["INPUT.FORMAT"] == "RGB"


PREFIXES = [
    *("backbone.body.", "module.encoder_q.", "model.", "_orig_mod.resnet.", "img_backbone."),
    *("backbone.0.body.", "teacher.backbone."),
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_whole_models(prefix):
    state = torch_model("resnet18").state_dict()
    conversion = convert(WeightsFile({prefix + name: tensor for name, tensor in state.items()}))
    conversion.check_complete()
    assert len(conversion.tensors) == 100


def test_two_networks_in_one_file():
    """--prefix chooses one; of MoCo's two encoders the query encoder is the default."""
    first, second = (torch_model("resnet18").state_dict() for _ in range(2))
    second["conv1.weight"] = second["conv1.weight"] + 1

    def both(one: str, two: str) -> WeightsFile:
        states = ((one, first), (two, second))
        return WeightsFile({p + name: t for p, state in states for name, t in state.items()})

    file = both("student.module.", "teacher.module.")
    with pytest.raises(InputError, match=r'"student\.module\.", "teacher\.module\.".*--prefix'):
        convert(file)
    conversion = convert(file, prefix="teacher.module.")
    conversion.check_complete()
    assert torch.equal(conversion.tensors["stem.conv1.weight"], second["conv1.weight"])
    with pytest.raises(InputError, match="--prefix"):
        convert(file, prefix="other.")
    moco = convert(both("module.encoder_k.", "module.encoder_q."))
    assert torch.equal(moco.tensors["stem.conv1.weight"], second["conv1.weight"])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layer2.0.conv1.weight", float("nan"), r"res3\.0\.conv1\.weight is infinite or NaN"),
        ("bn1.running_var", float("inf"), r"stem\.conv1\.norm\.running_var is infinite or NaN"),
        ("layer1.0.bn1.running_var", -1.0, r"res2\.0\.conv1\.norm\.running_var is negative"),
    ],
)
def test_invalid_values(name, value, words):
    state = torch_model("resnet18").state_dict()
    state[name].view(-1)[3] = value
    with pytest.raises(InputError, match=words):
        convert(WeightsFile(state))


def test_quantised_filters():
    state = torch_model("resnet18").state_dict()
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].to(torch.int8)
    with pytest.raises(InputError, match=r"res2\.0\.conv1\.weight .*torch\.int8"):
        convert(WeightsFile(state))


def test_bn_is_not_loaded_as_gn():
    """A file without running statistics is assumed to have GN, and this is reported."""
    state = torch_model("resnet18").state_dict()
    with pytest.raises(InputError, match="--norm GN --calibrate"):
        convert(WeightsFile(state), opts=["MODEL.RESNETS.NORM", "GN"])
    conversion = convert(WeightsFile(without("running", state)))
    assert conversion.assumed["MODEL.RESNETS.NORM"] == "GN"
    assert conversion.assumed["MODEL.GROUP_NORM.NUM_GROUPS"] == 32
    assert "MODEL.RESNETS.NORM" not in convert(WeightsFile(state)).assumed


def test_mean_and_std_have_the_channel_order_of_the_format():
    state = torch_model("resnet18").state_dict()
    keys = convert(WeightsFile(state), opts=["INPUT.FORMAT", "BGR"]).cfg.MODEL
    assert tuple(keys.PIXEL_MEAN) == BGR_MEAN and keys.PIXEL_STD == [57.375, 57.12, 58.395]


@pytest.mark.parametrize(
    "pair",
    [
        ("INPUT.FORMAT", "L"),
        ("MODEL.PIXEL_MEAN", "[1.0, 2.0]"),
        ("MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]"),
        ("MODEL.RESNETS.DEPTH", "77"),
    ],
)
def test_invalid_config_values(pair):
    with pytest.raises(InputError):
        convert(WeightsFile(torch_model("resnet18").state_dict()), opts=pair)


def without(pattern, state):
    return {k: v for k, v in state.items() if not re.search(pattern, k)}


def test_missing_and_unknown_tensors_are_rejected():
    state = torch_model("resnet18").state_dict()
    conversion = convert(WeightsFile(without(r"layer4.1.bn2", state)))
    with pytest.raises(InputError, match=r"4 .*res5\.1\.conv2\.norm.*--allow-missing"):
        conversion.check_complete()
    conversion.check_complete(missing=["res5.1.conv2.norm.*"])
    conversion = convert(WeightsFile({**state, "layer1.0.se.weight": torch.ones(2)}))
    with pytest.raises(InputError, match=r"1 .*layer1\.0\.se\.weight.*--allow-unknown"):
        conversion.check_complete()
    conversion.check_complete(unknown=["layer1.0.se.*"])
    conversion = convert(WeightsFile({**state, "conv1.weight": torch.ones(64, 3, 3, 3)}))
    with pytest.raises(InputError, match=r"stem.conv1.weight of shape \(64, 3, 7, 7\)"):
        conversion.check_complete()


def bit(state):
    return {"resnet/root_block/standardized_conv2d/kernel": torch.ones(7, 7, 3, 64)}


def standardized(state):
    """Filters with mean 0, as after training with weight standardisation."""
    return {k: v - v.mean((1, 2, 3), True) if v.dim() == 4 else v for k, v in state.items()}


REJECTED = {
    "BiT": (bit, "pre-activation"),
    "timm's resnetv2": (
        lambda _: {"stages.0.blocks.0.norm1.weight": torch.ones(2)},
        "pre-activation",
    ),
    "deep stem": (
        lambda s: {**without("^conv1", s), "conv1.0.weight": torch.ones(32, 3, 3, 3)},
        "ResNet-C or -D",
    ),
    "weight standardisation": (standardized, "WEIGHT_STANDARDIZATION True"),
    "no ResNet": (
        lambda _: {"features.conv0.weight": torch.ones(2)},
        r"features\.conv0\.weight.*mmdetection, torchvision, ",
    ),
    "too few blocks": (lambda s: without(r"layer3.1", s), "ResNet-18, 34, 50, 101 or 152"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case):
    change, words = REJECTED[case]
    state = change(torch_model("resnet18", "GN").state_dict())
    with pytest.raises(InputError, match=words):
        convert(WeightsFile(state))


def test_groups_that_do_not_divide():
    state = torch_model("resnet18", "GN").state_dict()
    with pytest.raises(InputError, match=r"\b64\b.*\b24\b"):
        convert(WeightsFile(state), opts=["MODEL.GROUP_NORM.NUM_GROUPS", "24"])


def test_standardised_weights_for_standardised_convolutions():
    state = standardized(torch_model("resnet18", "GN").state_dict())
    keys = ["MODEL.RESNETS.WEIGHT_STANDARDIZATION", "True"]
    conversion = convert(WeightsFile(state), opts=keys)
    assert type(build_network(conversion.cfg).res2[0].conv1).__name__ == "StandardizedConv2d"


def test_a_file_with_two_networks():
    """As MoCo's: the error names the flag, whose value may leave out outer modules."""
    network = torchvision.models.resnet18().state_dict()
    tensors = {
        f"module.encoder_{which}.{name}": tensor
        for which in "qk"
        for name, tensor in network.items()
    }
    file = WeightsFile(tensors)
    with pytest.raises(InputError, match=r'--prefix "module\.encoder_q\."'):
        convert(file).check_complete()
    for prefix in ("module.encoder_k.", "encoder_k"):
        conversion = convert(file, prefix=prefix)
        conversion.check_complete()
        assert torch.equal(conversion.tensors["stem.conv1.weight"], network["conv1.weight"])
