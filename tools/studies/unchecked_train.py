"""Train with a recipe that the checks refuse, to measure the damage to AP."""

from detectron2.config import CfgNode

from gn_det.engine.train import run
from gn_det.engine.trainer import Trainer


class UncheckedTrainer(Trainer):
    """The trainer without the checks of the recipe."""

    @classmethod
    def check_recipe(cls, cfg: CfgNode, num_gpus: int | None = None) -> None:
        pass


if __name__ == "__main__":
    run(trainer_class=UncheckedTrainer)
