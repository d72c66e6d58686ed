"""Wheel, sdist, editable install and plain checkout all give a working package, with a package named `kernels` or not.

The repository has a top-level folder `kernels/`, and transformers probes that import name while it is imported:
`CONTRIBUTING.md` says what the arrangement is, this file shows that it holds. No network is needed.
"""

import importlib.metadata
import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).resolve().parents[1]
SOURCE_FOLDERS = ("kernels", "conversion")
FAKE_VERSION = "0.17.2"

# What a case tries before it looks at the installation from inside. The import of Llama is the one that breaks where a
# folder takes the place of the `kernels` package.
WITH_TRANSFORMERS = """
import hf_memory
import transformers.models.llama.modeling_llama
from transformers import AutoConfig
from hf_memory.models import ARCHITECTURES

for model_type in ARCHITECTURES:
    assert type(AutoConfig.for_model(model_type)).__module__.startswith("hf_memory.")
"""
WITHOUT_TRANSFORMERS = """
import sys, types
sys.modules["hf_memory.registration"] = types.SimpleNamespace(register_architectures=lambda: None)
import hf_memory
"""
PROBE = """
import importlib.metadata, importlib.util, json
import hf_memory.conversion, hf_memory.kernels

try:
    scripts = [entry.value for entry in importlib.metadata.distribution("hf-memory").entry_points]
except importlib.metadata.PackageNotFoundError:
    scripts = []
kernels = importlib.util.find_spec("kernels")
print(json.dumps({
    "package": hf_memory.__file__,
    "paths": {"kernels": list(hf_memory.kernels.__path__), "conversion": list(hf_memory.conversion.__path__)},
    "found": {name: importlib.util.find_spec(name).origin for name in MODULES},
    "scripts": scripts,
    "kernels": kernels and kernels.origin,
}))
"""


class Case(NamedTuple):
    """One way to have hf-memory at hand."""

    installed: str | None  # "wheel", "editable", or None for a checkout that is not installed
    beside_kernels: bool  # whether a package named `kernels` is installed
    from_root: bool  # the current directory: the repository root, or `/`
    transformers: bool  # import it as well; seconds, and left out where another case has the same `kernels` to find

    def __str__(self) -> str:
        beside = "beside" if self.beside_kernels else "without"
        return f"{self.installed or 'checkout'}-{beside}-kernels-from-{'root' if self.from_root else 'elsewhere'}"


CASES = [
    Case(None, beside_kernels=False, from_root=True, transformers=True),
    Case(None, beside_kernels=True, from_root=True, transformers=True),
    Case("wheel", beside_kernels=False, from_root=False, transformers=True),
    Case("wheel", beside_kernels=True, from_root=False, transformers=False),
    Case("wheel", beside_kernels=True, from_root=True, transformers=False),
    Case("editable", beside_kernels=False, from_root=False, transformers=True),
    Case("editable", beside_kernels=True, from_root=False, transformers=False),
]


def source_modules() -> list[str]:
    """Top-level modules and packages of the source folders, by the name under which they are imported."""
    return sorted(
        f"hf_memory.{folder}.{path.stem}"
        for folder in SOURCE_FOLDERS
        for path in (ROOT / folder).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    )


