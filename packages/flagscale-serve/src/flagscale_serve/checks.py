"""What is checked on this machine before a service starts: its models and their engines."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flagscale_serve.application import INSTALL, MODULES, Application
from flagscale_serve.engines import Engine, engine_named
from flagscale_serve.errors import EngineMissing, InvalidModel, InvalidService
from flagscale_serve.model import Model, read_gguf_model, read_model
from flagscale_serve.router import router_of
from flagscale_serve.service import Front, Instance, Service

__all__ = [
    "check_addresses",
    "check_disk",
    "check_engines",
    "check_models",
    "check_ray",
    "check_router",
    "has_modules",
]

_TIMEOUT_S = 60.0
_LEAST_FREE_BYTES = 64 << 20
_NIXL = ("nixl", "nixl_rocm")
"""vLLM takes the second on AMD's platform, the first on all others."""
_MOONCAKE = ("mooncake", "mooncake-transfer-engine")
_BACKENDS = {"mooncake": _MOONCAKE, "mooncake_tcp": _MOONCAKE, "nixl": ("nixl", "nixl")}
"""SGLang's transfer backends: the module that each needs, and the package that has it."""
# Finds without importing: an import of an engine takes seconds, and can fail for reasons of the machine. The
# folder that pip leaves tells the version in a third of the time that the import of importlib.metadata takes.
_LOOK = """
import importlib.util, json, os, sys
wanted = json.loads(sys.argv[1])
def version(name):
    for folder in sys.path:
        try:
            entries = os.listdir(folder or ".")
        except OSError:
            continue
        for entry in entries:
            begin, _, rest = entry.partition("-")
            if rest.endswith(".dist-info") and begin.replace("_", "-").lower() == name:
                return rest[:-len(".dist-info")]
    import importlib.metadata
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({
    "python": sys.version.split()[0],
    "missing": [name for name in wanted["modules"] if importlib.util.find_spec(name) is None],
    "versions": {name: version(name) for name in wanted["distributions"]},
}))
"""
# Head sizes for which vLLM has an attention kernel on CPUs; with another it starts, then dies at the first
# request.
_CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def check_models(service: Service, chip: str) -> tuple[Model, ...]:
    """Read the model of every instance.

    Raises:
        InvalidModel: one is not whole, or cannot run on this engine and chip.
    """
    models = []
    for instance in service.instances:
        model = _model_of(instance, service)
        if instance.engine == "vllm" and chip == "cpu":
            _check_head_dim(model)
        models.append(model)
    return tuple(models)


def _model_of(instance: Instance, service: Service) -> Model:
    if instance.engine == "llama_cpp":
        return read_gguf_model(Path(instance.model))
    options = instance.settled
    tokenizer = options.get("tokenizer") or options.get("tokenizer_path")
    return read_model(
        Path(instance.model),
        tokenizer=Path(service.cwd, tokenizer) if tokenizer else None,
        with_weights=options.get("load_format") != "dummy",
    )


