"""What checking a configuration costs, beside `hydra.compose` of the same files.

    python benchmarks/config.py [FILE_OR_FOLDER ...]     # in an environment with flagscale-config

Without arguments the recipes of the installed packages are taken. All in one warm process, interleaved, in
processor seconds of this process, so that a busy machine hurts all alike. Hydra is initialised for each
compose, as in a program that composes one file.
Bounds: load + validate 1.5 x hydra.compose (median); import 350 ms over an empty Python; 400 checks 10 s;
the wheel 2 MB (with `uv` at hand).
"""

from __future__ import annotations

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from flagscale_config import check, compose, document, recipes, resolve

ROUNDS = 5
IMPORTS = (
    "pass",
    "import flagscale_config",
    "import flagscale_config.cli",
    "from flagscale_config import load",  # with all that loading needs
    "import hydra; import omegaconf",
)
RATIO_BOUND, IMPORT_BOUND_S, CHECKS, CHECKS_BOUND_S, WHEEL_BOUND = 1.5, 0.35, 400, 10, 2_000_000
PACKAGE = Path(__file__).parent.parent / "packages/flagscale-config"


def composed_by_hydra(path: Path) -> None:
    with initialize_config_dir(version_base=None, config_dir=str(path.parent.absolute())):
        hydra_compose(path.stem)


def loads(path: Path) -> bool:
    """Whether Hydra can compose the file; the comparison is over those."""
    try:
        composed_by_hydra(path)
    except Exception:  # noqa: BLE001
        return False
    return True


STEPS: dict[str, Callable[[Path], object]] = {
    "hydra.compose": composed_by_hydra,
    "check (load + validate)": check,
    "  of it: read one file": document.read_document,
    "  of it: compose": compose.compose,
    "  of it: compose + resolve": lambda path: resolve.resolve(compose.compose(path)),
}


def files(arguments: list[str]) -> list[Path]:
    """Return the experiment files to take: those of a folder hold an `experiment` section."""
    if not arguments:
        return sorted(set(recipes().values()))
    found = []
    for argument in map(Path, arguments):
        found += sorted(argument.rglob("*.yaml")) if argument.is_dir() else [argument]
    return [path for path in found if "\nexperiment:" in "\n" + path.read_text(encoding="utf-8")]


def timed(call: Callable[[Path], object], path: Path) -> float:
    start = time.process_time()
    call(path)
    return time.process_time() - start


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def imports() -> list[str]:
    """Print what importing takes in a new process; return what is too slow."""
    best = dict.fromkeys(IMPORTS, float("inf"))
    for _ in range(ROUNDS):
        for words in IMPORTS:
            start = _seconds_of_children()
            subprocess.run([sys.executable, "-c", words], check=True)
            best[words] = min(best[words], _seconds_of_children() - start)
    for words, taken in best.items():
        over = (taken - best["pass"]) * 1000
        print(f"{words:34} {taken * 1000:7.0f} ms in a new process, {over:5.0f} ms over an empty one")
    return ["import"] if best["import flagscale_config"] - best["pass"] > IMPORT_BOUND_S else []


def composing(paths: list[Path]) -> list[str]:
    """Print what each step takes over the files; return what is too slow."""
    taken: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(ROUNDS):
        for path in paths:
            for name, call in STEPS.items():
                taken[name].append(timed(call, path))
    base = statistics.median(taken["hydra.compose"])
    for name, times in taken.items():
        middle = statistics.median(times)
        ratio = f"{middle / base:4.2f} x hydra.compose"
        print(f"{name:34} {middle * 1000:7.1f} ms median, {max(times) * 1000:6.1f} ms at most   {ratio}")
    worst = statistics.median(taken["check (load + validate)"]) / base
    return ["check"] if worst > RATIO_BOUND else []


def many(paths: list[Path]) -> list[str]:
    """Print what so many checks take in one process."""
    start = time.process_time()
    for index in range(CHECKS):
        check(paths[index % len(paths)])
    taken = time.process_time() - start
    print(f"{CHECKS} checks in one process {taken:12.2f} s   bound {CHECKS_BOUND_S} s")
    return ["many checks"] if taken > CHECKS_BOUND_S else []


def wheel() -> list[str]:
    """Print how large the wheel is."""
    uv = shutil.which("uv")
    if uv is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", folder, PACKAGE], check=True)
        size = next(Path(folder).glob("*.whl")).stat().st_size
    print(f"wheel {size / 1e6:29.2f} MB   bound {WHEEL_BOUND / 1e6:.0f} MB")
    return ["wheel"] if size > WHEEL_BOUND else []


def main() -> int:
    warnings.simplefilter("ignore")  # Hydra's, about a missing `_self_`
    given = files(sys.argv[1:])
    paths = [path for path in given if loads(path)]
    print(f"{len(paths)} files that Hydra can compose, of {len(given)}; {ROUNDS} rounds")
    if not paths:
        print("nothing to compare; name files, or install a package with recipes")
        return 2
    late = imports() + composing(paths) + many(paths) + wheel()
    print("within all bounds" if not late else f"too slow: {', '.join(late)}")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
