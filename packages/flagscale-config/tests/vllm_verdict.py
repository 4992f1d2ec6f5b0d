"""What vLLM says of command lines, behind a pipe; run by the Python that has vLLM.

Each line read, a list of words, is answered by the refusal of the server's parser, of its own checks and of
the engine's configuration, or by null. No model is loaded and no device is needed: where vLLM asks for the
kind of device while it checks a layout, it is told CUDA and as many devices as it wants.
"""

import json
import os
import sys
import types

os.environ.update(VLLM_LOGGING_LEVEL="CRITICAL", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")


class Pretended:
    """The platform as it is, but for what the checks of layouts ask it."""

    def __init__(self, platform):
        self._platform = platform

    def __getattr__(self, name):
        said = {"is_cuda": True, "is_cuda_alike": True}
        if name in said:
            return lambda: said[name]
        return (lambda: 1 << 20) if name == "device_count" else getattr(self._platform, name)


def parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    made = FlexibleArgumentParser()
    made.set_defaults(subparser="serve")

    def refuse(message):
        raise ValueError(message)

    made.error = refuse
    return make_arg_parser(made)


def verdict(made, words):
    """Return why vLLM would not start with these words, None where it would."""
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.usage.usage_lib import UsageContext

    try:
        args = made.parse_args(words)
        args.model = getattr(args, "model_tag", None) or args.model
        validate_parsed_serve_args(args)
        _check_modes(args)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
        config.validate_block_size()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever vLLM raises is its answer
        return f"{type(error).__name__}: {error}"
    return None


def _check_modes(args):
    """Let `vllm serve` itself choose how it starts, up to the start."""
    from vllm.entrypoints.cli import serve

    quiet = types.SimpleNamespace(run=lambda coroutine: coroutine.close())
    names = ("run_headless", "run_multi_api_server", "run_dp_supervisor")
    before = {name: getattr(serve, name) for name in names}
    loop, counted = serve.uvloop, args.api_server_count
    try:
        serve.uvloop = quiet
        for name in names:
            setattr(serve, name, lambda args: None)
        serve.ServeSubcommand.cmd(args)
    finally:
        serve.uvloop = loop
        args.api_server_count = counted
        for name, function in before.items():
            setattr(serve, name, function)


def main():
    out, sys.stdout = sys.stdout, sys.stderr  # vLLM greets
    from vllm.config import parallel

    made = parser()
    parallel.current_platform = Pretended(parallel.current_platform)
    for line in sys.stdin:
        out.write(json.dumps(verdict(made, json.loads(line))) + "\n")
        out.flush()


main()
