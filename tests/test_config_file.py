"""Config files and their `_BASE_` are read as Detectron2 does, but without running code."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import detectron2
import pytest
import yaml
from conftest import ROOT, TINY, command
from detectron2.config import CfgNode, get_cfg
from fvcore.common.config import CfgNode as FvcoreNode

import gn_det
from gn_det.comparison import jobs
from gn_det.comparison.compare import parse
from gn_det.comparison.plan import make_plan
from gn_det.config_file import find_config, read_config, read_config_file
from gn_det.engine import train
from gn_det.engine.predictor import load_run
from gn_det.errors import InputError

LEAVES = sorted((ROOT / "configs").glob("*/*.yaml"))
OWN = sorted(Path(detectron2.__file__).parent.glob("model_zoo/configs/**/*.yaml"))
SMALL = "Shapes/mask_rcnn_R_18_FPN_gn.yaml"


def read(path: object, *opts: str, **flags: bool) -> CfgNode:
    return read_config(str(path), list(opts), **flags)


def by_fvcore(path: object) -> dict:
    """The values that Detectron2's own reader gets from a file; it runs code."""
    return FvcoreNode.load_yaml_with_base(str(path), allow_unsafe=True)


def refused(path: object, *names: str, **flags: bool) -> str:
    """Read a config that must be refused, with a message that contains `names`."""
    with pytest.raises(InputError) as error:
        read(path, **flags)
    message = str(error.value)
    assert all(name in message for name in names), message
    assert "\n" not in message and len(message) < 1500
    return message


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def time_limit() -> Iterator[None]:
    """Fail a test that hangs for a minute."""

    def fail(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write(path: Path, **values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


# The same values as Detectron2 reads


@pytest.mark.parametrize("path", [*LEAVES, *OWN], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_values_equal_those_of_detectron2(path):
    assert read_config_file(str(path)) == by_fvcore(path)


def test_merged_config_equals_that_of_detectron2():
    path = find_config(SMALL)
    cfg = get_cfg()
    gn_det.add_gn_config(cfg)
    cfg.merge_from_file(path)
    assert read(path) == cfg


def test_bases_are_merged_as_detectron2_does(folder, monkeypatch):
    """Relative, home and absolute paths, merged in order."""
    monkeypatch.setenv("HOME", str(folder / "home"))
    write(folder / "one.yaml", A={"X": 1, "Y": 1, "Z": {"V": 1}}, B=[1])
    write(folder / "home/two.yaml", A={"Y": 2, "Z": {"W": 2}}, C="2")
    write(folder / "sub/three.yaml", _BASE_="../one.yaml", A={"X": 3}, D=None)
    write(folder / "odd:/four.yaml", E=4)
    bases = ["../one.yaml", "~/two.yaml", str(folder / "sub/three.yaml"), "../odd://four.yaml"]
    mine = write(folder / "sub/mine.yaml", _BASE_=bases, A={"Z": {"V": 5}}, B=[5, 5])
    values = read_config_file(str(mine))
    assert values == by_fvcore(mine)
    assert values["A"] == {"X": 3, "Y": 1, "Z": {"V": 5, "W": 2}} and values["E"] == 4
    assert list(values) == list(by_fvcore(mine))
    assert read_config_file("sub/mine.yaml") == values
    none = write(folder / "none.yaml", _BASE_=[], A=1)
    assert read_config_file(str(none)) == by_fvcore(none) == {"A": 1}


@pytest.mark.parametrize(
    "text",
    [
        "A: &a {X: 1, Y: [1, 2]}\nB: *a\nC: {<<: *a, X: 2}\nD: [*a, *a]\n",
        "A: 1e3\nB: 1.0e+3\nC: 0x10\nD: 1:30\nE: 2001-01-01\nF: ~\nG: yes\nH: 'a\\b'\n",
        'A: "\\0\\x85\\u2028\\U0001F600 x"\nB: |\n  two\n  lines\nC: ""\nD: !!binary aGk=\n',
    ],
)
def test_yaml_syntax_is_read_as_detectron2_does(folder, text):
    """Including aliases: a config that changes an aliased section changes it everywhere."""
    (folder / "base.yaml").write_text(text)
    mine = write(folder / "mine.yaml", _BASE_="base.yaml", A={"X": 5} if "&a" in text else 5)
    for path in ("base.yaml", mine):
        assert read_config_file(str(path)) == by_fvcore(path)


def test_old_configs_are_upgraded(folder, caplog):
    """Detectron2 upgrades them, and its warnings name the user's file."""
    write(folder / "old.yaml", MODEL={"WEIGHT": "x.pth"}, TEST={"AUG_ON": True})
    cfg = read("old.yaml")
    assert cfg.MODEL.WEIGHTS == "x.pth" and cfg.TEST.AUG.ENABLED
    messages = [record.getMessage() for record in caplog.records]
    assert any("'old.yaml'" in line for line in messages)
    assert not any("/config.yaml" in line for line in messages)


# Code


CODE = "MODEL:\n  ANCHOR_GENERATOR:\n    SIZES: !!python/object/apply:eval ['[[2**5]]']\n"


def code_that_creates(path: Path) -> str:
    """A config that creates a folder if its code is run."""
    return f"X: !!python/object/apply:os.mkdir ['{path}']\n"


# Value of _BASE_ in models/mine.yaml, and the path where fvcore looks for it
HIDDEN = {
    "same folder": ("evil.yaml", "models/evil.yaml"),
    "scheme": ("x://evil.yaml", "models/x:/evil.yaml"),
    "scheme and parent": ("x://../evil.yaml", "models/evil.yaml"),
    "detectron2": ("detectron2://evil.yaml", "models/detectron2:/evil.yaml"),
    "catalog": ("catalog://evil.yaml", "models/catalog:/evil.yaml"),
    "file": ("file://evil.yaml", "models/file:/evil.yaml"),
    "upper case": ("HTTP://evil.yaml", "models/HTTP:/evil.yaml"),
    "home": ("~/evil.yaml", "home/evil.yaml"),
    "tilde": ("a~/evil.yaml", "models/a~/evil.yaml"),
    "variable": ("$HOME/evil.yaml", "models/$HOME/evil.yaml"),
    "dots": ("./../models/./evil.yaml", "models/evil.yaml"),
}


@pytest.mark.parametrize("decoy", [False, True])
@pytest.mark.parametrize("case", HIDDEN)
@pytest.mark.parametrize("listed", [False, True])
def test_code_in_a_base_is_not_run(case, listed, decoy, folder, monkeypatch):
    """Wherever fvcore finds the base, and also if the working directory has a harmless decoy."""
    monkeypatch.setenv("HOME", str(folder / "home"))
    name, path_of_evil = HIDDEN[case]
    (folder / "models/x:").mkdir(parents=True)
    (folder / path_of_evil).parent.mkdir(parents=True, exist_ok=True)
    (folder / path_of_evil).write_text(code_that_creates(folder / "ran"))
    if decoy:
        harmless = folder / name
        harmless.parent.mkdir(parents=True, exist_ok=True)
        if not harmless.resolve().exists():
            write(harmless, VERSION=2)
    mine = write(folder / "models/mine.yaml", _BASE_=[name] if listed else name)
    for path in (str(mine), "models/mine.yaml"):
        refused(path, "evil.yaml")
    assert not (folder / "ran").exists()
    by_fvcore("models/mine.yaml")
    assert (folder / "ran").exists(), "fvcore runs the code"


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_error_names_the_line_of_the_code(depth, folder):
    (folder / "0.yaml").write_text(CODE)
    for i in range(depth):
        write(folder / f"{i + 1}.yaml", _BASE_=f"{i}.yaml")
    refused(f"{depth}.yaml", "0.yaml", "line 3")


@pytest.mark.parametrize("tag", ["object/new:os.system", "name:os.system", "module:os"])
def test_python_tags_are_refused(tag, folder):
    (folder / "mine.yaml").write_text(f"X: !!python/{tag} ''\n")
    refused("mine.yaml", "mine.yaml", "line 1")


def fake_detectron2(folder: Path, monkeypatch) -> Path:
    """A checkout of Detectron2, whose package links to the configs beside it."""
    configs = folder / "checkout/configs"
    (folder / "checkout/detectron2/model_zoo").mkdir(parents=True)
    (folder / "checkout/detectron2/model_zoo/configs").symlink_to(configs)
    configs.mkdir()
    monkeypatch.setattr(detectron2, "__file__", str(folder / "checkout/detectron2/__init__.py"))
    return configs


def test_configs_of_detectron2_may_run_code(folder, monkeypatch):
    configs = fake_detectron2(folder, monkeypatch)
    (configs / "base.yaml").write_text(CODE)
    write(configs / "sub/own.yaml", _BASE_="../base.yaml")
    (folder / "link.yaml").symlink_to(configs / "base.yaml")
    write(folder / "mine.yaml", _BASE_="checkout/detectron2/model_zoo/configs/sub/own.yaml")
    for path in (configs / "base.yaml", configs / "sub/own.yaml", "link.yaml", "mine.yaml"):
        assert read(path).MODEL.ANCHOR_GENERATOR.SIZES == [[32]]


def test_other_files_do_not_count_as_configs_of_detectron2(folder, monkeypatch):
    """Paths through its folder, links out of it, bases of its configs, and files beside it."""
    configs = fake_detectron2(folder, monkeypatch)
    (folder / "evil.yaml").write_text(code_that_creates(folder / "ran"))
    (configs / "link.yaml").symlink_to(folder / "evil.yaml")
    write(configs / "own.yaml", _BASE_="../../evil.yaml")
    (folder / "checkout/beside.yaml").write_text(code_that_creates(folder / "ran"))
    names = ["checkout/configs/../../evil.yaml", "checkout/configs/link.yaml"]
    for name in [*names, "checkout/configs/own.yaml", "checkout/beside.yaml"]:
        refused(name, "line 1")
    # If Detectron2 is installed, `configs/` beside it is not its own
    (folder / "checkout/detectron2/model_zoo/configs").unlink()
    (configs / "base.yaml").write_text(CODE)
    refused(configs / "base.yaml", "line 3")
    assert not (folder / "ran").exists()


# Files that are not configs


def fifo(path: Path) -> None:
    os.mkfifo(path)


INVALID_FILES = {
    "missing": lambda path: None,
    "folder": Path.mkdir,
    "fifo": fifo,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "endless": lambda path: path.symlink_to("/proc/kmsg"),
    "loop": lambda path: path.symlink_to(path),
    "binary": lambda path: path.write_bytes(b"A: \xff\xfe\n"),
    "utf-16": lambda path: path.write_text("A: 1\n", encoding="utf-16"),
    "nul": lambda path: path.write_bytes(b"A: \0\n"),
    "empty": lambda path: path.write_text(""),
    "list": lambda path: path.write_text("- A\n"),
    "text": lambda path: path.write_text("A\n"),
    "two": lambda path: path.write_text("A: 1\n---\nA: 2\n"),
    "not yaml": lambda path: path.write_text("A: [1\n"),
    "unhashable": lambda path: path.write_text("[1]: 2\n{}: 1\n"),
    "tag": lambda path: path.write_text("A: !mine 1\n"),
    "number": lambda path: path.write_text("A: !!int ''\n"),
    "digits": lambda path: path.write_text(f"A: {'9' * 5000}\n"),
    "large": lambda path: path.write_text("# " + "x" * 2**20),
    "sparse": lambda path: os.truncate(path, 2**40) if path.touch() is None else None,
    "long": lambda path: path.write_text(f"OUTPUT_DIR: {'x' * 10001}\n"),
}


@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize("case", INVALID_FILES)
def test_invalid_files_are_refused(case, folder):
    INVALID_FILES[case](folder / "bad.yaml")
    if case != "missing":  # a missing file is also searched among the shipped configs
        refused("bad.yaml", "bad.yaml")
    mine = write(folder / "mine.yaml", _BASE_="bad.yaml")
    refused(mine, "bad.yaml")


def test_numbers_with_too_many_digits(folder):
    (folder / "mine.yaml").write_text(f"VERSION: 0x{'f' * 9000}\n")
    refused("mine.yaml", "mine.yaml")


@pytest.mark.parametrize("base", [None, 1, {"A": 1}, [["x.yaml"]], "a\0b", "a\nb", "\x1b[1m", ""])
def test_invalid_names_of_bases(base, folder):
    write(folder / "mine.yaml", _BASE_=base)
    assert refused("mine.yaml", "mine.yaml", "_BASE_").isprintable()


def test_a_section_cannot_replace_a_value(folder):
    write(folder / "base.yaml", MODEL=1)
    write(folder / "mine.yaml", _BASE_="base.yaml", MODEL={"MASK_ON": True})
    refused("mine.yaml", "mine.yaml", "MODEL")
    with pytest.raises(AssertionError):
        by_fvcore("mine.yaml")


def test_errors_name_the_file_of_the_user(folder):
    """Detectron2 reads a temporary file, which no message names."""
    write(folder / "mine.yaml", MODEL={"NO_KEY": 1})
    message = refused("mine.yaml", "mine.yaml", "MODEL.NO_KEY")
    assert "/" not in message
    write(folder / "mine.yaml", VERSION="two")
    assert "/" not in refused("mine.yaml", "mine.yaml")


# Files that expand to more than the memory


def test_cyclic_bases(folder):
    write(folder / "a.yaml", _BASE_="./b.yaml")
    write(folder / "b.yaml", _BASE_="sub/../a.yaml")
    (folder / "sub").mkdir()
    refused("a.yaml", "a.yaml", "_BASE_")
    write(folder / "a.yaml", _BASE_=str(folder / "a.yaml"))
    refused("a.yaml", "a.yaml", "_BASE_")


def test_an_exponential_number_of_bases(folder):
    """25 files would be read 2^25 times."""
    write(folder / "0.yaml", VERSION=2)
    for i in range(25):
        write(folder / f"{i + 1}.yaml", _BASE_=[f"{i}.yaml"] * 2)
    refused("25.yaml", "25.yaml")
    assert read("5.yaml").VERSION == 2


def test_many_large_bases(folder):
    (folder / "base.yaml").write_text(f"VERSION: 2\n# {'x' * 2**19}\n")
    write(folder / "mine.yaml", _BASE_=["base.yaml"] * 3)
    refused("mine.yaml", "base.yaml")


def chain(first: str, link: str, count: int = 30) -> str:
    """YAML in which each anchor refers to the one before it twice."""
    lines = [f"A0: &a0 {first}"]
    lines += [f"A{i}: &a{i} {link.replace('*', f'*a{i - 1}')}" for i in range(1, count)]
    return "\n".join(lines) + "\n"


BOMBS = {
    "lists": chain("[1]", "[*, *]"),
    "mappings": chain("{x: 1}", "{x: *, y: * }"),
    "merge keys": chain("{x: 1}", "{<<: [*, *]}"),
    "deep by aliases": chain("[1]", "[*]", 200),
    "deep": "A: " + "[" * 5000 + "]" * 5000,
    "rather deep": "A: " + "[" * 60 + "]" * 60,
    "deep mappings": "A: " + "{a: " * 5000 + "1" + "}" * 5000,
    "cycle": "A: &a [*a]\n",
    "cycle of mappings": "A: &a {b: {c: *a}}\n",
    "cycle of merge keys": "A: &a\n  <<: *a\n",
    "cycle at the top": "&a\nA: *a\n",
    "long text": f"A: &a {'x' * 9000}\nB: [{'*a, ' * 5000}]\n",
    "sexagesimal": f"A: {'1:' * 200_000}1\n",
}


def too_large(path: str, name: str) -> None:
    """Read a file that must be refused before Detectron2 reads it."""
    with pytest.raises(InputError, match=name):
        read_config_file(path)


@pytest.mark.parametrize("case", BOMBS)
def test_expanding_files_are_refused(case, folder):
    (folder / "bomb.yaml").write_text(BOMBS[case])
    too_large("bomb.yaml", "bomb.yaml")
    write(folder / "mine.yaml", _BASE_="bomb.yaml")
    too_large("mine.yaml", "bomb.yaml")


def test_very_many_values(folder):
    (folder / "bomb.yaml").write_text(f"A: [{'1, ' * 110_000}]\n")
    too_large("bomb.yaml", "bomb.yaml")


def test_values_that_grow_by_merging(folder):
    """Many aliases of a small section, into which another file merges a large one."""
    (folder / "base.yaml").write_text(f"A: &a {{x: 1}}\nB: [{'*a, ' * 5000}]\n")
    write(folder / "mine.yaml", _BASE_="base.yaml", A={"y": list(range(5000))})
    too_large("mine.yaml", "mine.yaml")
    # Merging makes a section a part of itself
    (folder / "base.yaml").write_text("P: &x {k: 1}\nQ: {R: *x}\n")
    (folder / "more.yaml").write_text("P: {S: &y {l: 1}}\nQ: {R: {S: {T: *y}}}\n")
    write(folder / "mine.yaml", _BASE_=["base.yaml", "more.yaml"])
    too_large("mine.yaml", "mine.yaml")


# Strings that Detectron2 parses as Python, each close to the maximum length
PYTHON = {
    "minus": "-" * 9998 + "1",
    "plus": "1+" * 4999 + "1",
    "round": "(" * 9999,
    "square": "[" * 9999,
    "closed": "[" * 150 + "]" * 150,
    "power": "1**" * 3333,
    "attributes": "a" + ".a" * 4999,
    "calls": "a" + "()" * 4999,
    "lambda": "lambda:" * 1428,
    "long": "9" * 9999,
}


@pytest.mark.parametrize("case", PYTHON)
def test_strings_that_python_cannot_parse(case, folder):
    """They are kept or refused, and do not crash the interpreter."""
    write(folder / "mine.yaml", OUTPUT_DIR=PYTHON[case])
    try:
        assert read("mine.yaml").OUTPUT_DIR == PYTHON[case]
    except InputError as error:
        assert "mine.yaml" in str(error)


# Remote bases


@pytest.fixture
def server(folder, monkeypatch):
    """The address of a web server, and a list of the requests that it received."""
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    monkeypatch.setenv("FVCORE_CACHE", str(folder / "cache"))
    monkeypatch.setenv("IOPATH_CACHE", str(folder / "cache"))
    (folder / "web").mkdir()
    served = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder / "web")))
    Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}", requests
    served.shutdown()
    served.server_close()


