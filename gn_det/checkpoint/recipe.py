"""The fine-tuning recipe of a GN backbone that was converted from BN.

It was chosen by the study in tools/results/README.md.
"""

from pathlib import Path
from typing import Any

from ..errors import InputError
from .facts import Facts
from .read import WeightsFile, read_weights

# The backbone's grouping
GROUPING: Facts = {"MODEL.GROUP_NORM.DIM_PER_GP": 16}
# The grouping of FPN and heads, which are trained from scratch
HEADS_GROUPING: Facts = {"MODEL.GROUP_NORM.HEADS_DIM_PER_GP": 2}
# All keys besides the backbone's grouping
FINE_TUNING: Facts = {
    **HEADS_GROUPING,
    "SOLVER.BACKBONE_MULTIPLIER": 0.1,
}


def recorded_recipe(weights: str) -> dict[str, Any]:
    """The recipe that gn_det recorded in a local file of weights.

    Args:
        weights: path or address, as in `MODEL.WEIGHTS`.

    Returns:
        {config key: value}; empty for other files and addresses.

    Raises:
        InputError: if the file cannot be read, or a recorded value is invalid.
    """
    path = Path(weights)
    if not weights or not path.is_file():
        return {}
    try:
        return recipe_in(read_weights(path, device="meta"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def recipe_in(file: WeightsFile) -> dict[str, Any]:
    """`recorded_recipe` of a file that has been read.

    Raises:
        InputError: if a recorded value is invalid.
    """
    recipe = {key: file.facts[key] for key in FINE_TUNING if key in file.facts}
    for key, value in recipe.items():
        if type(value) is not type(FINE_TUNING[key]) or not 0 < value < 2**16:
            raise InputError(f"its record of {key} is invalid: convert the backbone again")
    return recipe
