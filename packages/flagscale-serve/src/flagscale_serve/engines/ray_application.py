"""Serve a graph of the user's classes on a Ray of its own; placed in the run directory by the plan.

Usage: ray_application.py GRAPH.json HOST PORT

`POST` of a JSON object asks the graph. `GET` says `{"ready": true}` once every class has been made, and which
fields a request has; a class that is still being made makes it wait. It runs in the engine's environment:
standard library, Ray Serve and what that needs.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import json
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Optional

__all__ = ["main"]

_TYPES = {
    "str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict, "Any": Any,
    "List": list, "Dict": dict, "Optional": Optional,
}  # fmt: skip


def type_of(text: str) -> Any:
    """Read a type, of which the plan knows that it is names of types and brackets only."""
    return eval(text, {"__builtins__": {}}, dict(_TYPES))  # noqa: S307


class Worker:
    """One class of the user's, made once for each replica."""

    def __init__(self, module: str, class_name: str) -> None:
        """Import its file, whose neighbours it may import."""
        sys.path.insert(0, str(Path(module).parent))
        spec = importlib.util.spec_from_file_location(Path(module).stem, module)
        if spec is None or spec.loader is None:
            raise ImportError(f"{module}: not a Python file")
        found = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found
        spec.loader.exec_module(found)
        self.made = getattr(found, class_name)()
        self.turn = asyncio.Lock()

    async def forward(self, *values: Any, **fields: Any) -> Any:
        """Answer one request."""
        if inspect.iscoroutinefunction(self.made.forward):
            return await self.made.forward(*values, **fields)
        async with self.turn:  # such code is seldom made for several at a time
            return await asyncio.to_thread(self.made.forward, *values, **fields)

    async def is_made(self) -> bool:
        """Answer at all."""
        return True


class Door:
    """Takes requests and asks the classes, each once for a request."""

    def __init__(self, request: list[dict[str, Any]], depends: dict[str, list[str]], **workers: Any) -> None:
        """Remember the graph."""
        from pydantic import ConfigDict, create_model

        fields: dict[str, Any] = {
            one["arg"]: (type_of(one["type"]), ... if one["required"] else one["default"]) for one in request
        }
        config = ConfigDict(extra="allow" if not request else "forbid")
        self.model = create_model("Request", __config__=config, **fields)
        self.request, self.depends, self.workers = request, depends, workers
        called = {name for names in depends.values() for name in names}
        self.last = next(name for name in depends if name not in called)

    async def __call__(self, http: Any) -> Any:
        """Answer one HTTP request."""
        from pydantic import ValidationError

        response = importlib.import_module("starlette.responses").JSONResponse

        def refuse(status: int, text: str, kind: str) -> Any:
            error = {"message": text, "type": kind, "code": status}
            return response({"error": error}, status_code=status)

        if http.method == "GET":
            await asyncio.gather(*(worker.is_made.remote() for worker in self.workers.values()))
            return {"ready": True, "request": self.request}
        if http.method != "POST":
            return refuse(405, f"{http.method}: POST a JSON object", "invalid_request_error")
        try:
            asked = self.model.model_validate_json(await http.body()).model_dump()
        except ValidationError as error:
            told = [f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in error.errors()]
            return refuse(400, "; ".join(told), "invalid_request_error")
        try:
            return await self.answer(asked)
        except Exception as error:  # noqa: BLE001 - whatever the user's class raises
            cause = getattr(error, "cause", None) or error
            return refuse(500, f"{type(cause).__name__}: {cause}", "internal_error")

    async def answer(self, asked: dict[str, Any]) -> Any:
        """Ask every class once, those that do not wait for each other at the same time."""
        tasks: dict[str, asyncio.Task[Any]] = {}

        async def ask(name: str) -> Any:
            worker = self.workers[name]
            if not self.depends[name]:
                return await worker.forward.remote(**asked)
            values = await asyncio.gather(*(begun(one) for one in self.depends[name]))
            return await worker.forward.remote(*values)

        def begun(name: str) -> asyncio.Task[Any]:
            if name not in tasks:
                tasks[name] = asyncio.ensure_future(ask(name))
            return tasks[name]

        return await begun(self.last)


def options_of(step: dict[str, Any]) -> dict[str, Any]:
    """Say in Ray Serve's words what a class needs."""
    # No part of the processors is booked: else a graph larger than the machine would wait for ever.
    options: dict[str, Any] = {"name": step["name"], "ray_actor_options": {"num_cpus": 0}}
    if step["num_gpus"]:
        options["ray_actor_options"]["num_gpus"] = step["num_gpus"]
    if step["max_ongoing_requests"] is not None:
        options["max_ongoing_requests"] = step["max_ongoing_requests"]
    if step["scaling"]:
        options["autoscaling_config"] = step["scaling"]
    else:
        options["num_replicas"] = step["num_replicas"]
    return options


def begin(ray: Any, folder: str, num_gpus: int) -> None:
    """Start a Ray of our own; it gives its processes 30 s, which is too little on a busy machine."""
    for is_last in (False, False, True):
        try:
            # `local`: a cluster that happens to run here is somebody else's.
            ray.init(address="local", include_dashboard=False, num_gpus=num_gpus or None, _temp_dir=folder)
        except Exception as error:
            if is_last:
                raise
            print(f"Ray did not start, once more: {error}", flush=True)  # noqa: T201 - the log
            ray.shutdown()
        else:
            return


def main() -> None:
    """Serve until told to end."""
    ray, serve = importlib.import_module("ray"), importlib.import_module("ray.serve")
    graph, host, port = (
        json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")),
        sys.argv[2],
        int(sys.argv[3]),
    )
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    # A short path: Ray puts sockets there, whose paths may have 107 characters.
    folder = tempfile.mkdtemp(prefix="ray-")
    try:
        begin(ray, folder, graph["num_gpus"])
        # Again: Ray has put a handler of its own there, which aborts after three seconds.
        signal.signal(signal.SIGTERM, lambda *_: told.set())
        serve.start(http_options={"host": host, "port": port})
        workers = {
            step["name"]: serve.deployment(Worker)
            .options(**options_of(step))
            .bind(step["module"], step["class_name"])
            for step in graph["steps"]
        }
        door = serve.deployment(Door).options(
            name="Door", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000
        )
        depends = {step["name"]: step["depends"] for step in graph["steps"]}
        serve.run(
            door.bind(graph["request"], depends, **workers),
            name=graph["name"],
            route_prefix=graph["route"],
        )
        told.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
