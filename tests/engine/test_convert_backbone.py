"""`tools/convert_backbone.py`: converted files load into the models of matching configs."""

import os
import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import torchvision
import yaml
from conftest import command, shapes_config
from torch import nn

from gn_det.check import ConfigError, check_config
from gn_det.checkpoint import bn_to_gn
from gn_det.checkpoint.checkpointer import StrictCheckpointer
from gn_det.checkpoint.read import read_weights
from gn_det.checkpoint.recipe import recorded_recipe
from gn_det.engine.convert_backbone import run
from gn_det.modeling import build_on_meta_device

GN, FROZEN = "mask_rcnn_R_18_FPN_gn", "mask_rcnn_R_18_FPN_frozenbn"


@pytest.fixture(scope="module")
def bn_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("torchvision") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def keys_of(output: Path) -> list:
    """The keys and values of the YAML file of a converted backbone, as a flat list."""

    def pairs(node: dict, prefix: str = ""):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from pairs(value, f"{prefix}{key}.")
            else:
                yield from (f"{prefix}{key}", value)

    return list(pairs(yaml.safe_load(output.with_suffix(".yaml").read_text())))


@pytest.fixture(scope="module")
def converted(bn_file, tmp_path_factory) -> dict[str, Path]:
    """One backbone converted as FrozenBN and as GN with 16 groups."""
    folder = tmp_path_factory.mktemp("converted")
    outputs = {FROZEN: folder / "bn.pth", GN: folder / "gn.pth"}
    run([str(bn_file), str(outputs[FROZEN]), "--fold-input"])
    images = ["--calibrate", str(folder / "images"), "--num-pictures", "6"]
    (folder / "images" / "deeper").mkdir(parents=True)
    for i in range(8):
        image = torch.randint(256, (3, 90, 120 + i), dtype=torch.uint8)
        torchvision.io.write_jpeg(image, str(folder / "images" / "deeper" / f"{i}.jpg"))
    words = [str(bn_file), str(outputs[GN]), "--norm", "GN", *images, "--distill", "2"]
    run([*words, "MODEL.GROUP_NORM.NUM_GROUPS", "16", "MODEL.GROUP_NORM.DIM_PER_GP", "-1"])
    return outputs


@pytest.mark.parametrize("name", [FROZEN, GN])
def test_config_keys_and_weights_match_the_model(name, converted):
    cfg = shapes_config(name, *keys_of(converted[name]))
    check_config(cfg)
    checkpointer = StrictCheckpointer(build_on_meta_device(cfg))
    checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    filled = {*checkpointer.loaded.model} - checkpointer.loaded.fresh
    assert len(filled) == {FROZEN: 100, GN: 60}[name]
    assert not checkpointer.loaded.unused


