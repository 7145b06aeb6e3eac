"""The extension file itself, and what happens when it cannot be used."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT, python

import fastdiff
from fastdiff import _extension

INFO = """
import json, sys, torch
{before}
import fastdiff
state = fastdiff.info()
assert str(state)
x = torch.randn(4, 8)
torch.testing.assert_close(fastdiff.ops.gelu_tanh(x), torch.nn.functional.gelu(x, approximate="tanh"))
result = {{b.name: [b.available, b.reason, b.command] for b in state.backends}}
print(json.dumps([result, "fastdiff._C" in sys.modules, list(state.warnings)]))
"""

needs_extension = pytest.mark.skipif(_extension.module is None, reason=_extension.error)
has_tools = sys.platform == "linux" and shutil.which("nm") and shutil.which("g++")
needs_tools = pytest.mark.skipif(not has_tools, reason="needs Linux, nm and g++")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package, without its extension."""
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "_build.json", "__pycache__", "model")
    shutil.copytree(Path(fastdiff.__file__).parent, tmp_path / "fastdiff", ignore=ignore)
    return tmp_path


def extension() -> Path:
    assert _extension.module is not None
    assert _extension.module.__file__ is not None
    return Path(_extension.module.__file__)


def unusable(package: Path, before: str = "") -> tuple[str, str]:
    """Reason and command for the CPU backend of a package whose extension cannot be used."""
    backends, loaded, _ = json.loads(python(INFO.format(before=before), package).splitlines()[-1])
    available, reason, command = backends["cpu"]
    assert not available
    assert reason.startswith("the compiled kernels are not usable: ")
    assert not loaded or "does not load" not in reason
    assert backends["eager"][0]
    return reason, command


@needs_extension
@needs_tools
def test_only_stable_symbols() -> None:
    # What makes one file serve every torch from 2.10 on.
    nm = subprocess.run(["nm", "-D", str(extension())], capture_output=True, text=True, check=True).stdout
    undefined, optional, defined = set(), set(), set()
    for line in nm.splitlines():
        kind, name = line.split()[-2:]
        {"U": undefined, "w": optional, "v": optional}.get(kind, defined).add(name)
    assert defined == {"PyInit__C"}
    stable = re.compile(
        r"(aoti_torch_|torch_|_?Py)\w+"  # torch's C ABI and Python's
        r"|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+"
        r"|_ITM_(de)?registerTMCloneTable|__gmon_start__"  # weak, of the C runtime
    )
    assert {name for name in undefined if not stable.fullmatch(name)} == set()
    # What is used where a torch has it, and where not, done in Python.
    exported = re.findall(r'FASTDIFF_EXPORTED\("(\w+)"\)', (ROOT / "csrc/torch_abi.h").read_text())
    assert {name for name in optional if not stable.fullmatch(name)} == set(exported)


@needs_extension
def test_build_info() -> None:
    info = _extension.build_info()
    assert info["fastdiff"] == fastdiff.__version__
    assert info["torch_abi"] == "2.10"
    assert {"torch", "python", "platform", "compiler", "isas", "isas_missing", "cuda", "built"} <= info.keys()
    assert info["cuda"]["built"] or info["cuda"]["reason"]
    assert _extension.cpu_isa() in ("none", *info["isas"])


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="needs ELF files")
def test_truncated_file(package: Path) -> None:
    whole = extension().read_bytes()
    assert not _extension._is_truncated(extension())
    target = package / "fastdiff" / extension().name
    for size in (0, 40, 64, 4096, len(whole) // 4, len(whole) - 1, len(whole) // 2):
        target.write_bytes(whole[:size])
        assert _extension._is_truncated(target)
    reason, command = unusable(package)
    assert "is incomplete" in reason
    assert "pip install" in command


@needs_extension
@needs_tools
def test_missing_symbol(package: Path) -> None:
    source = 'extern "C" void* no_such_symbol();\nextern "C" void* PyInit__C() { return no_such_symbol(); }\n'
    target = package / "fastdiff" / extension().name
    command = ["g++", "-shared", "-fPIC", "-Wl,-z,now", "-x", "c++", "-", "-o", str(target)]
    subprocess.run(command, input=source, text=True, check=True)
    reason, _ = unusable(package)
    assert "does not load" in reason
    assert "no_such_symbol" in reason


@needs_extension
def test_other_python(package: Path) -> None:
    name = "_C.cpython-27-x86_64-linux-gnu.so"
    shutil.copy(extension(), package / "fastdiff" / name)
    reason, command = unusable(package)
    assert f"built for another Python or system ({name})" in reason
    assert "pip install" in command


@needs_extension
def test_other_version(package: Path) -> None:
    shutil.copy(extension(), package / "fastdiff")
    init = package / "fastdiff/__init__.py"
    text, count = re.subn(r'__version__ = ".+?"', '__version__ = "99.0"', init.read_text())
    assert count == 1
    init.write_text(text)
    reason, _ = unusable(package)
    assert f"was built for fastdiff {fastdiff.__version__}, and this is 99.0" in reason


@needs_extension
def test_old_torch(package: Path) -> None:
    shutil.copy(extension(), package / "fastdiff")
    reason, command = unusable(package, before="torch.__version__ = '2.9.1+cu126'")
    assert "torch 2.9.1+cu126 is older than 2.10" in reason
    assert command == "pip install --upgrade torch"


def test_never_built(package: Path) -> None:
    reason, command = unusable(package)
    assert "have not been built" in reason
    assert "pip install" in command
