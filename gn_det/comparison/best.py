"""The best model of a comparison: a folder that stands alone, with a model card."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config_file import dump_config, read_config
from ..engine.run_record import RECORD
from ..evaluation.markdown import code, literal
from ..files import write_whole
from .plan import Plan

CARD = "README.md"
USE = """\
```python
import gn_det

predictor = gn_det.load_predictor("{folder}")
# image: BGR, uint8, (height, width, 3)
instances = predictor(image)["instances"]
```"""


def save_best(plan: Plan, results: Mapping[str, Any]) -> Path:
    """Copy the best model to `OUTPUT/best`, with what `load_predictor` and `DefaultPredictor` need.

    Args:
        plan: of the comparison.
        results: the content of `results.json`.

    Returns:
        the folder, which has the config, the weights, the record with the categories, and a model
        card in Markdown.
    """
    best = plan.output / "best"
    source = Path(results["best"]["folder"])
    best.mkdir(exist_ok=True)
    for name in ("model_final.pth", RECORD):
        shutil.copy2(source / name, best / name)
    cfg = read_config(str(source / "config.yaml"))
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str((best / "model_final.pth").resolve())
    cfg.OUTPUT_DIR = str(best.resolve())
    (best / "config.yaml").write_text(dump_config(cfg))
    with write_whole(best / CARD) as file:
        file.write("\n".join(_card(results, best)) + "\n")
    return best


def _card(results: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """The lines of the model card."""
    facts, mine = results["facts"], results["best"]
    run = next(run for run in results["runs"] if run["folder"] == mine["folder"])
    same = [
        run
        for run in results["runs"]
        if (run["norm"], run["images_per_batch"]) == (mine["norm"], mine["images_per_batch"])
    ]
    kinds = {"box": "bbox", "mask": "segm"}
    kinds = {name: kind for name, kind in kinds.items() if kind in run}
    yield f"# Detector with {literal(mine['norm'])}"
    yield ""
    yield f"The best of {len(results['runs'])} models of a comparison, by the validation set below."
    yield ""
    yield f"| | {' | '.join(f'{name} AP' for name in kinds)} |"
    yield f"|---|{'---|' * len(kinds)}"
    # This model first
    for other in sorted(same, key=lambda other: other is not run):
        aps = " | ".join(f"{other[kind]['AP']:.1f}" for kind in kinds.values())
        yield f"| {'this model' if other is run else 'seed ' + str(other['seed'])} | {aps} |"
    yield ""
    yield literal(results["answer"])
    yield ""
    for subject in ("training set", "validation set", "recipe", "what each norm got"):
        yield f"- {subject}:"
        yield from (f"  - {literal(line)}" for line in facts.get(subject, []))
    names = ", ".join(literal(category["name"]) for category in run["categories"])
    yield f"- classes: {names}"
    yield f"- trained on: {literal(run['device'])}, seed {run['seed']}, " + ", ".join(
        f"{name} {literal(version)}" for name, version in run["versions"].items()
    )
    yield f"- command: {code(facts['command'])}"
    yield ""
    yield "Load it from Python:"
    yield ""
    yield USE.format(folder=folder.name)
