"""The layers of the package: each module imports only from layers below its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, command

# From top to bottom. A package is one layer, and so is a module at the top of gn_det
LAYERS = (
    *("tools", "__main__", "cli", "__init__"),
    *("comparison", "engine", "evaluation", "check", "solver"),
    *("checkpoint", "config_file", "data", "modeling"),
    *("config", "model_zoo", "files", "plain_yaml", "progress", "processes", "errors"),
    "layers",
)
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("gn_det", "tools")
    for path in (ROOT / folder).rglob("*.py")
)
# Packages that gn_det needs, but gn_det.layers does not
HEAVY = ("detectron2", "fvcore", "shapely", "pycocotools", "matplotlib", "PIL", "safetensors")


def layer_of(path: Path) -> str:
    """The layer of a source file, by its path in the checkout."""
    return "tools" if path.parts[0] == "tools" else path.with_suffix("").parts[1]


def imported_names(source: str, path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, in functions too."""
    package = path.parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            module = [*parent, *([node.module] if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


def imported_layers(source: str, path: Path) -> set[str]:
    """The layers of gn_det that a file imports from."""
    layers = set()
    for name in imported_names(source, path):
        package, *rest = name.split(".")
        if package in ("studies", "tools"):
            layers.add("tools")
        elif package == "gn_det":
            # `from . import __version__` and `import gn_det` import the package itself
            layers.add(rest[0] if rest and rest[0] in LAYERS else "__init__")
    return layers


def violations(source: str, path: Path) -> set[str]:
    """The layers above its own that a file imports from."""
    own = layer_of(path)
    return {n for n in imported_layers(source, path) if LAYERS.index(n) < LAYERS.index(own)}


def test_every_module_belongs_to_a_layer():
    assert {layer_of(path) for path in SOURCES} == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_only_from_layers_below(layer):
    above = {
        str(path): names
        for path in SOURCES
        if layer_of(path) == layer and (names := violations((ROOT / path).read_text(), path))
    }
    assert not above


@pytest.mark.parametrize(
    ("path", "source", "layer"),
    [
        ("gn_det/layers/eager.py", "from ..errors import InputError", "errors"),
        ("gn_det/layers/kernels/tile.py", "from ...modeling.norm import get_norm", "modeling"),
        ("gn_det/data/coco.py", "def f():\n    from gn_det.engine import train", "engine"),
        ("gn_det/check/layers.py", "import gn_det.comparison.plan", "comparison"),
        ("gn_det/modeling/norm.py", "from .. import solver", "solver"),
        ("gn_det/engine/train.py", "from .. import __version__", "__init__"),
        ("gn_det/comparison/demo.py", "from studies.timing import Times", "tools"),
    ],
)
def test_violations_are_detected(path, source, layer):
    assert violations(source, Path(path)) == {layer}


def test_layers_need_only_torch():
    """`gn_det.layers` works where neither Detectron2 nor gn_det's other requirements exist."""
    # None in sys.modules makes an import fail, and find_spec return None
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY}));"
        "import torch; from gn_det.layers import GroupNormAct, frozen_bn_act, standardize_weight;"
        "layer = GroupNormAct(8, num_groups=2); layer.relu = True;"
        "print(tuple(layer(torch.randn(2, 8, 4, 4)).shape));"
        "import gn_det.modeling"
    )
    done = command("-c", code)
    assert done.stdout.strip() == "(2, 8, 4, 4)", done.stderr
    assert done.returncode != 0 and "detectron2" in done.stderr.splitlines()[-1]
