"""Linear probe: how well image labels are predicted from the features of a backbone."""

import json
from pathlib import Path

import torch
from torch import Tensor

from gn_det.checkpoint.bn_to_gn import SIDE, normalise
from gn_det.checkpoint.conversion import Conversion
from gn_det.checkpoint.convert import build_network
from gn_det.data.unlabelled_images import load_images

# Weight of the L2 penalty, for standardized features
RIDGE = 100.0


def image_labels(folder: Path) -> tuple[list[Path], Tensor]:
    """Images of a COCO-format dataset, and which classes they contain.

    Args:
        folder: with images/ and instances_{train,val}.json.

    Returns:
        the paths of N images, and labels of shape (N, C), True where an image contains a class.
    """
    contents: dict[str, set[int]] = {}
    for split in ("train", "val"):
        truth = json.loads((folder / f"instances_{split}.json").read_text())
        files = {image["id"]: image["file_name"] for image in truth["images"]}
        contents |= {name: set() for name in files.values()}
        for annotation in truth["annotations"]:
            contents[files[annotation["image_id"]]].add(annotation["category_id"])
    classes = sorted(set().union(*contents.values()))
    labels = torch.tensor([[c in present for c in classes] for present in contents.values()])
    return [folder / "images" / name for name in contents], labels


def pooled_features(conversion: Conversion, paths: list[Path]) -> Tensor:
    """res4 and res5 of a backbone, averaged over each image, of shape (N, channels)."""
    resnet = build_network(conversion.cfg, conversion.tensors)
    images = load_images(paths, SIDE, conversion.cfg.INPUT.FORMAT)
    parts = [resnet(part) for part in normalise(images, conversion.cfg).split(16)]
    pooled = [[part[stage].mean((2, 3)) for stage in ("res4", "res5")] for part in parts]
    return torch.cat([torch.cat(stages, dim=1) for stages in pooled])


def mean_auc(features: Tensor, labels: Tensor, seed: int, num_classes: int = 12) -> float:
    """Mean area under the ROC curve of "the image contains the class", by ridge regression.

    The regression is fitted on a random half of the images, and tested on the other half.

    Args:
        features: (N, F).
        labels: (N, C), 1 where the image contains the class.
        seed: of the split.
        num_classes: number of classes that are probed, the most frequent ones.
    """
    features, labels = features.double(), labels.double()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    fit, test = order.chunk(2)
    std, mean = torch.std_mean(features[fit], dim=0)
    x = (features - mean) / std.clamp(min=1e-6)
    frequent = labels.sum(0).argsort(descending=True, stable=True)[:num_classes]
    y = labels[:, frequent]
    # The dual form is cheaper, as there are more features than images
    kernel = x[fit] @ x[fit].T + RIDGE * torch.eye(len(fit), dtype=x.dtype)
    scores = x[test] @ x[fit].T @ torch.linalg.solve(kernel, y[fit] - y[fit].mean(0))
    aucs = [auc(scores[:, c], y[test, c]) for c in range(len(frequent))]
    return sum(aucs) / len(aucs)


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve; ties count half.

    Args:
        scores: (N,).
        positive: (N,), above 0 for positive examples.
    """
    pairs = scores[positive > 0][:, None] - scores[positive == 0][None]
    return ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean().item()
