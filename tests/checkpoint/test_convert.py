"""Converted backbones give the features of the model that they were taken from."""

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

from gn_det.checkpoint.convert import build_resnet, convert, fold_input
from gn_det.checkpoint.read import WeightsFile, read_weights
from gn_det.checkpoint.save import save_backbone
from gn_det.errors import InputError

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)  # RGB
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
STAGES = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """A photograph, (1, 3, 96, 96), RGB, 0 to 255."""
    with get_sample_data("grace_hopper.jpg") as file:
        photograph = Image.open(file).convert("RGB").resize((96, 96))
    return torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None].float()


def trained(model: nn.Module) -> nn.Module:
    """As if it had been trained: no norm is left as it was initialised."""
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
    """The stages' outputs of a model whose stages are layer1 to layer4."""
    found = {}
    for name, layer in STAGES.items():
        getattr(model, layer).register_forward_hook(
            lambda _, __, output, name=name: found.update({name: output})
        )
    model(x)
    return found


@torch.no_grad()
def ours(conversion, picture: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the converted ResNet makes of a picture, through its own config's pixel settings."""
    keys = conversion.cfg
    resnet = build_resnet(keys, conversion.tensors)
    x = picture if keys.INPUT.FORMAT == "RGB" else picture.flip(1)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (keys.MODEL.PIXEL_MEAN, keys.MODEL.PIXEL_STD)
    )
    return resnet((x - mean) / std)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for stage, features_ in wanted.items():
        scale = features_.abs().max().item()
        assert scale > 1e-3
        assert_close(found[stage] / scale, features_ / scale, rtol=0, atol=1e-4, msg=stage)


TORCHVISION = {
    **{"resnet18": 100, "resnet34": 180, "resnet50": 265, "resnet101": 520, "resnet152": 775},
    **{"resnext50_32x4d": 265, "wide_resnet50_2": 265},
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, picture):
    model = torch_model(name)
    conversion = convert(WeightsFile(model.state_dict()))
    conversion.refuse_gaps()
    assert conversion.source == "torchvision" and len(conversion.tensors) == TORCHVISION[name]
    dropped = set(conversion.dropped)
    assert {"fc.weight", "fc.bias", "bn1.num_batches_tracked"} <= dropped
    assert all(n.startswith("fc.") or n.endswith("num_batches_tracked") for n in dropped)
    assert_same(ours(conversion, picture), features(model, (picture - MEAN) / STD))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50_gn", "resnext50_32x4d"])
def test_timm(name, picture):
    timm = pytest.importorskip("timm")
    model = trained(timm.create_model(name))
    conversion = convert(WeightsFile(model.state_dict()))
    conversion.refuse_gaps()
    assert len(conversion.tensors) == {"resnet18": 100, "resnet50_gn": 159}.get(name, 265)
    assert model.default_cfg["mean"] == (0.485, 0.456, 0.406)
    assert_same(ours(conversion, picture), features(model, (picture - MEAN) / STD))


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
    """TensorFlow's layout and names, as tensorpack's ResNet example makes them."""
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
    """Caffe2's blobs, as Detectron's ResNet.py names them."""
    blobs = {}
    for name, tensor in state.items():
        *layers, kind = name.split(".")
        if layers[0] == "fc":
            blobs[f"pred_{kind[0]}"] = tensor.numpy()
            continue
        if len(layers) == 1:
            # Detectron's BN stem has a prefix that its GN stem has not
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
def test_gn_sources(source, depth, picture, tmp_path):
    model = torch_model(f"resnet{depth}", "GN")
    rename, image_format, std = GN_SOURCES[source]
    suffix = {"tensorpack": ".npz", "detectron": ".pkl"}.get(source, ".pth")
    conversion = convert(read_weights(write(rename(model.state_dict()), tmp_path / f"w{suffix}")))
    conversion.refuse_gaps()
    # Names alone cannot tell this one from timm's or torchvision's; all else is the same
    assert conversion.source in (source, "torchvision")
    assert len(conversion.tensors) == {50: 159, 101: 312}[depth]
    rgb = image_format == "RGB"
    x, mean = (picture, MEAN) if rgb else (picture.flip(1), MEAN.flip(0))
    assert_same(ours(conversion, picture), features(model, (x - mean) / std))


