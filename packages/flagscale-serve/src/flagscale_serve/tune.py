"""Search the engine's options for the highest goodput under an SLO.

Every combination of the given values is a trial: the service is started with it, loaded, and stopped; the
first trial changes nothing. Three things spare time. What `plan` refuses, because the weights or an option do
not fit, is never started. A quarter of the load comes first, and the rest only where that was within 80 % of
the best quarter so far. And every trial is a line of a journal, so that a search that was broken off goes on
where it was.

What does not live here: making and counting the load (`bench`), what fits (`fit.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flagscale_serve.bench import Measured, Workload, bench, profile_of
from flagscale_serve.errors import InvalidService, ServeError
from flagscale_serve.runs import Options, check, prepare, start, wait_ready
from flagscale_serve.targets import file_words

__all__ = ["Trial", "Tuned", "parse_space", "tune"]

_PROMISING = 0.8
_FIRST_PART = 4
_JOURNAL, _BEST = "tune.jsonl", "best.yaml"

Fate = Literal["measured", "stopped early", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One combination of options, and what it gave."""

    options: Mapping[str, Any]
    """`engine_args` that differ from the file's."""
    fate: Fate
    goodput: float = 0.0
    """Requests per second within the SLO; of the first part of the load where it was stopped early."""
    output_tokens_per_s: float = 0.0
    first_goodput: float = 0.0
    """Of the first part of the load."""
    reason: str = ""
    """Why it was refused or failed."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A whole search."""

    trials: tuple[Trial, ...]
    folder: Path
    kept: int = 0
    """Trials of an earlier call."""

    @property
    def best(self) -> Trial | None:
        """The trial of the highest goodput; the earlier one of equals. None when nothing was measured."""
        measured = [one for one in self.trials if one.fate == "measured"]
        return max(measured, key=lambda one: one.goodput, default=None)

    @property
    def file(self) -> Path:
        """The FlagScale file of the best trial."""
        return self.folder / _BEST

    def to_dict(self) -> dict[str, Any]:
        """Render as plain JSON."""
        return {
            "best": None if self.best is None else asdict(self.best),
            "file": str(self.file),
            "kept": self.kept,
            "trials": [asdict(one) for one in self.trials],
        }


def parse_space(words: Sequence[str]) -> dict[str, list[Any]]:
    """Read `max_num_seqs=64,128` into the values to try: numbers, true, false, null, else text.

    Raises:
        InvalidService: a word is not of this form, or an option stands twice.
    """
    space: dict[str, list[Any]] = {}
    for word in words:
        name, _, values = word.partition("=")
        name = name.replace("-", "_")
        if not name.isidentifier() or not all(part.strip() for part in values.split(",")):
            raise InvalidService(f"try: {word!r}: write OPTION=VALUE,VALUE, such as max_num_seqs=64,128")
        if name in space:
            raise InvalidService(f"try: {name}: given twice: give all its values at once")
        space[name] = [_value(part.strip()) for part in values.split(",")]
    if not space:
        raise InvalidService("try: nothing to try: give at least one OPTION=VALUE,VALUE")
    return space


def tune(  # noqa: PLR0913 - what people set on a search
    target: str,
    overrides: Sequence[str] = (),
    *,
    space: Mapping[str, Sequence[Any]],
    folder: Path,
    workload: Workload | None = None,
    slo: Mapping[str, float] | None = None,
    options: Options | None = None,
    generator: str | None = None,
    tell: Callable[[Trial], None] | None = None,
) -> Tuned:
    """Try every combination on the first instance of a serve file, and write the best one as a file.

    Args:
        target: serve file or recipe; a model directory becomes a file of one instance.
        overrides: Hydra overrides of the file.
        space: option of `engine_args` -> values to try.
        folder: takes the journal and the best file; an earlier journal of the same search is gone on with.
        workload: the load of each trial; None: the file's profile, where it has one.
        slo: bound -> seconds.
        options: how to start.
        generator: what makes the load; see `bench`.
        tell: called after each trial.

    Raises:
        InvalidService: the folder holds another search, or nothing could be measured.
    """
    search = _Search(
        target=_as_file(target, folder),
        overrides=file_words(overrides) if Path(target).is_dir() else tuple(overrides),
        folder=folder,
        workload=workload or profile_of(target, overrides),
        slo=dict(slo or {}),
        wish=options or Options(),
        generator=generator,
        tell=tell or (lambda _trial: None),
    )
    done = search.run(space)
    if done.best is None:
        reasons = "; ".join(dict.fromkeys(one.reason for one in done.trials if one.reason))
        raise InvalidService(f"tune: no trial could be measured: {reasons}")
    search.write_best(done.best)
    return done


