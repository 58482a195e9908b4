"""`tools/pretrain_net.py` trains, resumes, evaluates and saves its backbone."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, command, shapes_config
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from gn_det.checkpoint.save import save_backbone
from gn_det.config_file import read_config
from gn_det.data.moving_shapes import make_moving_shapes
from gn_det.engine import pretrain, train, trainer
from gn_det.errors import InputError

GN = "configs/Shapes/pretrain_R_18_gn.yaml"
# About 40 crops of 12 training images: 2 to 3 iterations per epoch
SMALL = {
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.WARMUP_ITERS": 5,
    "PRETRAIN.REFERENCE_BATCH_SIZE": 16,
    "PRETRAIN.IMAGE_SIZE": 32,
    "DATASETS.TEST": "('shapes/crops/train',)",
}


def opts(output: Path, **more: object) -> list[str]:
    keys = {**SMALL, "OUTPUT_DIR": output}
    keys.update({key.replace("__", "."): value for key, value in more.items()})
    return [*TINY, *(str(word) for pair in keys.items() for word in pair)]


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


@pytest.fixture(scope="module", params=["bn", "gn"])
def pretrained(request, tmp_path_factory) -> tuple[str, Path, pretrain.PretrainTrainer]:
    output = tmp_path_factory.mktemp(request.param)
    # GN trains until it has learned something, BN only updates its statistics
    schedule = {"bn": (2, "()"), "gn": (30, "(25,)")}[request.param]
    easy = {"PRETRAIN__MIN_CROP_AREA": 0.9}
    words = opts(output, PRETRAIN__EPOCHS=schedule[0], PRETRAIN__STEPS=schedule[1], **easy)
    config = f"configs/Shapes/pretrain_R_18_{request.param}.yaml"
    seed_all_rng(0)
    cfg = read_config(config, words)
    trainer = pretrain.PretrainTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return request.param, output, trainer


@pytest.mark.parametrize("pretrained", ["gn"], indirect=True)
def test_the_loss_decreases(pretrained):
    _, output, _ = pretrained
    losses = [line["total_loss"] for line in lines(output) if "total_loss" in line]
    # An average, since the loss of one batch depends on rounding errors of the CPU
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0], losses
    last = lines(output)[-1]
    assert last["accuracy/top1"] > 60, "on the training crops, with 6 classes"
    assert last["accuracy/top1"] <= last["accuracy/top5"] <= 100


def test_a_detector_loads_the_backbone(pretrained):
    """The file fills every tensor of the detector's backbone with the trained values."""
    norm, output, trainer = pretrained
    weights = output / "backbone.pth"
    name = {"bn": "mask_rcnn_R_18_FPN_frozenbn", "gn": "mask_rcnn_R_18_FPN_gn"}[norm]
    model = build_model(shapes_config(name))
    DetectionCheckpointer(model).load(str(weights))
    loaded, trained = model.backbone.bottom_up.state_dict(), trainer.model.backbone.state_dict()
    for key, tensor in loaded.items():
        assert_close(tensor, trained[key], rtol=0, atol=0, msg=key)
    left_over = set(trained) - set(loaded)
    assert all(key.endswith("num_batches_tracked") for key in left_over)
    if norm == "bn":
        assert any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())
        assert not torch.equal(loaded["res3.0.conv1.norm.running_mean"], torch.zeros(128))


def test_weight_decay_includes_gamma_and_beta(pretrained):
    """As in the paper's ImageNet training (Section 4.1), but not in detection."""
    *_, trainer = pretrained
    groups = trainer.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {1e-4}
    tensors = {id(p) for group in groups for p in group["params"]}
    assert tensors == {id(p) for p in trainer.model.parameters()}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """The command runs for one epoch, and is resumed for a second one."""
    output = tmp_path_factory.mktemp("resumed")
    for epochs, flags in ((1, []), (2, ["--resume"])):
        words = opts(output, PRETRAIN__EPOCHS=epochs, PRETRAIN__STEPS="()")
        done = command("tools/pretrain_net.py", "--config-file", GN, *flags, *words)
        assert done.returncode == 0, done.stderr[-2000:]
    return output


