"""Old spellings rewritten to what is read today, in the files themselves; comments and layout stay.

What `check` notes as read differently is what is rewritten, so that the two cannot disagree. After it, the
files mean the same: the values are compared before anything is written.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import unified_diff
from os import PathLike
from pathlib import Path

import yaml

from flagscale_config.compose import compose
from flagscale_config.difference import diff
from flagscale_config.document import shown_path
from flagscale_config.errors import ConfigError, Origin, Problem
from flagscale_config.experiment_section import SHORTCUTS
from flagscale_config.facts import Fact, facts
from flagscale_config.loader import check, find
from flagscale_config.masking import masked_line
from flagscale_config.megatron import renamed_option
from flagscale_config.options import spelled
from flagscale_config.yaml_edit import Edit, Pair, Tree, applied

__all__ = ["Migrated", "migrate"]

_MAX_PASSES = 10
_REQUIRED = re.compile(r"\$\{\s*[\w.]+\s*:?\s*\?{2,3}\s*\}")
_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


@dataclass(frozen=True)
class Migrated:
    """One file that `migrate` changes."""

    path: Path
    before: str
    after: str
    changes: tuple[str, ...] = field(default=())
    """What is changed, in words, in the order in which it was."""

    @property
    def diff(self) -> str:
        """The change as a unified diff, secrets masked."""
        name = shown_path(self.path)
        lines = unified_diff(_masked(self.before), _masked(self.after), name, name, lineterm="")
        return "".join(f"{line}\n" for line in lines)


def _masked(text: str) -> list[str]:
    lines = text.splitlines()
    return [masked_line(lines, index) for index in range(len(lines))]


def migrate(source: str | PathLike[str], *, write: bool = False) -> tuple[Migrated, ...]:
    """Rewrite what older FlagScale versions spelled differently, in an experiment's files.

    Args:
        source: the experiment file.
        write: write the files; otherwise they are only returned.

    Returns:
        The files that change; empty when there is nothing to do.

    Raises:
        ConfigError: the files cannot be composed or written, or a key is given twice with different values;
            nothing has been written then.
    """
    path = find(source).absolute()
    composed = compose(path)
    files = tuple(dict.fromkeys(file.absolute() for file in composed.files))
    before = {file: file.read_bytes().decode("utf-8") for file in files}
    _refuse_contradictions(composed.problems, before)
    with tempfile.TemporaryDirectory(prefix="flagscale-migrate-") as name:
        copies = _Copies(Path(name).resolve(), path, before)
        changes = copies.migrate()
        after = copies.texts
    changed = tuple(
        Migrated(file, before[file], after[file], tuple(dict.fromkeys(changes[file])))
        for file in files
        if before[file] != after[file]
    )
    if write:
        _write(changed)
    return changed


def _refuse_contradictions(problems: Sequence[Problem], texts: Mapping[Path, str]) -> None:
    """Refuse files in which a key is given twice with different values.

    Raises:
        ConfigError: with every such key.
    """
    trees = {shown_path(file): Tree(text.removeprefix(_BOM)) for file, text in texts.items()}
    found = []
    for problem in problems:
        if problem.code == "config/duplicate-key" and problem.origin is not None:
            tree = trees[problem.origin.file]
            pair = tree.at(problem.origin.line, problem.origin.column)
            if pair is None or _remove_repetition(tree, pair, problem) is None:
                why = "the values differ, and only you know which is meant"
                found.append(replace(problem, message=f"{problem.message}: {why}"))
    if found:
        raise ConfigError(found)


class _Copies:
    """The files of an experiment in a directory of their own, where they can be tried."""

    def __init__(self, folder: Path, source: Path, texts: Mapping[Path, str]) -> None:
        self.folder = folder
        self.source = source
        self.texts = dict(texts)
        self.original = self._save(folder / "before")
        self.changed = self._save(folder / "after")

    def _copy(self, folder: Path, file: Path) -> Path:
        return folder / file.relative_to(self.source.parent)

    def _save(self, folder: Path) -> Path:
        """Write the texts as they are now and return the experiment file's copy."""
        for file, text in self.texts.items():
            copy = self._copy(folder, file)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(text.encode())
        return self._copy(folder, self.source)

    def migrate(self) -> Mapping[Path, list[str]]:
        """Change the texts until nothing is left to change; return what was done.

        Raises:
            ConfigError: the result would not mean the same.
        """
        changes: dict[Path, list[str]] = {file: [] for file in self.texts}
        for _ in range(_MAX_PASSES):
            is_done = True
            for file, found in self._edits().items():
                if found:
                    is_done = False
                    self.texts[file] = applied(self.texts[file], [edit for edit, _ in found])
                    changes[file] += [words for _, words in found]
            if is_done:
                break
            self._save(self.folder / "after")
        self._prove()
        return changes

    def _edits(self) -> Mapping[Path, list[tuple[Edit, str]]]:
        """Return what is to be changed in each file now."""
        problems = check(self.changed)
        known = facts(compose(self.changed))
        found = {}
        for file, text in self.texts.items():
            mark = _BOM if text.startswith(_BOM) else ""
            tree = Tree(text.removeprefix(mark))
            copy = str(self._copy(self.folder / "after", file))
            here = [problem for problem in problems if problem.origin and problem.origin.file == copy]
            edits = [*_noted(tree, here), *_by_text(tree)]
            edits += _by_option(tree, [fact for fact in known if fact.origin.file == copy])
            if file == self.source:
                edits += _by_place(tree)
            shift = len(mark)
            moved = [(Edit(e.start + shift, e.end + shift, e.text), words) for e, words in edits]
            found[file] = _disjoint(moved)
        return found

    def _prove(self) -> None:
        """Compare the values before and after.

        Raises:
            ConfigError: they differ.
        """
        ignored = {
            f"experiment.{name}" for name in (*SHORTCUTS, "shell_cmds", "runner.type", "runner.backend")
        }
        problems = check(self.original)
        gone = {spelled(item.key.rpartition(".")[2]) for item in problems if item.code == "config/dropped"}
        found = [
            each
            for each in diff(self.original, self.changed)
            if each.name not in ignored and spelled(each.name.rpartition(".")[2]) not in gone
        ]
        if found:
            names = ", ".join(each.name for each in found)
            message = f"cannot be migrated: {names} would change; migrate it by hand and report this"
            raise ConfigError(
                [Problem(code="config/migrate", message=message, origin=Origin(shown_path(self.source)))]
            )