def test_remote_bases_need_a_flag(server, folder):
    """Bases of a remote base are remote too, and code in them is not run."""
    address, requests = server
    write(folder / "web/sub/base.yaml", _BASE_="../first.yaml", SEED=3)
    write(folder / "web/first.yaml", VERSION=2, SOLVER={"MAX_ITER": 7})
    (folder / "web/evil.yaml").write_text(code_that_creates(folder / "ran"))
    mine = write(folder / "mine.yaml", _BASE_=f"{address}/sub/base.yaml")
    refused(mine, f"{address}/sub/base.yaml", "--allow-remote-base")
    done = command(ROOT / "tools/train_net.py", "--config-file", mine, "--check")
    assert done.returncode == 1 and "--allow-remote-base" in done.stderr
    assert not requests
    cfg = read(mine, allow_remote_base=True)
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER) == (3, 7) and len(requests) == 2
    write(mine, _BASE_=f"{address}/evil.yaml")
    refused(mine, "evil.yaml", "line 1", allow_remote_base=True)
    write(mine, _BASE_=f"{address}/none.yaml")
    refused(mine, "none.yaml", allow_remote_base=True)
    assert not (folder / "ran").exists()


def test_downloads_stay_in_the_cache(server, folder):
    address, _ = server
    write(folder / "web/base.yaml", VERSION=2)
    write(folder / "mine.yaml", _BASE_=f"{address}/../../../../..{folder}/out/../base.yaml")
    refused("mine.yaml", "base.yaml", allow_remote_base=True)
    write(folder / "mine.yaml", _BASE_=f"{address}/../../../base.yaml")
    assert read("mine.yaml", allow_remote_base=True).VERSION == 2
    assert {path.name for path in folder.iterdir()} == {"web", "cache", "mine.yaml"}
    assert [path.name for path in (folder / "cache").rglob("*.yaml")] == ["base.yaml"]


