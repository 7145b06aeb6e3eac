"""``fastdiff.info()``, the command line, and what importing fastdiff costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from source_tree import ROOT, python

import fastdiff
from fastdiff import cli
from fastdiff.backends import BACKENDS
from fastdiff.info import install_command

#: What no command can cure, by the words of its reason.
INCURABLE = ("this version of fastdiff has no", "this CPU has no", "sees no", "are for x86-64", "without GPU support")


def test_every_missing_backend_has_a_reason_and_a_command() -> None:
    backends = fastdiff.info().backends
    assert tuple(backend.name for backend in backends) == BACKENDS
    for backend in backends:
        if backend.available:
            assert backend.detail
            assert not backend.reason
        else:
            assert backend.reason
            assert backend.command or any(words in backend.reason for words in INCURABLE)


def test_table_says_what_the_data_says(capsys: pytest.CaptureFixture[str]) -> None:
    state = fastdiff.info()
    assert cli.main(["info"]) == 0
    table = capsys.readouterr().out
    for text in (*state.versions.values(), *(b.detail or b.reason for b in state.backends), *state.warnings):
        assert (text or "not installed") in table
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(state.as_dict()))


def test_text_diff_library_is_noticed(tmp_path: Path) -> None:
    metadata = tmp_path / "fastdiff-0.3.0.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: fastdiff\nVersion: 0.3.0\n")
    code = "import fastdiff; print(*fastdiff.info().warnings, sep='\\n')"
    package_in = Path(fastdiff.__file__).parents[1]
    assert "text-diff" not in python(code, package_in)
    warned = python(f"import sys; sys.path.append({str(tmp_path)!r})\n{code}", package_in)
    assert "the unrelated distribution 'fastdiff' 0.3.0 (a text-diff library)" in warned
    assert "pip uninstall fastdiff && " in warned


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs an installation from the source tree")
def test_install_command_names_the_sources() -> None:
    if Path(fastdiff.__file__).parents[1] == ROOT:
        assert install_command().endswith(f"install -e {ROOT}")
    else:
        assert "pip install" in install_command()


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["nonsense"])
    assert exit_.value.code == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err
    assert cli.main([]) == 2
    overview = capsys.readouterr().out
    assert all(name in overview for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_commands_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    assert f"fastdiff {name}" in capsys.readouterr().out


def test_import_is_light() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fastdiff; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    imported = set(python(code, Path(fastdiff.__file__).parents[1]).split())
    heavy = {"accelerate", "diffusers", "numpy", "PIL", "scipy", "sklearn", "transformers", "triton"}
    assert "fastdiff" in imported
    assert not imported & heavy


def test_info_leaves_setuptools_usable() -> None:
    """torch.compile imports setuptools, which cannot replace distutils once its finder was asked for pip."""
    code = "import fastdiff; fastdiff.info(); import setuptools; print(setuptools.__name__)"
    assert python(code, Path(fastdiff.__file__).parents[1]).split()[-1] == "setuptools"
