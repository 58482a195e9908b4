"""Top-1 and top-5 accuracy, compared with their definition, in one process and in two."""

from pathlib import Path

import pytest
import torch
from detectron2.evaluation import inference_on_dataset
from torch import distributed, multiprocessing, nn

from gn_det.evaluation.classification import AccuracyEvaluator


def scored(classes: int) -> tuple[list[dict], list[dict]]:
    """Random labels and logits of 200 images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (200,), generator=generator).tolist()
    images = [{"label": label} for label in labels]
    return images, [{"logits": torch.randn(classes, generator=generator)} for _ in labels]


def percent(images: list[dict], outputs: list[dict], k: int) -> float:
    """Top-k accuracy by definition: fewer than k classes score higher than the label."""
    ranks = [
        (output["logits"] > output["logits"][image["label"]]).sum().item()
        for image, output in zip(images, outputs, strict=True)
    ]
    return 100 * sum(rank < k for rank in ranks) / len(ranks)


@pytest.mark.parametrize("classes", [3, 12])
def test_accuracy(classes):
    images, outputs = scored(classes)
    evaluator = AccuracyEvaluator()
    for _ in range(2):  # reset() must clear the first evaluation
        evaluator.reset()
        for part in (slice(20), slice(20, 200)):
            evaluator.process(images[part], outputs[part])
        accuracy = evaluator.evaluate()["accuracy"]
        assert accuracy["top1"] == pytest.approx(percent(images, outputs, 1))
        assert accuracy["top5"] == pytest.approx(percent(images, outputs, 5))
    assert 0 < accuracy["top1"] < accuracy["top5"] <= 100


class Scores(nn.Module):
    """Returns the precomputed output of each image."""

    def forward(self, batch: list[dict]) -> list[dict]:
        return [image["output"] for image in batch]


def evaluate_half(rank: int, folder: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    images, outputs = scored(12)
    both = [{**p, "output": o} for p, o in zip(images, outputs, strict=True)]
    half = both[:131] if rank == 0 else both[131:]
    metrics = inference_on_dataset(Scores(), [half[:10], half[10:]], AccuracyEvaluator())
    torch.save(metrics, folder / f"{rank}.pth")


def test_two_processes(tmp_path):
    """With unequal numbers of images per process, each image has the same weight."""
    multiprocessing.start_processes(evaluate_half, (tmp_path,), nprocs=2, start_method="fork")
    main, other = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    images, outputs = scored(12)
    assert main["accuracy"]["top1"] == pytest.approx(percent(images, outputs, 1))
    assert main["accuracy"]["top5"] == pytest.approx(percent(images, outputs, 5))
    assert other == {}
