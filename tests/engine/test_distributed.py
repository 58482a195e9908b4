"""Training in several processes on one machine without a GPU."""

import json
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SCRATCH, TINY, command
from detectron2.engine import default_argument_parser
from detectron2.utils.events import EventStorage
from torch import Tensor, distributed, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from gn_det.config_file import read_config
from gn_det.data.loader import UnreadableSample
from gn_det.engine.distributed import count_processes, launch
from gn_det.engine.train_step import TrainingStep
from gn_det.engine.trainer import Trainer
from gn_det.errors import InputError

CONFIG = ["--config-file", "Shapes/mask_rcnn_R_18_FPN_gn.yaml"]
SMALL = [
    *TINY,
    *SCRATCH,
    *("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
    *("MODEL.GROUP_NORM.NUM_GROUPS", "4", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "SOLVER.STEPS", "()"),
    *("SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2", "SEED", "1"),
]


# Kills its last process in the middle of training, before torchrun has restarted it
KILLED = """
import os, signal
from gn_det.engine import train, trainer

class KilledTrainer(trainer.Trainer):
    def run_step(self):
        first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first_attempt and os.environ["RANK"] == "1" and self.iter == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        super().run_step()

train.run(trainer_class=KilledTrainer)
"""


def test_torchrun_restarts_from_the_last_checkpoint(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    script, output = tmp_path / "train_net.py", tmp_path / "output"
    script.write_text(KILLED)
    words = [*CONFIG, *SMALL, "OUTPUT_DIR", output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = command(*torchrun, "--max-restarts", 1, script, *words, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    starts = re.findall(r"Starting training from iteration (\d+)", (output / "log.txt").read_text())
    assert starts in (["0", "2"], ["0", "3"]), "the other process may have saved a checkpoint"
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == sorted({line["iteration"] for line in lines})
    assert "bbox/AP" in lines[-1]
    final = torch.load(output / "model_final.pth", weights_only=True)
    assert final["iteration"] == 5 and not list(output.glob("*.partial"))


def test_flags_that_conflict_with_torchrun(monkeypatch):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    parser = default_argument_parser()
    assert count_processes(parser.parse_args([])) == 2
    with pytest.raises(InputError, match=r"--num-gpus.*torchrun"):
        count_processes(parser.parse_args(["--num-gpus", "2"]))


def test_more_gpus_than_available():
    args = default_argument_parser().parse_args(["--num-gpus", "99"])
    with pytest.raises(InputError, match=r"--num-gpus 99,.* GPUs"):
        launch(print, args)


def images(seed: int) -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, seeds: list[int]) -> dict[str, Tensor]:
    """Gradients of a loss that depends on all parts of the detector, averaged over images."""
    features = model(torch.cat([images(seed) for seed in seeds]))
    torch.stack([feature.square().mean() for feature in features]).sum().backward()
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}


class Parts(nn.Module):
    """Backbone, FPN and heads, with the same RoIs in every image."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        cfg = read_config(CONFIG[1], [*TINY, *SCRATCH, "MODEL.RESNETS.NORM", norm])
        torch.manual_seed(0)
        detector = Trainer.build_model(cfg)
        self.backbone = detector.backbone
        self.box_head, self.mask_head = detector.roi_heads.box_head, detector.roi_heads.mask_head

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.backbone(x)
        rois = features["p2"][:, :, :14, :14]
        masks = self.mask_head.layers(rois)
        return [*features.values(), self.box_head(rois[:, :, :7, :7]), masks]


def compute_gradients(rank: int, norm: str, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    result = gradients(DistributedDataParallel(Parts(norm), broadcast_buffers=False), [rank])
    if rank == 0:
        torch.save(result, Path(folder, "gradients.pth"))


@pytest.mark.parametrize("norm", ["GN", "FrozenBN"])
def test_gradients_equal_those_of_one_process(norm, tmp_path):
    spawn(compute_gradients, (norm, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "gradients.pth", weights_only=True)
    expected = gradients(Parts(norm), [0, 1])
    assert found.keys() == expected.keys()
    assert {n for n in found if found[n] is None} == {n for n in found if expected[n] is None}
    distances = {n: (found[n] - g).norm() for n, g in expected.items() if g is not None}
    total = torch.stack([expected[name].norm() for name in distances]).norm()
    assert torch.stack(list(distances.values())).norm() <= 1e-6 * total
    for name, distance in distances.items():
        # Sums over all pixels of an image, in another order, differ slightly more
        assert distance <= 2e-5 * expected[name].norm(), name


class Small(nn.Module):
    """A small model that takes dataset dicts, as a detector does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"loss": self.layer(torch.cat([x["image"] for x in batch])).square().mean()}


def skip_batches(rank: int, folder: str) -> None:
    """Train on four batches; each of two processes has a different bad batch."""
    timeout = timedelta(seconds=30)
    address = f"file://{folder}/store"
    distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=timeout
    )
    batches: list[list[Any]] = [
        [{"image": torch.full((2, 3), i + rank + 1.0), "file_name": f"{i}.png"}] for i in range(4)
    ]
    if rank:
        batches[1] = [UnreadableSample("gone.png", "No")]
    else:
        batches[2][0]["image"][:] = float("nan")
    model = DistributedDataParallel(Small(), broadcast_buffers=False)
    step = TrainingStep(model, batches, torch.optim.SGD(model.parameters(), 0.1), skips=2)
    with EventStorage():
        for step.iter in range(4):
            step.run_step()
    torch.save([step.skipped, *model.parameters()], Path(folder, f"{rank}.pth"))


def test_all_processes_skip_a_bad_batch_of_one(tmp_path):
    spawn(skip_batches, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pth", weights_only=False) for rank in range(2)]
    expected = Small()
    optimizer = torch.optim.SGD(expected.parameters(), 0.1)
    for i in (0, 3):
        optimizer.zero_grad()
        images = [{"image": torch.full((2, 3), i + rank + 1.0)} for rank in range(2)]
        expected(images)["loss"].backward()
        optimizer.step()
    for skipped, *parameters in found:
        assert skipped == 2
        torch.testing.assert_close(parameters, list(expected.parameters()))