def test_a_comparison_with_a_remote_base(server, folder, shapes, monkeypatch):
    """Its training runs receive the flag."""
    address, _ = server
    (folder / "web/base.yaml").write_text(read(SMALL).dump())
    mine = str(write(folder / "mine.yaml", _BASE_=f"{address}/base.yaml"))
    data = ["--train", str(shapes / "instances_train.json"), str(shapes / "images")]
    words = ["--base", mine, *data, "--init", "", "--norms", "GN", "--seeds", "0"]
    opts = ["MODEL.BACKBONE.FREEZE_AT", "0"]
    with pytest.raises(InputError, match="--allow-remote-base"):
        make_plan(parse([*words, *opts]))
    found = make_plan(parse([*words, "--allow-remote-base", *opts]))
    given = []
    launch = lambda self, arguments, *more: given.append(arguments)  # noqa: E731
    monkeypatch.setattr(jobs.Launcher, "launch", launch)
    assert not jobs.run_trainings(list(found.cells.values()), folder / "out")
    (*program, flag, config), opts = given[0][:4], given[0][4:]
    assert (*program, flag) == (*jobs.TRAIN, "--config-file")
    train.run(["--check", flag, config, *opts])


# Folders of runs from an untrusted source


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """The folder of a finished run, with dummy weights."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(read(SMALL, *TINY).dump())
    (folder / "model_final.pth").write_bytes(b"x" * 16_000_000)
    names = ["a", "b", "c", "d", "e", "f"]
    categories = [{"id": 10 * i, "name": name} for i, name in enumerate(names)]
    (folder / "run.json").write_text(json.dumps({"categories": categories}))
    return folder


@pytest.fixture
def shared(run_folder, tmp_path) -> Path:
    """A copy of the folder, for a test to change."""
    return shutil.copytree(run_folder, tmp_path / "shared")


def refused_model(shared: Path, name: str) -> None:
    with pytest.raises(InputError, match=name) as error:
        load_run(shared, shared.parent / "out", [])
    assert "\n" not in str(error.value)


def test_load_run(shared):
    cfg, categories = load_run(shared, shared.parent, [])
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 6
    assert [(c["id"], c["name"]) for c in categories][1] == (10, "b")
    for record in ({}, {"categories": []}, {"categories": None}):
        (shared / "run.json").write_text(json.dumps(record))
        _, categories = load_run(shared, shared.parent, [])
        assert [c["id"] for c in categories] == [*range(6)]


def test_load_run_runs_no_code(shared):
    ran = shared.parent / "ran"
    config = shared / "config.yaml"
    original = config.read_text()
    (shared / "x:").mkdir()
    (shared / "evil.yaml").write_text(code_that_creates(ran))
    for text in (original + code_that_creates(ran), '_BASE_: "x://../evil.yaml"\n' + original):
        config.write_text(text)
        refused_model(shared, "config.yaml")
        assert not ran.exists()
        by_fvcore(config)
        assert ran.exists(), "fvcore runs the code"
        ran.rmdir()


def test_load_run_downloads_nothing(server, shared):
    address, requests = server
    config = shared / "config.yaml"
    config.write_text(f"_BASE_: {address}/base.yaml\n{config.read_text()}")
    refused_model(shared, "config.yaml")
    assert not requests


@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize("name", ["config.yaml", "run.json", "model_final.pth"])
@pytest.mark.parametrize("case", ["fifo", "folder", "link to a device", "missing"])
def test_load_run_does_not_hang(name, case, shared):
    (shared / name).unlink()
    INVALID_FILES[case](shared / name)
    refused_model(shared, name)


RECORDS = {
    "no text": b"\xff\xfe",
    "no json": b"{",
    "list": b"[]",
    "deep": b"[" * 100_000,
    "digits": b'{"categories": [{"id": ' + b"9" * 5000 + b', "name": "a"}]}',
    "large": b" " * (11 * 2**20),
    **{
        name: json.dumps({"categories": value}).encode()
        for name, value in {
            "number": 3,
            "text": "abcdef",
            "mapping": {"a": 1},
            "false": False,
            "names": [*"abcdef"],
            "without id": [{"name": "a"}] * 6,
            "without name": [{"id": i} for i in range(6)],
            "text ids": [{"id": str(i), "name": "a"} for i in range(6)],
            "true": [{"id": bool(i), "name": "a"} for i in range(6)],
            "floats": [{"id": i + 0.5, "name": "a"} for i in range(6)],
            "negative": [{"id": i - 1, "name": "a"} for i in range(6)],
            "same": [{"id": 1, "name": "a"}] * 6,
            "few": [{"id": i, "name": "a"} for i in range(5)],
            "many": [{"id": i, "name": "a"} for i in range(7)],
            "no names": [{"id": i, "name": [i]} for i in range(6)],
        }.items()
    },
}


@pytest.mark.parametrize("case", RECORDS)
def test_invalid_records_are_refused(case, shared):
    (shared / "run.json").write_bytes(RECORDS[case])
    refused_model(shared, "run.json")


@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.META_ARCHITECTURE", "Nothing"],
        ["MODEL.ROI_HEADS.NUM_CLASSES", "1000000000000"],
        ["MODEL.ROI_HEADS.NUM_CLASSES", "-5"],
        ["MODEL.ROI_BOX_HEAD.FC_DIM", f"1{'0' * 30}"],
        ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"],
        ["MODEL.RESNETS.DEPTH", "17"],
    ],
)
def test_models_that_cannot_be_built(opts, shared):
    config = shared / "config.yaml"
    values = yaml.safe_load(config.read_text())
    section = values
    *sections, key = opts[0].split(".")
    for name in sections:
        section = section[name]
    section[key] = yaml.safe_load(opts[1])
    config.write_text(yaml.safe_dump(values))
    refused_model(shared, "config.yaml")


def test_predict_reports_errors_in_one_line(shared):
    (shared / "config.yaml").write_text(code_that_creates(shared / "ran"))
    done = command("tools/predict.py", "--model", shared, shared, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "config.yaml" in done.stderr
    assert not (shared / "ran").exists()
