"""The real `tools/pretrain_net.py`: learns, resumes, evaluates, hands its backbone over."""

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

from gn_det.config_file import read_config
from gn_det.engine import pretrain, train, trainer
from gn_det.errors import InputError

GN = "configs/Shapes/pretrain_R_18_gn.yaml"
# 12 training pictures have some 40 crops: 2 to 3 iterations an epoch
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
    # GN is to learn, and BN to gather statistics
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
def test_it_learns(pretrained):
    _, output, _ = pretrained
    losses = [line["total_loss"] for line in lines(output) if "total_loss" in line]
    # Of one batch it depends on the processor's roundings
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0], losses
    last = lines(output)[-1]
    assert last["accuracy/top1"] > 60, "on the crops that it has seen, 6 classes"
    assert last["accuracy/top1"] <= last["accuracy/top5"] <= 100


def test_handed_over_whole(pretrained):
    """Every tensor of the detector's trunk comes from the file, and is the trained one."""
    norm, output, trainer = pretrained
    weights = output / "backbone.pth"
    name = {"bn": "mask_rcnn_R_18_FPN_frozenbn", "gn": "mask_rcnn_R_18_FPN_gn"}[norm]
    model = build_model(shapes_config(name))
    DetectionCheckpointer(model).load(str(weights))
    trunk, trained = model.backbone.bottom_up.state_dict(), trainer.model.backbone.state_dict()
    for key, tensor in trunk.items():
        assert_close(tensor, trained[key], rtol=0, atol=0, msg=key)
    left_over = set(trained) - set(trunk)
    assert all(key.endswith("num_batches_tracked") for key in left_over)
    if norm == "bn":
        assert any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())
        assert not torch.equal(trunk["res3.0.conv1.norm.running_mean"], torch.zeros(128))


def test_gamma_and_beta_are_decayed(pretrained):
    """As in the paper's ImageNet training (Section 4.1), unlike in detection."""
    *_, trainer = pretrained
    groups = trainer.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {1e-4}
    tensors = {id(p) for group in groups for p in group["params"]}
    assert tensors == {id(p) for p in trainer.model.parameters()}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """The command itself: one epoch, then the rest of two."""
    output = tmp_path_factory.mktemp("resumed")
    for epochs, flags in ((1, []), (2, ["--resume"])):
        words = opts(output, PRETRAIN__EPOCHS=epochs, PRETRAIN__STEPS="()")
        done = command("tools/pretrain_net.py", "--config-file", GN, *flags, *words)
        assert done.returncode == 0, done.stderr[-2000:]
    return output


def test_resumes_where_it_was(resumed):
    log = (resumed / "log.txt").read_text()
    one, two = (int(n) for n in re.findall(r"Starting training from iteration (\d+)", log))
    pictures = len(list(Path(pretrain.read_folder("shapes/crops/train").root).glob("*/*.png")))
    assert (one, two) == (0, round(pictures / 16))
    final = torch.load(resumed / "model_final.pth", weights_only=True)
    assert final["iteration"] + 1 == round(2 * pictures / 16)
    state = torch.load(resumed / "backbone.pth", weights_only=True)["model"]
    assert_close(state, {k: final["model"][f"backbone.{k}"] for k in state}, rtol=0, atol=0)
    assert json.loads((resumed / "run.json").read_text())["seed"] == 0
    assert list(resumed.glob("events.out.tfevents.*"))


def test_evaluation_alone(resumed, tmp_path):
    """What the training's own evaluation found, from the folder of pictures to test on alone."""
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


def test_a_batch_in_parts(tmp_path):
    """The gradients of GN are those of the batch in one piece."""
    pictures = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = [{"image": picture, "label": i} for i, picture in enumerate(pictures)]
    found = []
    for parts in (1, 2):
        words = opts(tmp_path, SOLVER__ACCUMULATE_ITERS=parts)
        cfg = read_config(GN, words)
        torch.manual_seed(0)
        model = pretrain.PretrainTrainer.build_model(cfg)
        with EventStorage():
            sum(model(batch).values()).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def refusal(tmp_path: Path, *flags: str, run: Callable = pretrain.run, **more: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(["--config-file", GN, *flags, *opts(tmp_path / "run", **more)])
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    assert not list(tmp_path.glob("run/*.pth"))
    return message


def folders(root: Path, **classes: int) -> str:
    """A folder of that many files, none of them a picture, for each class."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(b"")
    root.mkdir(exist_ok=True)
    return str(root)


def test_folders_that_cannot_be_used(tmp_path):
    said = refusal(tmp_path, DATASETS__TRAIN="('nowhere',)")
    assert "there is no folder nowhere or " in said
    none, empty = folders(tmp_path / "none"), folders(tmp_path / "empty", cat=0)
    assert "must hold a folder of pictures for each class" in refusal(
        tmp_path, DATASETS__TRAIN=f"('{none}',)"
    )
    assert f"class folders of {empty} hold no pictures" in refusal(
        tmp_path, DATASETS__TRAIN=f"('{empty}',)"
    )
    two = folders(tmp_path / "two", cat=20, dog=1)
    said = refusal(tmp_path, DATASETS__TRAIN=f"('{two}',)")
    assert "two has 2 classes and shapes/crops/train has 6" in said
    few = {"DATASETS__TRAIN": f"('{two}',)", "DATASETS__TEST": "()", "PRETRAIN__STEPS": "()"}
    said = refusal(tmp_path, SOLVER__IMS_PER_BATCH=64, **few)
    assert "holds 21 pictures, fewer than SOLVER.IMS_PER_BATCH 64" in said
    said = refusal(tmp_path, **few)
    assert re.search(r"two/\w+/\d+.png cannot be read as a picture", said)
    assert "takes one folder" in refusal(tmp_path, DATASETS__TRAIN="()")


def test_keys_that_cannot_be_used(tmp_path):
    said = refusal(tmp_path, "--num-gpus", "3")
    assert "SOLVER.IMS_PER_BATCH 16: a batch of 16 cannot be divided among 3 GPUs" in said
    said = refusal(tmp_path, PRETRAIN__STEPS="(50,)", PRETRAIN__EPOCHS=40)
    assert "PRETRAIN.STEPS (50,): the learning rate would never fall at [50]" in said
    assert "give MODEL.WEIGHTS" in refusal(tmp_path, "--eval-only")
    assert 'takes "RGB" or "BGR"' in refusal(tmp_path, INPUT__FORMAT="L")


def test_each_tool_names_the_other(tmp_path):
    assert "run tools/pretrain_net.py" in refusal(tmp_path, run=train.run)
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", "OUTPUT_DIR", tmp_path)
    with pytest.raises(InputError, match=r"GeneralizedRCNN: run tools/train_net.py"):
        pretrain.PretrainTrainer(cfg)
    with pytest.raises(InputError, match=r"run tools/pretrain_net.py"):
        trainer.Trainer(read_config(GN, opts(tmp_path)))