def test_resumes_at_the_last_iteration(resumed):
    log = (resumed / "log.txt").read_text()
    one, two = (int(n) for n in re.findall(r"Starting training from iteration (\d+)", log))
    images = len(list(Path(pretrain.read_folder("shapes/crops/train").root).glob("*/*.png")))
    assert (one, two) == (0, round(images / 16))
    final = torch.load(resumed / "model_final.pth", weights_only=True)
    assert final["iteration"] + 1 == round(2 * images / 16)
    state = torch.load(resumed / "backbone.pth", weights_only=True)["model"]
    assert_close(state, {k: final["model"][f"backbone.{k}"] for k in state}, rtol=0, atol=0)
    assert json.loads((resumed / "run.json").read_text())["seed"] == 0
    assert list(resumed.glob("events.out.tfevents.*"))


def test_eval_only(resumed, tmp_path):
    """Same results as after training; the training folder is not needed."""
    weights = resumed / "model_final.pth"
    words = opts(tmp_path, MODEL__WEIGHTS=weights, DATASETS__TRAIN="('none',)")
    results = pretrain.PretrainTrainer.evaluate(read_config(GN, words), resume=False)
    expected = lines(resumed)[-1]
    assert results["accuracy"]["top1"] == pytest.approx(expected["accuracy/top1"])


