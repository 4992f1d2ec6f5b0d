"""The command `flagscale-train`: words in, calls of the library, text or JSON out."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale_config.command import parse
from flagscale_config.command import run as run_command
from flagscale_train.__about__ import __version__
from flagscale_train.errors import InvalidInput

if TYPE_CHECKING:
    import flagscale_hw as hw
    from flagscale_train.runs import TrainStatus

__all__ = ["main", "parser"]

_TARGET = "experiment file, recipe name or run directory"
_EXPERIMENT = "FlagScale experiment file, or a recipe name such as qwen3/tiny"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    return run_command(_dispatch, argv)


def _dispatch(words: list[str]) -> int:
    given = parse(parser(), words)
    action: Callable[[argparse.Namespace], int] = given.action
    return action(given)


def parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    root = argparse.ArgumentParser(
        prog="flagscale-train",
        description="Train language models with Megatron's own trainer, from FlagScale experiment files.",
        epilog="Exit codes: 0 done, 2 wrong input, 3 not found or not running, 4 failed, 130 interrupted.",
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"flagscale-train {__version__}")
    root.add_argument("--debug", action="store_true", help="show tracebacks")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_run_verbs(verbs)
    _add_look_verbs(verbs)
    _add_data_verbs(verbs)
    return root


def _verb(
    verbs: Any, name: str, action: Callable[[argparse.Namespace], int], about: str
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
    made.set_defaults(action=action)
    return made


def _experiment(verb: argparse.ArgumentParser, about: str) -> None:
    verb.add_argument("source", metavar="FILE", help=about)
    verb.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides in Hydra's grammar")


def _add_run_verbs(verbs: Any) -> None:
    verb = _verb(verbs, "plan", _plan, "Show what a run would start, and start nothing.")
    _experiment(verb, _EXPERIMENT)
    verb.add_argument("--json", action="store_true", help="print the plan as JSON")
    verb.add_argument(
        "--as",
        dest="form",
        choices=("text", "scripts", "slurm", "jobset", "lws"),
        default="text",
        help="print it as shell scripts, a Slurm batch script, or Kubernetes YAML",
    )
    _add_scheduler_options(verb)
    verb.add_argument("--image", help="container image, for Kubernetes")
    verb.add_argument(
        "--claim",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="volume claim and where it is mounted",
    )
    verb = _verb(
        verbs, "run", _run, "Train, and follow the training; the next run resumes from its checkpoints."
    )
    _experiment(verb, _EXPERIMENT)
    verb.add_argument(
        "--detach", action="store_true", help="return at once; the run goes on without this terminal"
    )
    verb.add_argument(
        "--on",
        choices=("hosts", "slurm"),
        default="hosts",
        help="submit it to Slurm (default: this host, or ssh)",
    )
    _add_scheduler_options(verb)
    verb = _verb(verbs, "stop", _stop, "End a run; it saves a checkpoint first if it can.")
    _experiment(verb, _TARGET)
    verb.add_argument(
        "--grace", type=float, metavar="SECONDS", help="kill what is left after so many seconds"
    )
    verb = _verb(verbs, "logits", _logits, "Compute fp32 logits of the newest whole checkpoint, by Megatron.")
    _experiment(verb, _EXPERIMENT)
    verb.add_argument("--tokens", type=Path, required=True, help="JSON: equally long lists of token ids")
    verb.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    verb.add_argument("--load", type=Path, metavar="DIR", help="other checkpoints than the experiment's own")


def _add_scheduler_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--chip", metavar="NAME", help="chip of a scheduler's hosts (default: as this host's)")
    verb.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="OPTION[=VALUE]",
        help="option of sbatch, such as partition=long; may be repeated",
    )


def _add_look_verbs(verbs: Any) -> None:
    verb = _verb(verbs, "status", _status, "Say how a run stands and what happened.")
    _experiment(verb, _TARGET)
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb = _verb(
        verbs,
        "logs",
        _logs,
        "Print what the processes of a run wrote, the first error of a failed one first.",
    )
    _experiment(verb, _TARGET)
    verb.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    verb = _verb(verbs, "report", _report_page, "Write one HTML page on a training, with its curves.")
    _experiment(verb, f"{_TARGET}; of an experiment all runs are shown as one curve")
    verb.add_argument("--output", type=Path, metavar="FILE", help="HTML file to write (default: beside it)")
    verb = _verb(verbs, "list", _list, "List the training runs of this machine.")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _add_data_verbs(verbs: Any) -> None:
    data = verbs.add_parser("data", help="Prepare data.", description="Prepare data.", allow_abbrev=False)
    verbs = data.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    verb = _verb(verbs, "tokenize", _tokenize, "Turn text into Megatron's .bin and .idx files.")
    _inputs(verb)
    verb.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="directory with tokenizer.json"
    )
    verb.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx"
    )
    verb.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that tokenize (default 1)"
    )
    end = verb.add_mutually_exclusive_group()
    end.add_argument("--eod", metavar="TOKEN", help="end of a document (default: the tokenizer's eos_token)")
    end.add_argument("--no-eod", action="store_true", help="do not mark the end of a document")
    verb = _verb(verbs, "inspect", _inspect, "Check that a dataset is whole, and say what is in it.")
    verb.add_argument("prefix", type=Path, metavar="PREFIX", help="path without .bin and .idx")
    verb.add_argument("--tokenizer", type=Path, metavar="DIR", help="show text, and check the ids against it")
    verb.add_argument("--count", action="store_true", help="read every id, for the highest and the ends")
    verb.add_argument("--check", action="store_true", help="compare both files with their checksums")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb = _verb(verbs, "merge", _merge, "Join datasets to one.")
    verb.add_argument("inputs", nargs="+", type=Path, metavar="PREFIX", help="paths without .bin and .idx")
    verb.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx"
    )
    verb.add_argument("--overwrite", action="store_true", help="replace what exists")
    verb = _verb(verbs, "train-tokenizer", _train_tokenizer, "Train a byte-level BPE tokenizer on text.")
    _inputs(verb)
    verb.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="tokens wanted, at least 258"
    )
    verb.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="tokenizer directory to write"
    )


def _inputs(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="text, JSONL or Parquet files, directories, patterns"
    )
    verb.add_argument(
        "--key", default="text", help="field of JSON lines or column that holds the text (default: text)"
    )
    verb.add_argument("--overwrite", action="store_true", help="replace what exists")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _plan(given: argparse.Namespace) -> int:
    from flagscale_train.runs import make_plan

    chip = None if given.form in {"text", "scripts"} and given.chip is None else _chip(given)
    planned = make_plan(given.source, given.overrides, chip=chip)
    _warn(planned.facts)
    if given.json:
        print(planned.to_json(), end="")
        return 0
    if given.form != "text":
        print(_rendered(planned, given), end="")
        return 0
    layout = planned.facts["layout"]
    hosts = f" on {len(planned.targets)} hosts" if planned.targets else ""
    print(f"{planned.name}: {layout['processes']} processes on {planned.facts['chip']}{hosts}")
    print("  " + ", ".join(f"{name} {layout[name]}" for name in ("data", "tensor", "pipeline", "context")))
    print(f"checkpoints\n  {planned.facts['checkpoints']}")
    for process in planned.processes:
        if planned.targets:
            print(f"host {process.host}")
        print("environment")
        for name, value in sorted(process.env.items()):
            print(f"  {name}={'***' if name in planned.secrets else value}")
        print(f"directory\n  {process.cwd}\ncommand")
        print("  " + _wrapped(process.argv))
    return 0


def _warn(facts: Mapping[str, Any]) -> None:
    for warning in facts["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def _chip(given: argparse.Namespace) -> str:
    import flagscale_hw as hw

    if given.chip is not None:
        if given.chip not in hw.CHIPS:
            raise InvalidInput(f"--chip: {given.chip}: must be one of {', '.join(sorted(hw.CHIPS))}")
        return str(given.chip)
    return hw.detect().chip


def _slurm_options(given: argparse.Namespace) -> dict[str, str | None]:
    split = (word.lstrip("-").partition("=") for word in given.slurm)
    return {name: value if equals else None for name, equals, value in split}


def _rendered(planned: hw.Plan, given: argparse.Namespace) -> str:
    import flagscale_hw as hw

    if given.form == "scripts":
        return "\n".join(hw.render_scripts(planned).values())
    if given.form == "slurm":
        return hw.render_slurm(
            planned, f"{planned.facts['experiment']['exp_dir']}/runs/NEW", _slurm_options(given)
        )
    if given.image is None:
        raise InvalidInput("--image: not given: name the container image of the pods")
    claims = dict(word.partition("=")[::2] for word in given.claim)
    resource = hw.runtime(planned.facts["chip"]).kubernetes_resource
    per_pod = planned.facts["layout"]["processes"] // len(planned.targets)
    pods = hw.Pods(image=given.image, claims=claims, resources={resource: per_pod} if resource else {})
    return hw.render_kubernetes(planned, given.form, pods)


def _wrapped(words: Sequence[str]) -> str:
    """Lay a command out with one option per line; it can be pasted into a shell as it is."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    return " \\\n    ".join(lines)


