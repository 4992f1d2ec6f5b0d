"""The repository keeps its own promises: licences, versions, pins and documents."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("config", "hw", "train", "serve", "convert")


def test_every_package_carries_the_same_licence() -> None:
    texts = {(ROOT / f"packages/flagscale-{p}/LICENSE").read_text() for p in PACKAGES}
    assert texts == {(ROOT / "LICENSE").read_text()}


@pytest.mark.parametrize("package", PACKAGES)
def test_pins_between_our_packages_accept_the_versions_in_the_tree(package: str) -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / f"packages/flagscale-{package}/pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        requirement = Requirement(text)
        if requirement.name.startswith("flagscale-"):
            about = (
                ROOT / f"packages/{requirement.name}/src/{requirement.name.replace('-', '_')}/__about__.py"
            )
            version = re.search(r'__version__ = "(.+)"', about.read_text())[1]
            assert requirement.specifier.contains(version), text


@pytest.mark.parametrize("name", ["README.md", "README_cn.md"])
def test_readme_shows_the_two_commands_that_ci_runs(name: str) -> None:
    start = 'python3 -m venv .venv && .venv/bin/pip install -q "nox[uv]" && .venv/bin/nox -s '
    text = (ROOT / name).read_text()
    assert start + "demo" in text
    assert start + "tests" in text
    assert start + "tests" in (ROOT / ".ci/run").read_text()


def test_ci_runs_every_session_that_engines_stands_for() -> None:
    (names,) = re.findall(
        r"def engines\(.*?for name in \((.*?)\):", (ROOT / "noxfile.py").read_text(), re.DOTALL
    )
    run = re.findall(r"nox -s ([\w ]+)", (ROOT / ".ci/run").read_text())
    sessions = {"tests", "chips", "demo", *re.findall(r"\w+", names)}
    assert len(sessions) > 5
    assert sessions - {name for words in run for name in words.split()} == set()


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("packages/*/README.md")), ids=str
)
def test_links_in_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


# What a machine looks like is hw's to say, further down.
CONTRACTS = sorted(path for path in ROOT.glob("schemas/*.json") if path.stem != "machine")


@pytest.mark.parametrize("path", CONTRACTS, ids=lambda path: path.stem)
def test_the_committed_schema_is_the_one_the_package_prints(path: Path) -> None:
    script = Path(sys.executable).parent / "flagscale-config"
    argv = [script, "schema", path.stem, "--check", path]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["README.md", "README_cn.md"])
def test_readme_links_every_recipe_and_nothing_that_is_not_there(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    missing = [link for link in links if not (ROOT / link).exists()]
    assert missing == []
    folders = [
        ROOT / f"packages/flagscale-{kind}/src/flagscale_{kind}/recipes" for kind in ("train", "serve")
    ]
    recipes = {str(path.relative_to(ROOT)) for folder in folders for path in folder.glob("*/conf/*.yaml")}
    assert len(recipes) > 60
    assert recipes == {link for link in links if "/recipes/" in link}


def test_the_schema_of_a_machine_is_published_as_the_package_prints_it() -> None:
    script = Path(sys.executable).parent / "flagscale-hw"
    done = subprocess.run([script, "schema"], capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "schemas/machine.json").read_text()


def test_the_workflow_runs_the_same_matrix_as_nox() -> None:
    import yaml

    from flagscale_hw import CHIPS

    (job,) = yaml.safe_load((ROOT / ".github/workflows/chips.yml").read_text())["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert set(matrix["package"]) == set(PACKAGES)
    assert matrix["chip"] == list(CHIPS)
    for package in PACKAGES:
        project = tomllib.loads((ROOT / f"packages/flagscale-{package}/pyproject.toml").read_text())[
            "project"
        ]
        least = project["requires-python"].removeprefix(">=")
        left_out = {one["python"] for one in matrix["exclude"] if one["package"] == package}
        assert left_out == {python for python in matrix["python"] if python < least}
    assert len(matrix["package"]) * len(matrix["chip"]) * len(matrix["python"]) <= 256, (
        "more than one run may have"
    )


def test_every_chip_has_golden_facts_and_no_golden_file_is_left_over() -> None:
    from flagscale_hw import CHIPS

    assert {path.stem for path in (ROOT / "tests/chips/golden").glob("*.json")} == set(CHIPS)
