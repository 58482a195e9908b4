"""Hooks of a training run that no other test covers."""

import gc

from conftest import SCRATCH, shapes_config
from detectron2.engine import HookBase

from gn_det.engine.trainer import Trainer


class Count(HookBase):
    """Counts the objects that garbage collections skip."""

    def after_step(self) -> None:
        self.skipped = gc.get_freeze_count()


def test_collections_skip_what_exists_before_training(tmp_path):
    words = (*SCRATCH, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "OUTPUT_DIR", tmp_path)
    trainer, count = Trainer(shapes_config("mask_rcnn_R_18_FPN_gn", *words)), Count()
    trainer.register_hooks([count])
    existing = sum(1 for _ in gc.get_objects())
    trainer.train()
    assert count.skipped > existing / 2
    assert gc.get_freeze_count() == 0