def _run(given: argparse.Namespace) -> int:
    from flagscale_train.runs import Slurm, finished, run, status
    from flagscale_train.watch import watch

    whole = finished(given.source, given.overrides)
    if whole is not None:
        print(f"trained to its last step already: {whole}")
        _next("go on", "the same command with a larger train.model.train_iters")
        _next_after(whole)
        return 0
    slurm = Slurm(chip=_chip(given), options=_slurm_options(given)) if given.on == "slurm" else None
    started = run(given.source, given.overrides, detach=given.detach, slurm=slurm)
    _warn(json.loads((started.dir / "plan.json").read_text(encoding="utf-8"))["facts"])
    if given.detach or slurm is not None:
        print(started.dir)
        where = shlex.quote(str(started.dir))
        _next("follow it", f"flagscale-train logs -f {where}", f"flagscale-train status {where}")
        return 0
    print(f"run {started.dir}", flush=True)
    try:
        watch(started, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("stopping; the run saves first (Ctrl-C again ends it at once)", file=sys.stderr, flush=True)
        _interrupted(started)
        _report(status(started))
        return 130
    return _report(status(started))


def _interrupted(started: Any) -> None:
    try:
        started.stop()
    except KeyboardInterrupt:
        started.stop(grace_s=0.0)


def _report(ended: TrainStatus) -> int:
    """Say how a run ended and what to do next; return its exit code."""
    checkpoint = ended.progress.checkpoint
    where = shlex.quote(str(ended.run_dir))
    if ended.run.state == "succeeded":
        if checkpoint is not None:
            _next_after(Path(checkpoint["path"]), f"flagscale-train status {where}")
        return 0
    if ended.run.state == "stopped":
        print(f"stopped after step {ended.progress.iteration}; the same command resumes")
        return 0
    print(f"error: the run {ended.run.state}: {ended.what_happened}", file=sys.stderr)
    for line in _cause_lines(ended):
        print(line, file=sys.stderr)
    print(f"see `flagscale-train logs {where}`; after mending it the same command resumes", file=sys.stderr)
    return ended.run.exit_code


def _cause_lines(ended: TrainStatus) -> list[str]:
    cause = ended.cause
    return [f"likely cause: {cause.likely}", f"what to do: {cause.advice}"] if cause else []


def _next_after(checkpoint: Path, *more: str) -> None:
    root = shlex.quote(str(checkpoint.parent))
    _next("next", f"flagscale-convert run {root} HF_DIR --to hf --tokenizer DIR", *more)


def _next(title: str, *commands: str) -> None:
    print(f"{title}:")
    for command in commands:
        print(f"  {command}")


def _stop(given: argparse.Namespace) -> int:
    from flagscale_train.runs import stop

    ended = stop(given.source, given.overrides, grace_s=given.grace)
    print(f"{ended.run.state} after step {ended.progress.iteration}: {ended.run_dir}")
    return 0 if ended.run.is_over else 4


def _status(given: argparse.Namespace) -> int:
    from flagscale_train.runs import status
    from flagscale_train.watch import step_line

    now = status(given.source, given.overrides)
    if given.json:
        _print_json(now.to_dict())
        return now.run.exit_code
    print(f"{now.name}: {now.run.state}: {now.run_dir}")
    for line in (now.what_happened, *_cause_lines(now), step_line(now.progress, is_over=now.run.is_over)):
        if line:
            print(f"  {line}")
    held_out, checkpoint = now.progress.validation, now.progress.checkpoint
    if held_out:
        print(f"  held-out loss {held_out['loss']:.4f} after step {held_out['iteration']}")
    if checkpoint:
        print(f"  last checkpoint {checkpoint['path']}{' (whole)' if checkpoint.get('verified') else ''}")
    for process in now.run.processes:
        host = "" if process.host == "local" else f" on {process.host}"
        cause = f": {process.cause}" if process.cause else ""
        print(f"  {process.name}: pid {process.pid or '-'}{host}, {process.fate}{cause}")
    return now.run.exit_code


def _logs(given: argparse.Namespace) -> int:
    from flagscale_train.runs import find, status

    found = find(given.source, given.overrides)
    has_many = len(found.folders()) > 1
    was_over = _first_error(status(found))
    for line in found.logs(follow=given.follow):
        print(f"{line.process}: {line.text}" if has_many else line.text, flush=given.follow)
    if given.follow and not was_over:
        _first_error(status(found))
    return 0


def _first_error(now: TrainStatus) -> bool:
    """Print what a failed run failed by, and return whether it did."""
    if now.run.state != "failed":
        return False
    lines = [f"first error: {now.what_happened}", *_cause_lines(now), "---"]
    print("\n".join(lines), flush=True)
    return True


def _list(given: argparse.Namespace) -> int:
    from flagscale_train.runs import list_runs

    found = list_runs()
    if given.json:
        _print_json([one.to_dict() for one in found])
        return 0
    if not found:
        print("no trainings are known on this machine", file=sys.stderr)
    for one in found:
        print(f"{one.run.state:<10} step {one.progress.iteration:>7}  {one.name:<24} {one.run_dir}")
    return 0


def _report_page(given: argparse.Namespace) -> int:
    from flagscale_train.report import report

    print(report(given.source, given.overrides, output=given.output))
    return 0


def _logits(given: argparse.Namespace) -> int:
    from flagscale_train.logits import compute_logits

    made = compute_logits(
        given.source, given.overrides, tokens=given.tokens, output=given.output, checkpoint=given.load
    )
    print(made)
    return 0


def _tokenize(given: argparse.Namespace) -> int:
    from flagscale_train.data import tokenize

    made = tokenize(
        given.inputs,
        given.output,
        tokenizer=given.tokenizer,
        key=given.key,
        workers=given.workers,
        eod=given.eod,
        append_eod=not given.no_eod,
        overwrite=given.overwrite,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if given.json:
        _print_json(asdict(made))
        return 0
    print(
        f"{made.prefix}.bin, {made.prefix}.idx: {made.num_documents:,} documents, {made.num_tokens:,} tokens "
        f"({made.num_bytes / made.num_tokens:.2f} bytes each), {made.dtype}"
        + (f", {made.num_empty:,} empty documents left out" if made.num_empty else "")
    )
    return 0


def _inspect(given: argparse.Namespace) -> int:
    from flagscale_train.data import inspect

    facts = inspect(given.prefix, tokenizer=given.tokenizer, count=given.count, check=given.check)
    if given.json:
        _print_json(asdict(facts))
        return 0
    mean = facts.num_tokens / max(1, facts.num_documents)
    print(f"{facts.prefix}: {facts.num_documents:,} documents, {facts.num_tokens:,} tokens, {facts.dtype}")
    print(f"  documents have {facts.shortest:,} to {facts.longest:,} tokens, {mean:,.1f} on average")
    if facts.num_sequences != facts.num_documents:
        print(f"  in {facts.num_sequences:,} sequences")
    if facts.max_token is not None:
        print(f"  highest id {facts.max_token:,}")
    if facts.num_eod is not None:
        print(f"  {facts.num_eod:,} ends of documents")
    if facts.made_by is not None:
        print(f"  made with {facts.made_by.tokenizer} ({facts.made_by.vocab_size:,} tokens)")
    if facts.is_checked:
        print("  both files have the checksums they were written with")
    if facts.text is not None:
        print(f"  begins: {json.dumps(facts.text, ensure_ascii=False)}")
    return 0


def _merge(given: argparse.Namespace) -> int:
    from flagscale_train.data import inspect, merge

    merge(given.inputs, given.output, overwrite=given.overwrite)
    facts = inspect(given.output)
    print(
        f"{facts.prefix}.bin, {facts.prefix}.idx: {facts.num_documents:,} documents, "
        f"{facts.num_tokens:,} tokens, {facts.dtype}"
    )
    return 0


def _train_tokenizer(given: argparse.Namespace) -> int:
    from flagscale_train.data import train_tokenizer

    made = train_tokenizer(
        given.inputs, given.output, vocab_size=given.vocab_size, key=given.key, overwrite=given.overwrite
    )
    if given.json:
        _print_json(asdict(made))
        return 0
    print(f"{made.directory}: {made.vocab_size:,} tokens, from {made.num_documents:,} documents")
    if made.vocab_size < given.vocab_size:
        print(f"the text is too small for {given.vocab_size:,} tokens", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
