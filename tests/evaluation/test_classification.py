"""Top-1 and top-5 accuracy against their definition, over one process and over two."""

from pathlib import Path

import pytest
import torch
from detectron2.evaluation import inference_on_dataset
from torch import distributed, multiprocessing, nn

from gn_det.evaluation.classification import AccuracyEvaluator


def scored(classes: int) -> tuple[list[dict], list[dict]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (200,), generator=generator).tolist()
    pictures = [{"label": label} for label in labels]
    return pictures, [{"logits": torch.randn(classes, generator=generator)} for _ in labels]


def percent(pictures: list[dict], outputs: list[dict], k: int) -> float:
    """By the definition: fewer than k classes have a higher score than the label's."""
    ranks = [
        (output["logits"] > output["logits"][picture["label"]]).sum().item()
        for picture, output in zip(pictures, outputs, strict=True)
    ]
    return 100 * sum(rank < k for rank in ranks) / len(ranks)


@pytest.mark.parametrize("classes", [3, 12])
def test_accuracy(classes):
    pictures, outputs = scored(classes)
    evaluator = AccuracyEvaluator()
    for _ in range(2):  # a second evaluation begins anew
        evaluator.reset()
        for part in (slice(20), slice(20, 200)):
            evaluator.process(pictures[part], outputs[part])
        found = evaluator.evaluate()["accuracy"]
        assert found["top1"] == pytest.approx(percent(pictures, outputs, 1))
        assert found["top5"] == pytest.approx(percent(pictures, outputs, 5))
    assert 0 < found["top1"] < found["top5"] <= 100


class Scores(nn.Module):
    """Outputs that were prepared for pictures of these ids."""

    def forward(self, batch: list[dict]) -> list[dict]:
        return [picture["output"] for picture in batch]


def evaluate_half(rank: int, folder: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    pictures, outputs = scored(12)
    both = [{**p, "output": o} for p, o in zip(pictures, outputs, strict=True)]
    half = both[:131] if rank == 0 else both[131:]
    found = inference_on_dataset(Scores(), [half[:10], half[10:]], AccuracyEvaluator())
    torch.save(found, folder / f"{rank}.pth")


def test_two_processes(tmp_path):
    """Of unequal shares: each picture counts the same."""
    multiprocessing.start_processes(evaluate_half, (tmp_path,), nprocs=2, start_method="fork")
    found, others = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    pictures, outputs = scored(12)
    assert found["accuracy"]["top1"] == pytest.approx(percent(pictures, outputs, 1))
    assert found["accuracy"]["top5"] == pytest.approx(percent(pictures, outputs, 5))
    assert others == {}
