"""The LazyConfig example equals the YAML config of the same name."""

from argparse import Namespace

import pytest
import torch
from conftest import ROOT
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer, default_setup, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

from gn_det.config_file import read_config
from gn_det.engine.train import Trainer

NAME = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_gn"


def lazy(*overrides: str):
    cfg = LazyConfig.load(str(ROOT / "configs" / f"{NAME}.py"))
    return LazyConfig.apply_overrides(cfg, list(overrides))


def yaml(*opts: str):
    return read_config(f"{NAME}.yaml", ["MODEL.DEVICE", "cpu", *opts])


def test_equal_models():
    """Layers, names of tensors, and values after initialization with the same seed."""
    torch.manual_seed(0)
    one = instantiate(lazy().model)
    torch.manual_seed(0)
    two = build_model(yaml())
    assert str(one) == str(two)
    assert [type(m) for m in one.modules()] == [type(m) for m in two.modules()]
    ours, theirs = one.state_dict(), two.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    trained = [p.requires_grad for p in one.parameters()]
    assert trained == [p.requires_grad for p in two.parameters()]
    for part in ("proposal_generator", "roi_heads"):
        simple = {
            key: value
            for key, value in vars(getattr(one, part)).items()
            if isinstance(value, (int, float, str, list, dict)) and not key.startswith("_")
        }
        assert simple == {key: vars(getattr(two, part))[key] for key in simple}


def test_equal_training():
    """Optimizer groups, schedule, batch, image sizes, weights and datasets."""
    cfg, node = lazy(), yaml()
    model = build_model(node)
    cfg.optimizer.params.model = model
    ours, theirs = instantiate(cfg.optimizer), Trainer.build_optimizer(node, model)

    def decays(optimizer) -> dict[int, tuple]:
        return {
            id(p): (g["lr"], g["weight_decay"], g["momentum"])
            for g in optimizer.param_groups
            for p in g["params"]
        }

    assert decays(ours) == decays(theirs)
    multiplier = instantiate(cfg.lr_multiplier)
    scheduler = build_lr_scheduler(node, torch.optim.SGD([torch.zeros(1)], lr=1.0))
    for step in (0, 1, 500, 999, 1000, 119_999, 120_000, 160_000, 179_999):
        scheduler.last_epoch = step
        rate = multiplier(step / cfg.train.max_iter)
        assert rate == pytest.approx(scheduler.get_lr()[0], rel=1e-6), step
    assert cfg.train.max_iter == node.SOLVER.MAX_ITER
    assert cfg.train.init_checkpoint == node.MODEL.WEIGHTS
    loader = cfg.dataloader.train
    assert loader.total_batch_size == node.SOLVER.IMS_PER_BATCH
    assert (loader.dataset.names,) == node.DATASETS.TRAIN
    assert (cfg.dataloader.test.dataset.names,) == node.DATASETS.TEST
    resize = loader.mapper.augmentations[0]
    assert tuple(resize.short_edge_length) == node.INPUT.MIN_SIZE_TRAIN
    assert resize.max_size == node.INPUT.MAX_SIZE_TRAIN


def test_trains_as_lazyconfig_train_net_does(tmp_path):
    """The steps of Detectron2's tools/lazyconfig_train_net.py, which is not in its package."""
    cfg = lazy(
        *("dataloader.train.dataset.names=shapes_train", "dataloader.train.total_batch_size=2"),
        *("dataloader.train.num_workers=0", "train.device=cpu", "train.max_iter=2"),
        *(
            "train.init_checkpoint=''",
            f"train.output_dir={tmp_path}",
            "model.roi_heads.num_classes=6",
        ),
        "dataloader.train.mapper.augmentations.0.short_edge_length=64",
        "+dataloader.train.mapper.instance_mask_format=bitmask",
    )
    default_setup(cfg, Namespace(config_file="", eval_only=False))
    model = instantiate(cfg.model)
    model.to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = create_ddp_model(model, **cfg.train.ddp)
    trainer = SimpleTrainer(model, loader, optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period),
        ]
    )
    before = model.roi_heads.box_head.conv1.norm.weight.detach().clone()
    trainer.train(0, cfg.train.max_iter)
    assert not torch.equal(model.roi_heads.box_head.conv1.norm.weight, before)
    assert (tmp_path / "model_final.pth").exists()
