"""The package as pip sees it: every folder, every data file, and nothing that only works on one machine."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import neuralcodec
import pytest

ROOT = Path(__file__).resolve().parent.parent  # the source tree, also where an installed copy is tested
OUTSIDE = {"tests", "build", "dist", "runs"}  # folders that are no part of the package


def ours(pattern: str) -> list[Path]:
    """Files of the package, relative to the root."""
    found = (p.relative_to(ROOT) for p in ROOT.rglob(pattern))
    return sorted(p for p in found if p.parts[0] not in OUTSIDE and not p.parts[0].startswith("."))


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def package(folder: Path) -> str:
    return ".".join(["neuralcodec", *folder.parts])


def test_every_folder_of_code_is_listed(project):
    listed = project["tool"]["setuptools"]["packages"]
    assert {package(p.parent) for p in ours("*.py")} <= set(listed)
    assert all((ROOT / p.parent / "__init__.py").exists() for p in ours("*.py"))
    assert all(ROOT.joinpath(*name.split(".")[1:]).is_dir() for name in listed)


def test_wheel_holds_every_file_and_none_of_the_past(tmp_path):
    """Two builds in one tree, with a file deleted between them."""
    if int(pytest.importorskip("setuptools").__version__.split(".")[0]) < 77:
        pytest.skip("needs the setuptools of pyproject.toml")
    tree = tmp_path / "tree"
    wanted = {str(p) for pattern in ("*.py", "*.safetensors", "*.json", "*.toml", "*.html", "SPEC.md") for p in ours(pattern)}
    wanted.remove("pyproject.toml")
    for name in [*wanted, "pyproject.toml", "README.md"]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    script = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    old = tree / "weights" / "old.json"
    old.write_text("{}")
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        call = [sys.executable, "-c", script, folder]
        run = subprocess.run(call, cwd=tree, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = {n.removeprefix("neuralcodec/") for n in archive.namelist() if n.startswith("neuralcodec/")}
        assert names == wanted | ({"weights/old.json"} if old.exists() else set())
        old.unlink(missing_ok=True)


def test_version_is_told_once_twice(project):
    assert project["project"]["version"] == neuralcodec.__version__


def test_imports_inside_are_relative():
    wrong = []
    for path in ours("*.py"):
        if path.name == "__main__.py":  # may run without a parent package
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            wrong += [f"{path}: {name}" for name in names if name.split(".")[0] == "neuralcodec"]
    assert not wrong


def test_no_path_of_one_machine():
    homes = ("/".join(["", "work", ""]), "/".join(["", "root", ""]), "/".join(["", "home", ""]))
    wrong = []
    for pattern in ("*.py", "*.toml", "*.md", "*.json"):
        for path in ours(pattern):
            text = (ROOT / path).read_text()
            wrong += [f"{path}: {home}" for home in homes if home in text]
    assert not wrong


def test_importing_is_cheap_and_names_come_when_asked_for():
    script = (
        "import sys, neuralcodec\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)\n"
        "from neuralcodec import CodecError, Limits, dumps, loads\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(neuralcodec.__all__) <= set(dir(neuralcodec))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("name", neuralcodec.__all__)
def test_every_promised_name_exists(name):
    assert getattr(neuralcodec, name) is not None


def test_other_names_do_not():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        neuralcodec.nonsense  # noqa: B018


def test_the_example_of_the_package_works(tmp_path, monkeypatch):
    """The docstring of the package, run as it stands with the small model."""
    from conftest import scene
    from PIL import Image

    code = "\n".join(line[4:] for line in neuralcodec.__doc__.splitlines() if line.startswith("    "))
    assert "load(" in code
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scene(70, 90)).save("photo.png")
    names: dict = {}
    exec(code.replace('"light"', '"test"'), names)
    assert names["pixels"].shape == (70, 90, 3)


def test_ci_runs_what_the_readme_says():
    commands = ["pip install .", "codec demo", "pip install '.[test]'", "pytest"]
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert " && ".join(commands[:2]) in readme
    assert " && ".join(commands[2:]) in readme
    assert [c for c in commands if c not in ci] == []