def test_fused_bn_as_detectron2_loads_it(picture, tmp_path):
    """MSRA's files: BN fused into its affine map, stride on the first 1x1."""
    state = {
        k: v
        for k, v in torch_model("resnet50").state_dict().items()
        if "running" not in k and "tracked" not in k
    }
    path = write(to_detectron(state, "bn"), tmp_path / "R-50.pkl")
    conversion = convert(read_weights(path))
    conversion.refuse_gaps()
    assert len(conversion.tensors) == 265 and len(conversion.made) == 106
    assert conversion.cfg.MODEL.RESNETS.STRIDE_IN_1X1
    cfg = conversion.cfg.clone()
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    resnet = build_backbone(cfg, ShapeSpec(channels=3)).eval()
    DetectionCheckpointer(resnet).load(str(path))
    with torch.no_grad():
        wanted = resnet(picture.flip(1) - MEAN.flip(0))
    assert_same(ours(conversion, picture), wanted)


def test_detectron2s_own_detector(picture, tmp_path):
    """The trunk of a whole detector, through the file that the tool writes, is what it was."""
    detector = trained(build_model(shapes_config("mask_rcnn_R_18_FPN_gn")))
    path = write({"model": detector.state_dict(), "iteration": 7}, tmp_path / "model_final.pth")
    keys = ["MODEL.PIXEL_STD", "[57.375, 57.12, 58.395]"]
    conversion = convert(read_weights(path), opts=keys)
    conversion.refuse_gaps()
    assert set(conversion.dropped.values()) == {"parts of a detector"}
    save_backbone(conversion.tensors, conversion.cfg, tmp_path / "trunk.pth")
    again = convert(read_weights(tmp_path / "trunk.pth"))
    mean, std = torch.tensor(BGR_MEAN).view(3, 1, 1), STD.flip(0)
    with torch.no_grad():
        wanted = detector.backbone.bottom_up((picture.flip(1) - mean) / std)
    assert_same(ours(again, picture), wanted)


def test_who_wrote_a_file_in_detectron2_s_format():
    """Its own converter of torchvision's models leaves a name, and no word of the pixels."""
    state = convert(WeightsFile(torch_model("resnet50").state_dict())).tensors
    for author, image_format, stride in (("torchvision", "RGB", False), ("", "BGR", True)):
        keys = convert(WeightsFile(state, author=author)).cfg
        assert keys.INPUT.FORMAT == image_format and keys.MODEL.RESNETS.STRIDE_IN_1X1 is stride


def test_folding_standardised_filters_is_refused():
    keys = ["MODEL.RESNETS.WEIGHT_STANDARDIZATION", "True"]
    with pytest.raises(InputError, match="--fold-input"):
        fold_input(convert(WeightsFile(torch_model("resnet18", "GN").state_dict()), opts=keys))


@pytest.mark.parametrize("opts", [(), ("INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", BGR_MEAN)])
def test_fold_input(picture, opts):
    """The same features from Detectron2's default pixels."""
    conversion = convert(WeightsFile(torch_model("resnet18").state_dict()), opts=opts)
    before = ours(conversion, picture)
    fold_input(conversion)
    keys = conversion.cfg
    assert keys.INPUT.FORMAT == "BGR" and list(keys.MODEL.PIXEL_STD) == [1, 1, 1]
    assert tuple(keys.MODEL.PIXEL_MEAN) == BGR_MEAN
    assert_same(ours(conversion, picture), before)


def test_facts_stand_in_both_files(tmp_path):
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
    conversion.refuse_gaps()
    assert len(conversion.tensors) == 100


def test_two_networks_in_one_file():
    """Which is taken has to be said; a query encoder goes before its copy of earlier weights."""
    first, second = (torch_model("resnet18").state_dict() for _ in range(2))
    second["conv1.weight"] = second["conv1.weight"] + 1

    def both(one: str, two: str) -> WeightsFile:
        states = ((one, first), (two, second))
        return WeightsFile({p + name: t for p, state in states for name, t in state.items()})

    file = both("student.module.", "teacher.module.")
    with pytest.raises(InputError, match=r'"student\.module\.", "teacher\.module\.".*--prefix'):
        convert(file)
    conversion = convert(file, prefix="teacher.module.")
    conversion.refuse_gaps()
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
        ("layer1.0.bn1.running_var", -1.0, "below 0, which no variance is"),
    ],
)
def test_values_that_no_network_has(name, value, words):
    state = torch_model("resnet18").state_dict()
    state[name].view(-1)[3] = value
    with pytest.raises(InputError, match=words):
        convert(WeightsFile(state))


