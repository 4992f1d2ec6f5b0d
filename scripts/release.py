"""Release one package: version bump, changelog, tag name, wheel and sdist checked.

    nox -s release -- flagscale-hw minor            # a rehearsal on a copy; the tree stays as it is
    nox -s release -- flagscale-hw minor --write    # the same in the tree, then commit and tag (never pushes)

The tag is `<package>-v<version>`. A package whose new version another package's pin would refuse is not
released: the pin and its file are named instead.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "packages"


def say(text: str) -> None:
    print(text, flush=True)


def run(*argv: str, cwd: Path) -> str:
    """Run a tool and return what it printed; its own words are the error."""
    done = subprocess.run(argv, cwd=cwd, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"release: {' '.join(argv)} failed with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout.strip()


def refusing_pins(package: str, version: str) -> list[str]:
    """Pins of sibling packages that do not accept `version`, as `file: requirement`."""
    refused = []
    for path in sorted(PACKAGES.glob("*/pyproject.toml")):
        for text in tomllib.loads(path.read_text())["project"]["dependencies"]:
            requirement = Requirement(text)
            if requirement.name == package and not requirement.specifier.contains(version):
                refused.append(f"{path.relative_to(ROOT)}: {text}")
    return refused


def build_and_check(folder: Path, out: Path) -> list[Path]:
    run("uv", "build", "--quiet", "--out-dir", str(out), cwd=folder)
    built = sorted(path for path in out.iterdir() if path.suffix in {".whl", ".gz"})
    run("twine", "check", "--strict", *map(str, built), cwd=folder)
    run("check-wheel-contents", *(str(path) for path in built if path.suffix == ".whl"), cwd=folder)
    return built


def release(package: str, part: str, *, write: bool) -> None:
    """Do it in a copy, or in the tree when `write` is true."""
    folder = PACKAGES / package
    with tempfile.TemporaryDirectory(prefix="release-") as name:
        work = folder
        if not write:
            work = Path(name) / package
            shutil.copytree(folder, work)
        before = run("hatchling", "version", cwd=work)
        if write and run("git", "status", "--porcelain", cwd=ROOT):
            raise SystemExit("release: the tree has uncommitted changes: commit or stash them first")
        preview = Path(name) / "preview"
        shutil.copytree(folder, preview)
        run("hatchling", "version", part, cwd=preview)
        after = run("hatchling", "version", cwd=preview)
        if refused := refusing_pins(package, after):
            raise SystemExit(
                f"release: {package} {after} is refused by:\n  "
                + "\n  ".join(refused)
                + "\nchange these pins first"
            )
        run("hatchling", "version", part, cwd=work)
        tag = f"{package}-v{after}"
        say(f"{package}: {before} -> {after}, tag {tag}\n")
        say(run("towncrier", "build", "--draft", "--version", after, cwd=work) + "\n")
        run("towncrier", "build", "--yes", "--version", after, cwd=work) if write else None
        out = ROOT / "dist" / tag if write else Path(name) / "dist"
        for path in build_and_check(work, out):
            say(f"built and checked: {path.name} ({path.stat().st_size:,} bytes)")
        if write:
            run("git", "add", "--all", str(folder), cwd=ROOT)
            run("git", "commit", "--quiet", "-m", f"Release {package} {after}", cwd=ROOT)
            run("git", "tag", tag, cwd=ROOT)
            say(f"\ncommitted and tagged {tag}; to publish:")
            say(f"  git push origin HEAD {tag}\n  twine upload dist/{tag}/*")
        else:
            say("\nnothing was changed: add --write to release")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", choices=sorted(path.name for path in PACKAGES.iterdir()))
    parser.add_argument("part", help="major, minor, patch, or an exact version such as 0.2.0")
    parser.add_argument("--write", action="store_true", help="really do it (default: a rehearsal)")
    given = parser.parse_args()
    release(given.package, given.part, write=given.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