def _disjoint(edits: Sequence[tuple[Edit, str]]) -> list[tuple[Edit, str]]:
    """Return edits that do not touch each other; the others follow in the next pass."""
    kept: list[tuple[Edit, str]] = []
    for edit, words in sorted(edits, key=lambda item: (item[0].start, item[0].end)):
        if not kept or edit.start > kept[-1][0].end:
            kept.append((edit, words))
    return kept


def _noted(tree: Tree, problems: Sequence[Problem]) -> Iterator[tuple[Edit, str]]:
    """Yield the edits for what `check` noted in a file."""
    for problem in problems:
        origin = problem.origin
        pair = tree.at(origin.line, origin.column) if origin is not None else None
        rule = _RULES.get(problem.code)
        edit = rule(tree, pair, problem) if rule is not None and pair is not None else None
        if edit is not None:
            yield edit, f"{problem.key}: {problem.message}"


def _rename(tree: Tree, pair: Pair, problem: Problem) -> Edit | None:
    return tree.renamed(pair, problem.suggestion) if problem.suggestion else None


def _replace_value(tree: Tree, pair: Pair, problem: Problem) -> Edit | None:
    is_plain = isinstance(pair.value, yaml.ScalarNode) and "${" not in pair.value.value
    return tree.valued(pair, problem.suggestion) if problem.suggestion and is_plain else None


def _null(tree: Tree, pair: Pair, _problem: Problem) -> Edit | None:
    is_word = isinstance(pair.value, yaml.ScalarNode) and pair.value.value == "None"
    return tree.valued(pair, "null") if is_word else None


def _remove(tree: Tree, pair: Pair, _problem: Problem) -> Edit | None:
    return tree.removed(pair)


def _remove_repetition(tree: Tree, pair: Pair, _problem: Problem) -> Edit | None:
    """Remove a key given again with the same value; with another one only the user knows which is meant."""
    first = next(value for key, value in pair.mapping.value if key.value == pair.key.value)
    is_same = first is not pair.value and yaml.serialize(first) == yaml.serialize(pair.value)
    return tree.removed(pair) if is_same else None


def _add_self(tree: Tree, pair: Pair, _problem: Problem) -> Edit | None:
    return tree.listed(pair, "_self_")


_RULES: dict[str, Callable[[Tree, Pair, Problem], Edit | None]] = {
    "config/dropped": _remove,
    "config/duplicate-key": _remove_repetition,
    "config/misread": _replace_value,
    "config/no-self": _add_self,
    "config/none-text": _null,
    "config/renamed": _rename,
    "config/renamed-value": _replace_value,
}