def test_quantised_filters():
    state = torch_model("resnet18").state_dict()
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].to(torch.int8)
    with pytest.raises(InputError, match="quantised"):
        convert(WeightsFile(state))


def test_bn_is_no_gn():
    """Nor is a file that lost its running statistics taken for GN without a word."""
    state = torch_model("resnet18").state_dict()
    with pytest.raises(InputError, match="--norm GN --calibrate"):
        convert(WeightsFile(state), opts=["MODEL.RESNETS.NORM", "GN"])
    conversion = convert(WeightsFile(without("running", state)))
    assert conversion.assumed["MODEL.RESNETS.NORM"] == "GN"
    assert conversion.assumed["MODEL.GROUP_NORM.NUM_GROUPS"] == 32
    assert "MODEL.RESNETS.NORM" not in convert(WeightsFile(state)).assumed


def test_mean_and_std_are_told_in_the_order_of_the_colours():
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
def test_keys_that_no_backbone_has(pair):
    with pytest.raises(InputError):
        convert(WeightsFile(torch_model("resnet18").state_dict()), opts=pair)


def without(pattern, state):
    return {k: v for k, v in state.items() if not re.search(pattern, k)}


def test_gaps_are_refused():
    state = torch_model("resnet18").state_dict()
    conversion = convert(WeightsFile(without(r"layer4.1.bn2", state)))
    with pytest.raises(InputError, match=r"4 .* missing .*res5\.1\.conv2\.norm.* --allow-missing"):
        conversion.refuse_gaps()
    conversion.refuse_gaps(missing=["res5.1.conv2.norm.*"])
    conversion = convert(WeightsFile({**state, "layer1.0.se.weight": torch.ones(2)}))
    with pytest.raises(InputError, match=r"1 tensors are unknown .* layer1\.0\.se\.weight"):
        conversion.refuse_gaps()
    conversion.refuse_gaps(unknown=["layer1.0.se.*"])
    conversion = convert(WeightsFile({**state, "conv1.weight": torch.ones(64, 3, 3, 3)}))
    with pytest.raises(InputError, match=r"stem.conv1.weight of shape \(64, 3, 7, 7\)"):
        conversion.refuse_gaps()


def bit(state):
    return {"resnet/root_block/standardized_conv2d/kernel": torch.ones(7, 7, 3, 64)}


def standardized(state):
    """Filters without means, as weight standardisation leaves them."""
    return {k: v - v.mean((1, 2, 3), True) if v.dim() == 4 else v for k, v in state.items()}


REFUSED = {
    "BiT": (bit, "pre-activation"),
    "timm's resnetv2": (
        lambda _: {"stages.0.blocks.0.norm1.weight": torch.ones(2)},
        "pre-activation",
    ),
    "deep stem": (
        lambda s: {**without("^conv1", s), "conv1.0.weight": torch.ones(32, 3, 3, 3)},
        "stem is three convolutions",
    ),
    "weight standardisation": (standardized, "WEIGHT_STANDARDIZATION True"),
    "no ResNet": (
        lambda _: {"features.0.weight": torch.ones(2)},
        "no ResNet that mmdetection, torchvision, .* it begins with features",
    ),
    "too few blocks": (lambda s: without(r"layer3.1", s), "blocks are not those"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    change, words = REFUSED[case]
    state = change(torch_model("resnet18", "GN").state_dict())
    with pytest.raises(InputError, match=words):
        convert(WeightsFile(state))


def test_groups_that_do_not_divide():
    state = torch_model("resnet18", "GN").state_dict()
    with pytest.raises(InputError, match="64 channels do not divide into 24 groups"):
        convert(WeightsFile(state), opts=["MODEL.GROUP_NORM.NUM_GROUPS", "24"])


def test_standardised_weights_for_standardised_convolutions():
    state = standardized(torch_model("resnet18", "GN").state_dict())
    keys = ["MODEL.RESNETS.WEIGHT_STANDARDIZATION", "True"]
    conversion = convert(WeightsFile(state), opts=keys)
    assert type(build_resnet(conversion.cfg).res2[0].conv1).__name__ == "StandardizedConv2d"