CONTRADICTIONS = {
    "MODEL.RESNETS.DEPTH": 34,
    "INPUT.FORMAT": "BGR",
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.RESNETS.WEIGHT_STANDARDIZATION": True,
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_configs_that_contradict_the_file(key, converted):
    """Pixel format, stride and architecture are recorded with the weights and checked."""
    cfg = shapes_config(GN, *keys_of(converted[GN]), key, CONTRADICTIONS[key])
    with pytest.raises(ConfigError) as error:
        check_config(cfg)
    assert [problem.key for problem in error.value.problems] == [key]


@pytest.mark.parametrize("norm", ["LN", "FrozenBN"])
def test_another_norm_than_the_file(norm, converted):
    cfg = shapes_config(GN, *keys_of(converted[GN]), "MODEL.RESNETS.NORM", norm)
    with pytest.raises(ConfigError, match=f'Group Normalization.* MODEL.RESNETS.NORM is "{norm}"'):
        check_config(cfg)


def test_another_grouping_than_the_file(converted, caplog):
    keys = [*keys_of(converted[GN]), "MODEL.GROUP_NORM.NUM_GROUPS", 32]
    check_config(shapes_config(GN, *keys))
    assert re.search(rf"{re.escape(str(converted[GN]))}.* 16 groups", caplog.text)


def test_suggested_commands(bn_file, converted):
    """For torchvision's names, and for BN in a GN model, the error names the command to run."""
    for weights, norm, words in (
        (bn_file, GN, f"run `python tools/convert_backbone.py {bn_file} "),
        (converted[FROZEN], GN, f"{converted[FROZEN].with_suffix('')}_gn.pth --norm GN --calib"),
    ):
        cfg = shapes_config(norm, "MODEL.WEIGHTS", weights)
        with pytest.raises(ConfigError) as error:
            check_config(cfg)
        assert words in str(error.value)


def test_the_recipe_of_a_conversion(bn_file, converted, tmp_path):
    """From BN: 16 channels per group by default, and the keys for fine-tuning in the YAML file."""
    output, images = tmp_path / "gn16.pth", str(converted[GN].parent / "images")
    run([str(bn_file), str(output), "--norm", "GN", "--calibrate", images, "--num-images", "4"])
    words = keys_of(output)
    keys = dict(zip(words[::2], words[1::2], strict=True))
    assert keys["MODEL.GROUP_NORM.DIM_PER_GP"] == 16
    recipe = {"MODEL.GROUP_NORM.HEADS_DIM_PER_GP": 2, "SOLVER.BACKBONE_MULTIPLIER": 0.1}
    assert recipe.items() <= keys.items() and recorded_recipe(str(output)) == recipe
    assert not recorded_recipe(str(converted[FROZEN])) and not recorded_recipe("catalog://x")


def test_from_one_grouping_to_another(converted, tmp_path):
    """GN weights can be calibrated for another grouping."""
    output = tmp_path / "gn8.pth"
    images = str(converted[GN].parent / "images")
    keys = ["MODEL.GROUP_NORM.NUM_GROUPS", "8"]
    run([str(converted[GN]), str(output), "--calibrate", images, *keys])
    before, after = (read_weights(path) for path in (converted[GN], output))
    assert after.facts == {**before.facts, "MODEL.GROUP_NORM.NUM_GROUPS": 8}
    name = "res4.0.conv1"
    filters = [file.tensors[f"{name}.weight"].flatten(1) for file in (after, before)]
    directions = torch.cosine_similarity(*filters)
    torch.testing.assert_close(directions.abs(), torch.ones_like(directions))
    assert not torch.equal(
        after.tensors[f"{name}.norm.weight"], before.tensors[f"{name}.norm.weight"]
    )


def test_distillation_that_fails(bn_file, converted, tmp_path, monkeypatch, caplog):
    """If distillation raises the errors, the calibrated weights are kept, with a warning."""

    def ruin(network, *_):
        with torch.no_grad():
            network.res5[1].conv2.weight.normal_()

    words = [str(bn_file), "--norm", "GN", "--calibrate", str(converted[GN].parent / "images")]
    run([*words, str(tmp_path / "calibrated.pth")])
    monkeypatch.setattr(bn_to_gn, "distill", ruin)
    run([*words, str(tmp_path / "distilled.pth"), "--distill", "5"])
    assert "5 distillation steps" in caplog.text
    one, two = (read_weights(tmp_path / f"{n}.pth").tensors for n in ("calibrated", "distilled"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_printed_summary(bn_file, tmp_path, capsys):
    run([str(bn_file), str(tmp_path / "out.pth")])
    printed = capsys.readouterr().out
    assert re.search(r"taken +100 .*torchvision\n", printed)
    assert re.search(r"dropped +22\n", printed)
    assert re.search(r" 2 .*: fc\.weight, \.\.\.\n", printed)
    assert re.search(r" 20 .*: bn1\.num_batches_tracked, \.\.\.\n", printed)
    assert re.search(r"missing +0\nunknown +0\n", printed)
    assert (tmp_path / "out.yaml").read_text() in printed


MISTAKES = {
    "no calibration": ([*("--norm", "GN")], "--norm GN needs --calibrate IMAGES"),
    "no images": (["--norm", "GN", "--calibrate", "{folder}"], "{folder} "),
    "calibrated BN": (["--calibrate", "{folder}"], "add --norm GN"),
    "only distilled": (["--norm", "GN", "--distill", "3"], "add --calibrate IMAGES"),
    "groups": (
        ["--norm", "GN", "--calibrate", "{images}", "MODEL.GROUP_NORM.NUM_GROUPS", "24"],
        "64 channels",
    ),
    "no such key": (["MODEL.NO_KEY", "3"], "MODEL.NO_KEY"),
    "no such group key": (
        ["--norm", "GN", "--calibrate", "{images}", "MODEL.GROUP_NORM.NUM_GROUP", "16"],
        "NUM_GROUP",
    ),
    "half a pair": (["INPUT.FORMAT"], "INPUT.FORMAT has no value"),
    "negative steps": (["--norm", "GN", "--calibrate", "{images}", "--distill", "-3"], "--distill"),
    "zero images": (
        ["--norm", "GN", "--calibrate", "{images}", "--num-pictures", "0"],
        "--num-images",
    ),
    "a GPU": (["MODEL.DEVICE", "cuda:9"], "MODEL.DEVICE"),
    "another network": (["--prefix", "teacher."], "--prefix"),
    "another source": (["--source", "tensorpack"], "not those of ResNet"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, bn_file, converted, tmp_path):
    """The error is one sentence, and an existing output file stays unchanged."""
    words, message = MISTAKES[mistake]
    images = converted[GN].parent / "images"
    *words, message = (w.format(folder=tmp_path, images=images) for w in (*words, message))
    output = tmp_path / "out.pth"
    output.write_text("mine")
    with pytest.raises(SystemExit, match=f"error: .*{re.escape(message)}"):
        run([str(bn_file), str(output), *words])
    assert output.read_text() == "mine" and list(tmp_path.iterdir()) == [output]


def test_invalid_paths(bn_file, converted, tmp_path):
    (tmp_path / "mine.yaml").write_text("MODEL: {}")
    for source, output, message in (
        (bn_file, tmp_path / "mine.pth", "mine.yaml exists"),
        ("no_scheme://R-50.pkl", tmp_path / "out.pth", "no_scheme://R-50.pkl cannot be downloaded"),
        (bn_file, tmp_path / "out.pkl", "out.pkl: OUTPUT must end in .pth"),
        (bn_file, bn_file, f"{bn_file} is also INPUT"),
        (bn_file, tmp_path / "no" / "out.pth", f"{tmp_path / 'no'} is not a folder"),
        (bn_file, tmp_path, f"{tmp_path}: OUTPUT must end in .pth"),
        (bn_file.parent, tmp_path / "out.pth", f"{bn_file.parent} is a folder"),
        (tmp_path / "absent.pth", tmp_path / "out.pth", "absent.pth does not exist"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{re.escape(message)}"):
            run([str(source), str(output)])


def test_a_full_disk(bn_file, tmp_path, monkeypatch):
    """Existing files stay unchanged, and no partial files are left."""
    run([str(bn_file), str(tmp_path / "out.pth")])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SystemExit, match=r"out\.pth cannot be written: No space left"):
        run([str(bn_file), str(tmp_path / "out.pth"), "--fold-input"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_address(bn_file, tmp_path, monkeypatch):
    """The file is downloaded into the same cache as Detectron2's MODEL.WEIGHTS."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(SimpleHTTPRequestHandler, directory=str(bn_file.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        run([f"{address}/{bn_file.name}", str(tmp_path / "out.pth")])
        with pytest.raises(SystemExit, match=r"error: .*none\.pth cannot be downloaded"):
            run([f"{address}/none.pth", str(tmp_path / "out.pth")])
        server.shutdown()
    assert len(read_weights(tmp_path / "out.pth").tensors) == 100


def test_gn_cannot_be_frozen(converted, tmp_path):
    with pytest.raises(SystemExit, match=r"gn\.pth has GN.* FrozenBN.* --norm"):
        run([str(converted[GN]), str(tmp_path / "out.pth"), "--norm", "FrozenBN"])


def test_the_command(bn_file, tmp_path):
    output = tmp_path / "out.pth"
    done = command("tools/convert_backbone.py", bn_file, output)
    assert done.returncode == 0 and output.exists(), done.stderr
    state = {"features.0.weight": nn.Linear(2, 2).weight.data}
    torch.save(state, tmp_path / "vgg.pth")
    done = command("tools/convert_backbone.py", tmp_path / "vgg.pth", tmp_path / "o.pth")
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*features\.0\.weight.*\n", done.stderr)
