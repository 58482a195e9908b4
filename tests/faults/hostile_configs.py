"""Malicious configs, which try to run code, hang the reader or exhaust its memory."""

import os
import random
from pathlib import Path


def hostile_config(rng: random.Random, folder: Path, shipped: str) -> Path:
    """Write a random malicious config to a folder.

    If its code is run, `folder / "canary"` is created.

    Args:
        rng: the random generator.
        folder: the folder, in which other files are created too.
        shipped: the path of a valid config, for use as a base.

    Returns:
        the path of the config.
    """
    path = folder / "hostile.yaml"
    evil = f"X: !!python/object/apply:os.system ['touch {folder}/canary']\n"
    base = rng.choice(bases(rng, folder, shipped, evil))
    path.write_text(rng.choice([f"_BASE_: {base}\n", bomb(rng), string(rng), evil]))
    return path


def bases(rng: random.Random, folder: Path, shipped: str, evil: str) -> list[str]:
    """Values of `_BASE_`; most of them refer to a config with code."""
    (folder / "evil.yaml").write_text(evil)
    for scheme in ("x:", "detectron2:", "https:", "file:"):
        (folder / scheme).mkdir(exist_ok=True)
        (folder / scheme / "evil.yaml").write_text(evil)
    (folder / "twice.yaml").write_text("_BASE_: [twice2.yaml, twice2.yaml]\n")
    (folder / "twice2.yaml").write_text("_BASE_: [twice.yaml, twice.yaml]\n")
    for number in range(25):
        once = f"{number + 1}.yaml"
        (folder / f"{number}.yaml").write_text(f"_BASE_: [{once}, {once}]\n")
    (folder / "25.yaml").write_text("MODEL: {}\n")
    pipe = folder / "pipe.yaml"
    if hasattr(os, "mkfifo") and not pipe.exists():
        os.mkfifo(pipe)
    up = os.path.relpath(folder, "/")
    return [
        "evil.yaml",
        f"x://../../{folder.name}/evil.yaml",
        "x://evil.yaml",
        "detectron2://evil.yaml",
        "https://evil.yaml",
        "https://localhost:1/evil.yaml",
        "file://evil.yaml",
        f"file://{folder}/evil.yaml",
        f"~/../{up}/evil.yaml",
        f"//{folder}/evil.yaml",
        f"[{shipped}, evil.yaml]",
        f"[[{shipped}], evil.yaml]",
        "{a: evil.yaml}",
        "twice.yaml",
        "0.yaml",
        "pipe.yaml",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        ".",
        rng.choice(["3", "null", "''", '"a\\0b"', "hostile.yaml", "a" * 5000, "../" * 200]),
    ]


def bomb(rng: random.Random) -> str:
    """YAML that expands to more than the memory, or is nested too deeply."""
    depth = rng.choice([30, 300])
    kind = rng.choice(["lists", "dicts", "merge", "nested", "itself", "long", "keys"])
    if kind == "lists":
        return "a0: &a0 [x]\n" + "".join(
            f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(depth)
        )
    if kind == "dicts":
        return "a0: &a0 {x: y}\n" + "".join(
            f"a{i + 1}: &a{i + 1} {{b: *a{i}, c: *a{i}}}\n" for i in range(depth)
        )
    if kind == "merge":
        return "a0: &a0 {x: y}\n" + "".join(
            f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(depth)
        )
    return {
        "nested": "MODEL: " + "[" * 5000,
        "itself": rng.choice(["MODEL: &a {b: *a}\n", "&a [*a]\n", "MODEL: &a [*a]\n"]),
        "long": f"OUTPUT_DIR: {'9' * 5000}\n" + "# " + "x" * rng.choice([10, 2**21]),
        "keys": "? [a, b]\n: c\n? {a: b}\n: c\n",
    }[kind]


def string(rng: random.Random) -> str:
    """A config with a string that Detectron2 parses as a Python literal."""
    value = rng.choice(
        ["-" * 9000 + "1", "(" * 9000, "[" * 99 + "]" * 99, "1+" * 4000 + "1", "9" * 9000]
    )
    key = rng.choice(["OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DEVICE"]).split(".")
    return "".join(f"{'  ' * i}{k}:\n" for i, k in enumerate(key))[:-1] + f' "{value}"\n'
