"""README.md and those beside the code, in parts, and their commands run in processes of their own.

Commands run in forks of a process that has PyTorch and Detectron2 imported already.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import forkserver, get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELOADED = ["torchvision", "detectron2.engine", "detectron2.evaluation", "gn_det"]


@dataclass(frozen=True)
class Table:
    """A table's cells, without the backslashes that Markdown needs."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def column(self, i: int) -> list[str]:
        return [row[i] for row in self.rows]


@dataclass(frozen=True)
class Page:
    """One README.md; `name` is its path in the repository."""

    name: str

    @cached_property
    def text(self) -> str:
        return (ROOT / self.name).read_text()

    @property
    def folder(self) -> Path:
        return (ROOT / self.name).parent

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```$", self.text, re.DOTALL | re.MULTILINE)

    @property
    def commands(self) -> list[str]:
        """What stands in its bash blocks, a line each."""
        lines = [
            line
            for block in self.blocks("bash")
            for line in re.sub(r"\\\n\s*", "", block).splitlines()
        ]
        return [line for line in lines if not line.startswith("#")]

    @property
    def outside_blocks(self) -> str:
        return re.sub(r"^```.*?^```$", "", self.text, flags=re.DOTALL | re.MULTILINE)

    @property
    def prose(self) -> str:
        """Without code and addresses."""
        return re.sub(r"`[^`]*`|\]\([^)]*\)", " ", self.outside_blocks)

    @property
    def links(self) -> list[str]:
        return re.findall(r"\]\(([^)\s]+)\)", self.outside_blocks)

    @property
    def anchors(self) -> set[str]:
        """The headings, as links on GitHub name them."""
        titles = re.findall(r"^#+ (.*)$", self.outside_blocks, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    @property
    def tables(self) -> list[Table]:
        found = re.findall(r"(?:^\|.*\|$\n?)+", self.outside_blocks, re.MULTILINE)
        return [parse_table(text) for text in found]


def parse_table(text: str) -> Table:
    """A table of Markdown, which shows one paragraph where its second line is not as it has to be.

    Raises:
        AssertionError: for lines of unequal width, and without a second line of dashes.
    """
    lines = text.strip().splitlines()
    head, dashes, *rows = (
        tuple(cell.strip().replace("\\", "") for cell in line[1:-1].split("|")) for line in lines
    )
    assert all(re.fullmatch("-+", cell) for cell in dashes), lines[0]
    assert {len(row) for row in (dashes, *rows)} == {len(head)}, lines[0]
    return Table(head, tuple(rows))


def find_pages() -> list[Page]:
    """Every README.md that git knows or would add, the one at the top first."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    names = {name for name in done.stdout.splitlines() if Path(name).name == "README.md"}
    return [Page(name) for name in sorted(names, key=lambda name: (name.count("/"), name))]


def numbers(text: str) -> list[float]:
    """All numbers in a text, with their signs."""
    return [float(n) for n in re.findall(r"-?\d+\.?\d*", text.replace("−", "-"))]


class Runner:
    """Runs commands in a folder, and knows which it ran."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, set[str]()
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        before = dict(os.environ)
        # Data sets are looked for below the folder that commands run in, as a user's are
        os.environ.pop("DETECTRON2_DATASETS", None)
        os.environ["PYTHONPATH"] = str(ROOT)
        forkserver.ensure_running()
        os.environ.clear()
        os.environ.update(before)

    def run(self, command: str, *more: str, change: Sequence[tuple[str, str]] = ()) -> str:
        """What a command prints.

        Args:
            command: as it stands in a README.
            more: words at its end, to make it small.
            change: texts in it, and what is put in their place.
        """
        self.done.add(command)
        for old, new in change:
            assert old in command, (old, command)
            command = command.replace(old, new)
        program, *words = shlex.split(command)
        assert program == "python", command
        out, err = self.folder / "stdout", self.folder / "stderr"
        arguments = ([*words, *more], self.folder, out, err)
        process = self._context.Process(target=execute, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == 0, out.read_text()[-1500:] + err.read_text()[-1500:]
        return out.read_text()


def execute(words: Sequence[str], folder: Path, out: Path, err: Path) -> None:
    """Be `python WORDS...` in a folder."""
    os.chdir(folder)
    os.environ.pop("DETECTRON2_DATASETS", None)
    os.environ["PYTHONPATH"] = str(ROOT)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if words[0] == "-m":
        words = words[1:]
        sys.argv = list(words)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