@pytest.mark.parametrize(("dtype", "device"), [("bfloat16", "cpu"), ("float16", "cuda")])
def test_mixed_precision(dtype, device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    words = opts(tmp_path, MODEL__DEVICE=device, SOLVER__AMP__ENABLED=True, PRETRAIN__STEPS="()")
    words += ["SOLVER.AMP.DTYPE", dtype]
    trained = pretrain.PretrainTrainer(read_config(GN, words))
    seen = set()
    stem = trained.model.backbone.stem.conv1
    stem.register_forward_hook(lambda conv, inputs, output: seen.add(output.dtype))
    trained.train()
    assert getattr(torch, dtype) in seen
    assert (tmp_path / "backbone.pth").exists()


def test_accumulated_gradients(tmp_path):
    """With GN, they equal those of the undivided batch."""
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = [{"image": image, "label": i} for i, image in enumerate(images)]
    gradients = []
    for parts in (1, 2):
        words = opts(tmp_path, SOLVER__ACCUMULATE_ITERS=parts)
        cfg = read_config(GN, words)
        torch.manual_seed(0)
        model = pretrain.PretrainTrainer.build_model(cfg)
        with EventStorage():
            sum(model(batch).values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def refusal(tmp_path: Path, *flags: str, run: Callable = pretrain.run, **more: object) -> str:
    """The error message of a command that must be refused."""
    with pytest.raises(SystemExit) as stop:
        run(["--config-file", GN, *flags, *opts(tmp_path / "run", **more)])
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    assert not list(tmp_path.glob("run/*.pth"))
    return message


def folders(root: Path, **classes: int) -> str:
    """A folder with the given number of empty files for each class."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(b"")
    root.mkdir(exist_ok=True)
    return str(root)


def test_folders_that_cannot_be_used(tmp_path):
    message = refusal(tmp_path, DATASETS__TRAIN="('nowhere',)")
    assert "folder nowhere" in message
    none, empty = folders(tmp_path / "none"), folders(tmp_path / "empty", cat=0)
    assert none in refusal(tmp_path, DATASETS__TRAIN=f"('{none}',)")
    assert empty in refusal(tmp_path, DATASETS__TRAIN=f"('{empty}',)")
    two = folders(tmp_path / "two", cat=20, dog=1)
    message = refusal(tmp_path, DATASETS__TRAIN=f"('{two}',)")
    assert "two has 2 classes and shapes/crops/train has 6" in message
    few = {"DATASETS__TRAIN": f"('{two}',)", "DATASETS__TEST": "()", "PRETRAIN__STEPS": "()"}
    message = refusal(tmp_path, SOLVER__IMS_PER_BATCH=64, **few)
    assert "has 21 images, fewer than SOLVER.IMS_PER_BATCH 64" in message
    message = refusal(tmp_path, **few)
    assert re.search(r"two/\w+/\d+.png cannot be read", message)
    assert "DATASETS.TRAIN ()" in refusal(tmp_path, DATASETS__TRAIN="()")


def test_keys_that_cannot_be_used(tmp_path):
    message = refusal(tmp_path, "--num-gpus", "3")
    assert "SOLVER.IMS_PER_BATCH 16: " in message and "3 GPUs" in message
    message = refusal(tmp_path, PRETRAIN__STEPS="(50,)", PRETRAIN__EPOCHS=40)
    assert "PRETRAIN.STEPS (50,): " in message and "[50]: PRETRAIN.EPOCHS is 40" in message
    assert "MODEL.WEIGHTS" in refusal(tmp_path, "--eval-only")
    assert "INPUT.FORMAT L" in refusal(tmp_path, INPUT__FORMAT="L")


def test_errors_name_the_right_tool(tmp_path):
    assert "tools/pretrain_net.py" in refusal(tmp_path, run=train.run)
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", "OUTPUT_DIR", tmp_path)
    with pytest.raises(InputError, match=r"GeneralizedRCNN.* tools/train_net.py"):
        pretrain.PretrainTrainer(cfg)
    with pytest.raises(InputError, match=r"tools/pretrain_net.py"):
        trainer.Trainer(read_config(GN, opts(tmp_path)))


CLIPS = ("SOLVER.IMS_PER_BATCH", "8", "PRETRAIN.EPOCHS", "2", "PRETRAIN.STEPS", "()")


def test_clips(tmp_path, monkeypatch):
    """Trained in passes from an image model, and evaluated with several clips per video."""
    make_moving_shapes(tmp_path / "moving_shapes", 24, 8)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = read_config(GN, [*TINY, "PRETRAIN.IMAGE_SIZE", "32"])
    save_backbone(build_model(cfg).backbone.state_dict(), cfg, tmp_path / "flat.pth")
    words = (*CLIPS, "SOLVER.ACCUMULATE_ITERS", "2", "PRETRAIN.TEST_CLIPS", "2")
    words = (*words, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path / "out")
    config = ("--config-file", "configs/Shapes/clips_R_18_gn.yaml")
    weights = ("MODEL.WEIGHTS", tmp_path / "flat.pth")
    done = command("tools/pretrain_net.py", *config, *words, *weights)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"loaded +60 tensors: ResNet 60", done.stderr + done.stdout)
    last = lines(tmp_path / "out")[-1]
    assert last["iteration"] == 6 and 0 <= last["accuracy/top1"] <= 100
    state = torch.load(tmp_path / "out" / "backbone.pth", weights_only=True)["model"]
    assert state["stem.conv1.weight"].shape == (64, 3, 5, 7, 7)
    shown = command("tools/pretrain_net.py", *config, "--check", *words)
    assert "24 clips in 4 classes" in shown.stdout, shown.stdout


def test_weight_normalization_is_folded(tmp_path):
    """`backbone.pth` holds plain weights and biases."""
    words = opts(tmp_path, PRETRAIN__EPOCHS=1, PRETRAIN__STEPS="()", MODEL__RESNETS__NORM="WN")
    trainer = pretrain.PretrainTrainer(read_config(GN, words))
    trainer.train()
    state = torch.load(tmp_path / "backbone.pth", weights_only=True)["model"]
    convs = {n for n, m in trainer.model.backbone.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert {*state} == {f"{name}.{kind}" for name in convs for kind in ("weight", "bias")}
    for name in convs:
        layer = trainer.model.backbone.get_submodule(name)
        assert_close(state[f"{name}.weight"], layer.weight)