def check_addresses(doors: Sequence[Instance | Front | Application]) -> None:
    """Make sure that this machine can listen on every host; an engine finds out after a minute.

    Raises:
        InvalidService: the host is no address of this machine, or a name that nobody knows.
    """
    for door in doors:
        try:
            family, kind, *_, address = socket.getaddrinfo(door.host, 0, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.bind(address)
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise InvalidService(
                    f"{door.name}: host {door.host}: not an address of this machine: use 127.0.0.1, "
                    "or 0.0.0.0 for every address it has"
                ) from error
            raise


def _check_head_dim(model: Model) -> None:
    if model.head_dim is not None and model.head_dim not in _CPU_HEAD_DIMS:
        raise InvalidModel(
            f"{model.path / 'config.json'}: head_dim: {model.head_dim}: vLLM on a CPU has attention for "
            f"{', '.join(map(str, _CPU_HEAD_DIMS))} only: use engine `transformers`"
        )


def check_engines(service: Service, python: str, chip: str) -> dict[str, str]:
    """Ask the Python that should run the engines whether it has them, and builds of them for this chip.

    Returns:
        Engine name -> its version.

    Raises:
        EngineMissing: that Python does not exist or lacks an engine, or what an engine needs to move keys and
            values, or has a build for CPUs where another chip is meant; says what to install.
    """
    engines = {name: engine_named(name) for name in sorted({one.engine for one in service.instances})}
    found = {
        name: _look((*service.shell, python), engine, service)
        if engine.program is None
        else _look_for_program(engine, service)
        for name, engine in engines.items()
    }
    parted = {one.engine: one for one in service.instances if one.role}
    if "vllm" in parted:
        _look_for_nixl(service, python)
    if "sglang" in parted:
        _look_for_backend(parted["sglang"], service, python)
    if chip != "cpu" and "cpu" in found.get("vllm", ""):
        # vLLM asks its own version which platform it is for, and would leave the devices idle without a word.
        raise EngineMissing(
            f"engine vllm: {python} has vllm {found['vllm']}, which is built for CPUs, and this machine has "
            f"{chip}: install the build for {chip} there, or name the Python that has it with --python"
        )
    return found


def _look_for_nixl(service: Service, python: str) -> None:
    """Without it vLLM says so only when it has loaded the model."""
    if len(_ask((*service.shell, python), service, _NIXL)["missing"]) == len(_NIXL):
        raise EngineMissing(
            f"prefill apart from decode: {python} has no `nixl`, by which vLLM moves keys and values: "
            "install it there with `pip install nixl`, or name the Python that has it with --python"
        )


def _look_for_backend(half: Instance, service: Service, python: str) -> None:
    """SGLang, too, says so only when it has loaded the model."""
    name = half.settled.get("disaggregation_transfer_backend") or "mooncake"
    module, package = _BACKENDS.get(str(name), ("", ""))
    if module and _ask((*service.shell, python), service, (module,))["missing"]:
        raise EngineMissing(
            f"prefill apart from decode: {python} has no `{module}`, by which SGLang moves keys and values: "
            f"install it there with `pip install {package}`, or name another "
            "engine_args_specific.sglang.disaggregation_transfer_backend"
        )


def check_router(service: Service, python: str) -> None:
    """Ask the Python that should run the routers of a service whether it has them.

    Raises:
        EngineMissing: it has not.
    """
    for router, front in {router_of(front, service.instances): front for front in service.fronts}.items():
        if _ask((python,), service, (router.module,))["missing"]:
            raise EngineMissing(
                f"{front.name}: several instances behind one address need a router, {router.distribution}, "
                f"which {python} does not have: install it there with `{router.install}`"
            )


def check_ray(application: Application, python: str) -> None:
    """Ask the Python that should run an application whether it has Ray Serve.

    Raises:
        EngineMissing: it has not.
    """
    found = _ask((*application.shell, python), application, MODULES)
    if found["missing"]:
        raise EngineMissing(
            f"{application.source}: a composed application runs on Ray Serve: {python} (Python "
            f"{found['python']}) has no {', '.join(found['missing'])}: install it there with `{INSTALL}`, or "
            "name the Python that has it with --python"
        )


def check_disk(folder: Path) -> None:
    """Make sure that logs and state can be written where a run will live.

    Raises:
        InvalidService: the file system is full, or nearly, or the directory holds other things than a run.
    """
    if folder.is_dir() and not (folder / "plan.json").exists() and any(folder.iterdir()):
        raise InvalidService(
            f"run directory {folder}: holds other files: give --run-dir a new or empty directory"
        )
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < _LEAST_FREE_BYTES:
        raise InvalidService(
            f"run directory {folder}: {free >> 20} MiB free: logs and state need "
            f"{_LEAST_FREE_BYTES >> 20} MiB: make room, or choose another place with --run-dir"
        )


def has_modules(python: str, modules: Sequence[str]) -> bool:
    """Tell whether an interpreter has some modules; one that is not there has none."""
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            (python, *_question(modules)),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
            env=env,
        )
        return not json.loads(done.stdout.strip().splitlines()[-1])["missing"]
    except (OSError, subprocess.SubprocessError, ValueError, LookupError):
        return False


def _look_for_program(engine: Engine, service: Service) -> str:
    program = str(engine.program)
    start = ("bash", "-c", f'{service.before_start}\nexec "$@"', "bash") if service.before_start else ()
    try:
        done = subprocess.run(
            (*start, program, "--version"),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            cwd=service.cwd,
            env={**os.environ, **service.env},
        )
        found = done.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        found = False
    if not found:
        raise EngineMissing(
            f"engine {engine.name}: no `{program}` that answers is on the PATH: install it "
            f"({engine.install}), or set experiment.envs.PATH"
        )
    lines = (done.stdout + done.stderr).split()
    return lines[lines.index("version:") + 1] if "version:" in lines[:-1] else "unknown"


def _look(start: Sequence[str], engine: Engine, service: Service) -> str:
    python = start[-1]
    found = _ask(start, service, engine.modules, engine.distributions)
    missing = found["missing"] + [name for name, version in found["versions"].items() if version is None]
    if missing:
        raise EngineMissing(
            f"engine {engine.name}: {python} (Python {found['python']}) has no "
            f"{', '.join(dict.fromkeys(missing))}: install it there with `{engine.install}`, or name the "
            "Python that has it with --python"
        )
    return str(next(iter(found["versions"].values()), "unknown"))


def _question(modules: Sequence[str], distributions: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the words behind an interpreter that let it say which of these it has."""
    return ("-c", _LOOK, json.dumps({"modules": list(modules), "distributions": list(distributions)}))


def _ask(
    start: Sequence[str],
    service: Service | Application,
    modules: Sequence[str],
    distributions: Sequence[str] = (),
) -> dict[str, Any]:
    """Ask the interpreter at the end of `start`, in the folder and environment of a service."""
    python = start[-1]
    try:
        done = subprocess.run(
            (*start, *_question(modules, distributions)),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            cwd=service.cwd,
            # A folder of the working directory must not pass for the engine; PYTHONPATH may well lead to it.
            env={**os.environ, **service.env, "PYTHONSAFEPATH": "1"},
        )
    except OSError as error:
        raise EngineMissing(
            f"python {python!r}: {error.strerror}: give --python the interpreter that has the engine"
        ) from None
    except subprocess.TimeoutExpired:
        raise EngineMissing(f"python {python!r}: no answer within {_TIMEOUT_S:g} s: try it by hand") from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise EngineMissing(
            f"python {python!r}: exit {done.returncode}, it said: {said}: give --python the interpreter "
            "that has the engine"
        ) from None
    return answer
