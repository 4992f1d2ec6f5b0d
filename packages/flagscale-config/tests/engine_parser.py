"""An engine's own parser behind a pipe; run by the Python that has the engine.

The first line written says what the parser knows: a list of options. Then each line read, a list of words,
is answered by what the parser makes of it, or by its refusal.
"""

import argparse
import importlib
import json
import sys


def megatron():
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return parser


def vllm():
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for home in ("common", "launchers", "openai"):
        try:
            module = importlib.import_module(f"vllm.entrypoints.{home}.cli_args")
        except ModuleNotFoundError:
            continue
        return module.make_arg_parser(FlexibleArgumentParser())
    raise SystemExit("this vLLM keeps its parser elsewhere")


def sglang():
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    for action in parser._actions:
        action.required = False  # the model, which is not in every example
    return parser


def described(action):
    flags = [flag for flag in action.option_strings if flag.startswith("--")]
    choices = None if action.choices is None else [str(getattr(c, "name", c)) for c in action.choices]
    return {"flags": flags, "dest": action.dest, "nargs": action.nargs, "choices": choices}


def main():
    out, sys.stdout = sys.stdout, sys.stderr  # engines greet
    parser = {"megatron": megatron, "vllm": vllm, "sglang": sglang}[sys.argv[1]]()

    def refuse(message):
        raise ValueError(message)

    parser.error = refuse
    out.write(json.dumps([described(action) for action in parser._actions if action.option_strings]) + "\n")
    out.flush()
    for line in sys.stdin:
        try:
            answer = vars(parser.parse_args(json.loads(line)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever an engine raises is its answer
            answer = {"refused": str(error)}
        out.write(json.dumps(answer, default=str) + "\n")
        out.flush()


main()
