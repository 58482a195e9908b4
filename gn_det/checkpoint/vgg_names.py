"""Tensor names of a VGG in torchvision and timm, whose layers only have numbers."""

import re
from collections.abc import Iterable

from torch import Tensor

LAYER = re.compile(r"(?:[\w-]+\.)*features\.(\d+)\.(\w+)")


def number_names(names: Iterable[str]) -> dict[str, str]:
    """Map the names of numbered layers, as "features.0.weight", to "conv1_1.weight" and the like.

    Args:
        names: all names of the file.
    """
    found = {name: (int(m[1]), m[2]) for name in names if (m := LAYER.fullmatch(name))}
    norms = {number for number, tensor in found.values() if tensor == "running_mean"}
    layers: dict[int, str] = {}
    stage, place, last = 1, 0, 0
    for number in sorted({number for number, _ in found.values()} - norms):
        # Convolution, norm and ReLU have a number each; a larger distance is a max pooling
        if number - last > (3 if norms else 2):
            stage, place = stage + 1, 0
        place, last = place + 1, number
        layers[number] = f"conv{stage}_{place}"
        layers[number + 1] = f"conv{stage}_{place}.norm"
    return {name: f"{layers[number]}.{tensor}" for name, (number, tensor) in found.items()}


def fold_biases(tensors: dict[str, Tensor]) -> list[str]:
    """Subtract the bias of each convolution before BatchNorm from its running mean, in place.

    torchvision's convolutions have such a bias, which the norm makes useless.

    Args:
        tensors: of the backbone, under Detectron2's names; the biases are removed.

    Returns:
        the names of the biases.
    """
    folded = []
    for name in [name for name in tensors if re.fullmatch(r"conv\d_\d\.bias", name)]:
        mean = name.replace(".bias", ".norm.running_mean")
        if mean in tensors:
            tensors[mean] = tensors[mean] - tensors.pop(name)
            folded.append(name)
    return folded
