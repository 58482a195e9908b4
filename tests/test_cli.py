"""The command `gn-det`, its module form, and the scripts in `tools/`."""

import sys

import pytest
from conftest import command

from gn_det import __version__, cli


def test_every_command_has_help(monkeypatch, capsys):
    """It begins with the name that the user typed."""
    for name in cli.COMMANDS:
        monkeypatch.setattr(sys, "argv", ["gn-det"])
        with pytest.raises(SystemExit) as end:
            cli.main([name, "--help"])
        assert end.value.code in (0, None)
        assert capsys.readouterr().out.startswith(f"usage: gn-det {name} ")


def test_list_and_version(capsys):
    cli.main([])
    listed = capsys.readouterr().out
    assert all(name in listed for name in cli.COMMANDS)
    cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_unknown_command():
    done = command("-m", "gn_det", "trian")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "trian" in done.stderr and "train" in done.stderr