def _by_option(tree: Tree, known: Sequence[Fact]) -> Iterator[tuple[Edit, str]]:
    """Yield the edits for options under an old name, or with hyphens."""
    for fact in known:
        name = str(fact.path[-1])
        today = renamed_option(name) if fact.engine == "megatron" else spelled(name)
        pair = tree.at(fact.origin.line, fact.origin.column)
        if fact.option is not None and today != name and pair is not None and pair.path[-1] == name:
            yield tree.renamed(pair, today), f"{fact.key}: {name} is {today}"


def _by_text(tree: Tree) -> Iterator[tuple[Edit, str]]:
    """Yield the edits for references that OmegaConf does not know, wherever they stand."""
    for pair in tree.pairs:
        node = pair.value
        if not isinstance(node, yaml.ScalarNode) or "${" not in node.value or node.style in {"|", ">"}:
            continue
        written = tree.text[node.start_mark.index : node.end_mark.index]
        if _REQUIRED.fullmatch(node.value.strip()):
            is_flow = pair.is_flow
            yield (
                tree.valued(pair, "'???'" if is_flow else "???"),
                f"{written} is ???, required from the user",
            )
        elif "${env:" in written:
            new = written.replace("${env:", "${oc.env:")
            yield tree.valued(pair, new), "${env:X} is ${oc.env:X}"


def _by_place(tree: Tree) -> Iterator[tuple[Edit, str]]:
    """Yield the edits for keys of the experiment file that have another place, or none, today."""
    gone = tree.find("experiment", "shell_cmds")
    if gone is not None and isinstance(gone.value, yaml.ScalarNode) and gone.value.value in {"", "null", "~"}:
        yield tree.removed(gone), "experiment.shell_cmds: nothing reads it"
    for name in SHORTCUTS:
        pair = tree.find("experiment", name)
        if pair is not None and isinstance(pair.value, yaml.ScalarNode) and pair.value.value == "None":
            yield tree.valued(pair, "null"), f"experiment.{name}: None is null"
    kind = tree.find("experiment", "runner", "type")
    if kind is not None and getattr(kind.value, "value", None) == "torchrun":
        has_backend = tree.find("experiment", "runner", "backend") is not None
        edit = tree.removed(kind) if has_backend else tree.renamed(kind, "backend")
        yield edit, "experiment.runner.type: torchrun is a backend"
    yield from _deploy(tree)


def _deploy(tree: Tree) -> Iterator[tuple[Edit, str]]:
    """Yield the edits that move `experiment.deploy` into the runner's section."""
    deploy, runner = tree.find("experiment", "deploy"), tree.find("experiment", "runner")
    words = "experiment.deploy is experiment.runner.deploy"
    if deploy is None or tree.find("experiment", "runner", "deploy") is not None:
        return
    flow = yaml.serialize(deploy.value)
    braces = yaml.safe_dump(yaml.safe_load(flow), default_flow_style=True, width=10**6, sort_keys=False)
    one_line = f"deploy: {braces.strip()}"
    lines = one_line if deploy.is_flow else tree.block(deploy)
    if runner is None:
        new = f"runner: {{{one_line}}}" if deploy.is_flow else "runner:"
        if deploy.is_flow:
            yield Edit(deploy.key.start_mark.index, tree.removed(deploy).end, new), words
            return
        indent = " " * deploy.key.start_mark.column
        whole = tree.removed(deploy)
        inner = "".join(f"{indent}  {line}\n" for line in lines.split("\n"))
        yield Edit(whole.start, whole.end, f"{indent}{new}\n{inner}"), words
        return
    added = tree.appended(runner, lines, one_line)
    if added is not None:
        yield tree.removed(deploy), words
        yield added, words


def _write(changed: Sequence[Migrated]) -> None:
    """Write files whole or not at all: each beside its place first, then all of them moved there.

    Raises:
        ConfigError: a file cannot be written; all are as they were.
    """
    ready: list[tuple[Path, Path]] = []
    try:
        for each in changed:
            target = each.path.resolve()
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            ready.append((Path(name), target))
            with os.fdopen(handle, "wb") as opened:
                opened.write(each.after.encode())
            shutil.copymode(target, name)
        for temporary, target in ready:
            temporary.replace(target)
    except OSError as error:
        place = Origin(file=shown_path(Path(error.filename or changed[0].path)))
        message = f"cannot be written: {error.strerror}; nothing was changed"
        raise ConfigError([Problem(code="config/write", message=message, origin=place)]) from None
    finally:
        for temporary, _ in ready:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