def run(*arguments: str | Path) -> None:
    result = subprocess.run([str(argument) for argument in arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"{arguments}\n{result.stdout}\n{result.stderr}"


class Environment:
    """A virtual environment that sees the packages of the running one, after its own."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=False, symlinks=sys.platform != "win32")
        scheme = {"base": str(folder), "platbase": str(folder)}
        self.site = Path(sysconfig.get_path("purelib", "venv", scheme))
        self.scripts = Path(sysconfig.get_path("scripts", "venv", scheme))
        self.python = self.scripts / Path(sys.executable).name
        # A `.pth` file inside a folder that is itself named by a `.pth` file is not read, so that an editable install
        # of hf-memory in the running environment stays invisible here.
        shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (self.site / "shared.pth").write_text("\n".join(sorted(shared)))

    def install(self, what: Path, *options: str) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-index", "--no-deps", "--quiet")
        run(*pip, "--no-build-isolation", "--disable-pip-version-check", *options, what)

    def add_kernels_package(self) -> None:
        """What matters of the PyPI package: a regular package of that name with a version and modules of its own."""
        package, info = self.site / "kernels", self.site / f"kernels-{FAKE_VERSION}.dist-info"
        package.mkdir()
        info.mkdir()
        (package / "__init__.py").write_text(f"__version__ = {FAKE_VERSION!r}\n")
        (package / "reference.py").write_text("raise ImportError('this is not the module you are looking for')\n")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {FAKE_VERSION}\n")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, the wheel built from that sdist, and the wheel built from the checkout."""
    folder = tmp_path_factory.mktemp("distributions")
    build = (sys.executable, "-m", "build", "--no-isolation", ROOT)
    run(*build, "--outdir", folder / "sdist")
    run(*build, "--wheel", "--outdir", folder / "checkout")
    return {
        "sdist": next((folder / "sdist").glob("*.tar.gz")),
        "wheel from sdist": next((folder / "sdist").glob("*.whl")),
        "wheel": next((folder / "checkout").glob("*.whl")),
    }


def probe(case: Case, folder: Path, wheel: Path, run_python: Callable[..., str]) -> dict:
    environment = Environment(folder)
    if case.beside_kernels:
        environment.add_kernels_package()
    if case.installed == "wheel":
        environment.install(wheel)
    elif case.installed == "editable":
        environment.install(ROOT, "--editable")
    first = WITH_TRANSFORMERS if case.transformers else WITHOUT_TRANSFORMERS
    code = f"MODULES = {source_modules()!r}\n{first}{PROBE}"
    report = json.loads(run_python(code, cwd=ROOT if case.from_root else "/", executable=environment.python))
    return {**report, "site": str(environment.site), "script": (environment.scripts / "hf-memory").exists()}


@pytest.fixture(scope="module")
def reports(
    tmp_path_factory: pytest.TempPathFactory, distributions: dict[str, Path], run_python: Callable[..., str]
) -> Iterator[dict[Case, Future]]:
    folder = tmp_path_factory.mktemp("environments")
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {
            case: pool.submit(probe, case, folder / str(case), distributions["wheel"], run_python) for case in CASES
        }


def has_kernels_package() -> bool:
    try:
        importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("case", CASES, ids=str)
def test_package_works(case: Case, reports: dict[Case, Future]):
    if not case.beside_kernels and has_kernels_package():
        pytest.skip("the environment has the PyPI package `kernels`, so its absence cannot be shown here")
    report = reports[case].result()
    from_checkout = case.installed != "wheel" or case.from_root
    home = ROOT if from_checkout else Path(report["site"])
    package = home / "hf_memory"
    assert Path(report["package"]).parent == package

    for folder in SOURCE_FOLDERS:
        expected = [package / folder, home / folder] if from_checkout else [package / folder]
        assert [Path(path) for path in report["paths"][folder]] == expected
    for name, origin in report["found"].items():
        assert (home if from_checkout else package) in Path(origin).parents, name
    if case.installed:
        assert report["scripts"] == ["hf_memory.cli:app"]
        assert report["script"]
    if case.beside_kernels:
        assert Path(report["kernels"]) == Path(report["site"]) / "kernels" / "__init__.py"
    else:
        assert report["kernels"] is None  # absent, or the namespace folder of the checkout


def archive(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_sdist_builds_the_same_wheel(distributions: dict[str, Path]):
    assert archive(distributions["wheel from sdist"]) == archive(distributions["wheel"])


def test_wheel_holds_the_source_folders_and_nothing_beside_the_package(distributions: dict[str, Path]):
    names = archive(distributions["wheel"])
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hf_memory"}
    for folder in (*SOURCE_FOLDERS, "model_cards"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".md", ".yaml"):
                assert f"hf_memory/{path.relative_to(ROOT).as_posix()}" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert "hf_memory/py.typed" in names


@pytest.mark.parametrize("folder", SOURCE_FOLDERS)
def test_source_folder_does_not_hide_a_package(folder: str):
    """From the root, the plain name is nobody's, a namespace folder, or an installed package: never our code."""
    spec = importlib.util.find_spec(folder)
    assert spec is None or spec.origin is None or ROOT / folder not in Path(spec.origin).parents
