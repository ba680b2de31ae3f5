"""What pip installs: the links, the wheel, and both kinds of install, each used outside the checkout."""

import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers.utils import import_utils

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LINKS = {"modeling": "../modeling", "kernels": "../kernels", "configs": "../recipes/configs"}
EXTRA_MODULES = ("bitsandbytes", "datasets", "liger_kernel", "lm_eval", "sklearn", "triton")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run a command without the settings of this process's Python; returns its standard output."""
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(cwd), "HF_HUB_OFFLINE": "1", **env}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, so that builds leave nothing in this one."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("linearize", "modeling", "kernels", "recipes"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def archives(checkout, tmp_path_factory) -> tuple[Path, Path]:
    """A source archive, and the wheel that is built from it."""
    output = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, cwd=checkout)
    return next(output.glob("*.tar.gz")), next(output.glob("*.whl"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tmp_path_factory) -> Path:
    """Python of a fresh environment with linearize installed; the rest comes from the environment of the tests."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # a folder named in a .pth file is searched last, and its own .pth files are not read: no other linearize gets in
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "shared.pth").write_text("\n".join(shared) + "\n")
    if request.param == "wheel":
        source = [request.getfixturevalue("archives")[1]]
    else:
        source = ["--no-build-isolation", "--editable", request.getfixturevalue("checkout")]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, *source, cwd=folder)
    return python


def test_links_lead_to_the_rooms_at_the_root():
    for name, target in LINKS.items():
        link = ROOT / "linearize" / name
        assert link.is_symlink() and str(link.readlink()) == target and link.is_dir()


def test_no_folder_at_the_root_hides_another_package():
    """A `kernels/__init__.py` would hide Hugging Face's `kernels`, which transformers imports."""
    for name in ("kernels", "recipes", "scripts", "tests"):
        assert not (ROOT / name / "__init__.py").exists()
    run(sys.executable, "-c", "import transformers.modeling_utils", cwd=ROOT)


def test_hugging_face_kernels_wins_over_the_folder(tmp_path):
    """With the root in front of site-packages, transformers still finds the real `kernels`, and we find ours."""
    package, metadata = tmp_path / "kernels", tmp_path / "kernels.dist-info"
    package.mkdir()
    stand_in = """
        from unittest.mock import MagicMock
        def __getattr__(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return MagicMock(return_value=lambda decorated: decorated)
    """
    (package / "__init__.py").write_text(textwrap.dedent(stand_in))
    metadata.mkdir()
    version = import_utils.KERNELS_MIN_VERSION  # one that transformers would use
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    code = """
        import sys; sys.path.append(sys.argv[1])
        import kernels, transformers.modeling_utils
        from transformers.utils import is_kernels_available
        assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__
        assert is_kernels_available()
        import linearize.kernels.hybrid_linear as ours
        assert ours.CONTRACT and ours.__name__ == "linearize.kernels.hybrid_linear"
    """
    run(sys.executable, "-c", textwrap.dedent(code), tmp_path, cwd=ROOT)


def test_wheel_and_source_archive_hold_everything(archives):
    source, wheel = archives
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in (ROOT / "linearize", *(ROOT / "linearize" / name for name in LINKS))
        for pattern in ("*.py", "*.yaml", "*.jsonl.gz", "py.typed", "*.md")
        for path in folder.rglob(pattern)
    }
    assert {"linearize/modeling/registry.py", "linearize/kernels/hybrid_linear/reference.py"} < expected
    assert {"linearize/py.typed", "linearize/demo_text/train.jsonl.gz"} < expected
    assert sum(name.startswith("linearize/configs/") for name in expected) >= 3
    assert expected <= names, sorted(expected - names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"linearize"}, "another top-level name is installed"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    packed = {name.partition("/")[2] for name in tarfile.open(source).getnames()}
    assert expected <= packed, sorted(expected - packed)


def test_every_module_imports_without_the_extras(installed, tmp_path):
    """In both installs, outside the checkout, on a machine that lacks what only some commands need."""
    code = f"""
        import sys
        sys.modules.update(dict.fromkeys({EXTRA_MODULES}))  # None: the import fails and find_spec finds nothing
        import importlib, importlib.metadata, pkgutil
        import linearize
        names = [module.name for module in pkgutil.walk_packages(linearize.__path__, "linearize.")]
        names += ["linearize.kernels.hybrid_linear.reference"]  # linearize.kernels is a namespace: not walked
        for name in names:
            importlib.import_module(name)
        assert {{"linearize.modeling.registry", "linearize.cli", "linearize.evaluation.report"}} <= set(names), names
        assert importlib.metadata.version("linearize") == linearize.__version__
        print(linearize.__file__)
    """
    where = Path(
        run(
            installed, "-P" if sys.version_info >= (3, 11) else "-I", "-c", textwrap.dedent(code), cwd=tmp_path
        ).strip()
    )
    assert ROOT not in where.resolve().parents


def test_console_script_starts(installed, tmp_path):
    assert "convert" in run(installed.parent / "linearize", "--help", cwd=tmp_path)


def test_tested_versions_satisfy_every_requirement():
    table = project()["project"]
    extras = table["optional-dependencies"]
    wanted = [
        Requirement(text) for text in [*table["dependencies"], *extras["eval"], *extras["quant"], *extras["dev"]]
    ]
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {normal(pin.name): pin for pin in map(Requirement, filter(None, lines))}
    for requirement in wanted:
        if requirement.name in ("triton", "setuptools"):  # torch pins the one; the build takes any of the other
            continue
        (version,) = (clause.version for clause in pins[normal(requirement.name)].specifier)
        assert requirement.specifier.contains(version), f"{requirement} excludes the tested {version}"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_ruff_is_pinned_once():
    (pin,) = (text for text in project()["project"]["optional-dependencies"]["dev"] if text.startswith("ruff=="))
    assert f"rev: v{pin.removeprefix('ruff==')} " in (ROOT / ".pre-commit-config.yaml").read_text()
