"""The plan of a comparison: everything that is decided before the first training run."""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..check import check_config
from ..check.anchors import objects_out_of_reach
from ..check.machine import check_weights_file
from ..config import as_opts, default_device, parse_opts
from ..config_file import find_config, override_config, read_config
from ..data.object_sizes import ObjectSizes
from ..data.prepare import Prepared, keys_of
from ..engine.autoconfig import fit_recipes
from ..engine.dataset_args import prepare_data
from ..engine.describe import filled_parts
from ..errors import InputError
from ..modeling.norm import NORM_KEYS
from ..solver import fitted_mask_head_factor
from .cells import Cell, check_pairs, make_cells, norm_keys
from .initial_weights import DISTILL_STEPS, find_weights, missing_facts, own_recipe, weight_keys
from .jobs import Training

# Flag -> the config keys that it sets
FLAG_KEYS = {
    "--norms": tuple(NORM_KEYS.values()),
    "--images-per-batch": ("SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE"),
    "--budget": ("SOLVER.MAX_ITER", "SOLVER.STEPS"),
    "--seeds": ("SEED",),
    "--init": ("MODEL.WEIGHTS",),
    "--output-dir": ("OUTPUT_DIR",),
    "--train": ("DATASETS.TRAIN",),
    "--val": ("DATASETS.TEST",),
}


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first training run starts.

    Args:
        output: the folder of the comparison.
        data: the prepared training and validation set.
        cells: the training run of each cell.
        notes: changes of the recipe and their reasons, as lines of text.
        own: {norm: {key: value}}, the keys of each norm's own recipe.
    """

    output: Path
    data: Prepared
    cells: dict[Cell, Training]
    notes: list[str]
    own: dict[str, dict[str, Any]] = field(default_factory=dict)

    def with_rates(self, rates: Mapping[tuple[str, int], float]) -> "Plan":
        """A plan in which each norm has its own learning rate.

        Args:
            rates: {(norm, images per batch): `SOLVER.BASE_LR`}.

        Raises:
            InputError: if a run's config fails a check.
        """
        cells = {
            cell: with_keys(training, {"SOLVER.BASE_LR": rates[cell.norm, cell.images]})
            for cell, training in self.cells.items()
        }
        check_trainings(cells, self.own, ("SOLVER.BASE_LR", "SOLVER.MASK_HEAD_MULTIPLIER"))
        return replace(self, cells=cells)


def with_keys(training: Training, keys: Mapping[str, object], **changes: Any) -> Training:
    """A copy of a training run with other config keys.

    A factor on the mask head's rate that was fitted to the schedule is fitted anew.

    Args:
        training: the run.
        keys: {key: value}, such as `SOLVER.BASE_LR`.
        changes: other arguments of `Training`.
    """
    changed = replace(training, opts=(*training.opts, *as_opts(keys)), **changes)
    if fitted_mask_head_factor(training.cfg) != training.cfg.SOLVER.MASK_HEAD_MULTIPLIER:
        return changed
    fitted = {"SOLVER.MASK_HEAD_MULTIPLIER": fitted_mask_head_factor(changed.cfg)}
    return replace(changed, opts=(*changed.opts, *as_opts(fitted)))


def make_plan(args: argparse.Namespace) -> Plan:
    """Prepare the data, adapt the recipe to it, choose weights, and check every training run.

    Args:
        args: as `compare.parse` returns them.

    Raises:
        InputError: for errors that would corrupt training, or runs that differ in more than the
            norm and its own recipe.
    """
    cells = make_cells(args.norms, args.images_per_batch, args.seeds)
    check_overrides(args.opts)
    opts = ["MODEL.DEVICE", default_device(), *args.opts]
    config = find_config(args.base)
    base = read_config(config, opts, args.allow_remote_base)
    runs = args.output_dir / "runs"
    data = prepare_data(args, base, args.output_dir / "data", runs.exists())
    sizes = ObjectSizes.of(Path(data.train))
    shared = keys_of(data, base)
    fitted = override_config(base, as_opts(shared), config)
    recipes = fit_recipes(fitted, sizes, args.images_per_batch, args.budget, opts)
    # --check needs converted files, but not their quality
    steps = 0 if args.check else DISTILL_STEPS
    folder = args.output_dir / "backbones"
    weights = find_weights(args.norms, args.init, base, list_images(data), folder, steps, opts)
    own = {norm: own_recipe(weights[norm], base, opts) for norm in args.norms}
    trainings = {}
    for cell in cells:
        keys = {
            **shared,
            **{proposal.key: proposal.value for proposal in recipes[cell.images]},
            **norm_keys(cell.norm, base),
            **weight_keys(weights[cell.norm]),
            **own[cell.norm],
            "SEED": cell.seed,
            "OUTPUT_DIR": str((runs / cell.folder).resolve()),
        }
        # The user's pairs come last, so that they override the rest
        words, remote = (*as_opts(keys), *opts), args.allow_remote_base
        output = Path(keys["OUTPUT_DIR"])
        trainings[cell] = Training(str(cell), output, config, words, allow_remote_base=remote)
    check_trainings(trainings, own)
    check_filled({cell.norm: training.cfg for cell, training in trainings.items()})
    proposals = (str(proposal) for recipe in recipes.values() for proposal in recipe)
    notes = list(dict.fromkeys(proposals))
    notes += describe_fallbacks(weights.values(), base)
    notes += describe_own(own)
    notes += describe_extracted(args.init, weights)
    notes += objects_out_of_reach(trainings[cells[0]].cfg, sizes)
    return Plan(args.output_dir, data, trainings, notes, own)


def check_overrides(opts: Sequence[str]) -> None:
    """Refuse `KEY VALUE` pairs whose key is set by a flag.

    Raises:
        InputError: naming the flag.
    """
    if flags := [word for word in opts[::2] if word.startswith("--")]:
        raise InputError(f"{flags[0]}: put all flags before the KEY VALUE pairs")
    given = parse_opts(opts)
    for flag, keys in FLAG_KEYS.items():
        if wrong := [key for key in given if key in keys]:
            raise InputError(f"{wrong[0]} cannot be a KEY VALUE pair: set it with {flag}")


def list_images(data: Prepared) -> list[Path]:
    """Paths of all training images."""
    entries = json.loads(Path(data.train).read_text())["images"]
    return [Path(entry["file_name"]) for entry in entries]


def check_trainings(
    trainings: Mapping[Cell, Training],
    own: Mapping[str, Mapping[str, Any]],
    tuned: Iterable[str] = (),
) -> None:
    """Check the weights and config of every cell, and that cells differ only in the norm.

    Args:
        trainings: of all cells.
        own: as in `Plan`.
        tuned: keys that were chosen for each norm with equal effort.

    Raises:
        InputError: naming the cell and the key.
    """
    for cell, training in trainings.items():
        try:
            check_weights_file(training.cfg)
            check_config(training.cfg, num_gpus=1)
        except InputError as error:
            reason = f"{cell}: {error.reason}"
            raise InputError(reason, key=error.key, fix=error.fix) from None
    check_pairs({cell: training.cfg for cell, training in trainings.items()}, own, tuned)


def check_filled(configs: Mapping[str, CfgNode]) -> None:
    """Refuse norms whose initial weights fill different parts of the model.

    Args:
        configs: the config of one run of each norm.

    Raises:
        InputError: naming the norms and the parts.
    """
    filled = {norm: filled_parts(cfg) for norm, cfg in configs.items()}
    known = {norm: parts for norm, parts in filled.items() if parts is not None}
    for norm, parts in known.items():
        first = next(iter(known))
        if more := parts ^ known[first]:
            raise InputError(
                f"--init: the weights of {first} and {norm} fill different parts of the model, "
                f"as {', '.join(sorted(more))}: give files with the same parts"
            )


def describe_fallbacks(weights: Iterable[str], base: CfgNode) -> Iterator[str]:
    """Lines of text on the facts that a weights file lacks and the config supplies."""
    for file in dict.fromkeys(weights):
        for key, value in missing_facts(file, base).items():
            yield f"{key} {value}: from the config, as {Path(file).name} does not record it"


def describe_extracted(given: Iterable[str], weights: Mapping[str, str]) -> Iterator[str]:
    """A line of text if only the backbone of a given detector is used."""
    for file in given:
        stem = f"{Path(file).stem}_backbone_"
        if any(Path(used).name.startswith(stem) for used in weights.values()):
            yield f"--init {file}: only its backbone is used, so that all norms start alike"


def describe_own(own: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines of text on each norm's own recipe."""
    for norm, keys in own.items():
        if keys:
            pairs = ", ".join(f"{key} {value}" for key, value in keys.items())
            yield f"{norm} only: {pairs}: the recipe of backbones that were converted from BN to GN"