@dataclass(kw_only=True)
class _Search:
    """One search: what stays the same over its trials."""

    target: str
    overrides: tuple[str, ...]
    folder: Path
    workload: Workload
    slo: Mapping[str, float]
    wish: Options
    generator: str | None
    tell: Callable[[Trial], None]
    trials: list[Trial] = field(default_factory=list)

    def run(self, space: Mapping[str, Sequence[Any]]) -> Tuned:
        self.trials = list(self._resume())
        kept = len(self.trials)
        known = [dict(one.options) for one in self.trials]
        for combination in ({}, *_combinations(space)):
            if combination not in known:
                self._note(self._try(combination))
        return Tuned(trials=tuple(self.trials), folder=self.folder, kept=kept)

    def _said(self, combination: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the overrides that a combination is."""
        more = (f"++serve.0.engine_args.{name}={json.dumps(value)}" for name, value in combination.items())
        return (*self.overrides, *more)

    def _try(self, combination: Mapping[str, Any]) -> Trial:
        from flagscale_config import ConfigError

        try:
            prepared = prepare(self.target, self._said(combination), self.wish)
            check(prepared)
        except (ServeError, ConfigError) as error:
            if not combination:
                raise  # the file itself is wrong: nothing that follows could be better
            return Trial(options=combination, fate="refused", reason=str(error))
        run = start(prepared, detach=False)
        try:
            wait_ready(run)
            return self._measure(str(run.dir), combination, prepared.api_key)
        except ServeError as error:
            return Trial(options=combination, fate="failed", reason=str(error))
        finally:
            run.stop()

    def _measure(self, target: str, combination: Mapping[str, Any], api_key: str | None) -> Trial:
        part = replace(self.workload, num_requests=max(1, self.workload.num_requests // _FIRST_PART))
        first = self._load(target, part, api_key)
        best = max((one.first_goodput for one in self.trials if one.fate == "measured"), default=0.0)
        is_promising = first.goodput(self.slo) >= _PROMISING * best
        rest = replace(self.workload, num_warmups=0, seed=1)
        whole = self._load(target, rest, api_key) if is_promising else first
        return Trial(
            options=combination,
            fate="measured" if is_promising else "stopped early",
            goodput=whole.goodput(self.slo),
            output_tokens_per_s=whole.output_tokens_per_s,
            first_goodput=first.goodput(self.slo),
        )

    def _load(self, target: str, workload: Workload, api_key: str | None) -> Measured:
        done = bench(
            target,
            workload=workload,
            concurrencies=(workload.concurrency,),
            slo=self.slo,
            generator=self.generator,
            python=self.wish.python,
            api_key=api_key,
        )
        return done.levels[0]

    # -- the journal ----------------------------------------------------------------------------------------

    def _question(self) -> str:
        """Tell searches apart whose trials must not be mixed."""
        text = Path(self.target).read_text(encoding="utf-8") if Path(self.target).is_file() else ""
        said = [self.target, text, self.overrides, asdict(self.workload), self.slo, self.wish.engine]
        return hashlib.sha256(json.dumps([*said, self.generator], sort_keys=True).encode()).hexdigest()[:16]

    def _resume(self) -> Iterator[Trial]:
        journal = self.folder / _JOURNAL
        question = self._question()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not journal.exists():
                journal.write_text(json.dumps({"search": question}) + "\n", encoding="utf-8")
                return
            head, *lines = journal.read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise InvalidService(
                f"out: {self.folder}: {error.strerror}: choose a folder that can be written"
            ) from None
        if _parsed(head).get("search") != question:
            raise InvalidService(f"out: {journal}: of another search: choose another folder, or remove it")
        # A killed search may leave half a line; its trial is made again.
        whole = [_parsed(line) for line in lines if _parsed(line)]
        journal.write_text(
            "".join(json.dumps(one) + "\n" for one in ({"search": question}, *whole)), encoding="utf-8"
        )
        yield from (Trial(**one) for one in whole)

    def _note(self, trial: Trial) -> None:
        self.trials.append(trial)
        with (self.folder / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(asdict(trial)) + "\n")
        self.tell(trial)

    def write_best(self, best: Trial) -> None:
        """Write the file of a trial, composed, its references to the environment kept as they are."""
        from omegaconf import OmegaConf

        from flagscale_config.compose import compose
        from flagscale_config.loader import find

        config = compose(find(self.target, "serve"), self._said(best.options)).config
        text = OmegaConf.to_yaml(config, resolve=False)
        head = (
            f"# The best of {len(self.trials)} trials by flagscale-serve tune: "
            f"{best.goodput:.2f} requests/s{' within the SLO' if self.slo else ''}.\n"
            "defaults: [_self_]\n"
        )
        (self.folder / _BEST).write_text(head + text, encoding="utf-8")


def _combinations(space: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*space.values()):
        yield dict(zip(space, values, strict=True))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _parsed(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _as_file(target: str, folder: Path) -> str:
    """Write a serve file for a plain model directory; a file and a recipe are one already."""
    if not Path(target).is_dir():
        return target
    file = folder / "tuned.yaml"
    content = {
        "defaults": ["_self_"],
        "experiment": {
            "exp_name": "tuned",
            "exp_dir": str(folder.absolute()),
            "task": {"type": "serve"},
        },
        "serve": [{"serve_id": "model", "engine_args": {"model": str(Path(target).absolute())}}],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")  # JSON is YAML
    except OSError as error:
        raise InvalidService(
            f"out: {folder}: {error.strerror}: choose a folder that can be written"
        ) from None
    return str(file)
