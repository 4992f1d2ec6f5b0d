"""Start `transformers serve` with the name and the manners that clients expect; placed by the plan.

Usage: transformers_launch.py MODEL_DIR SERVED_NAME [OPTIONS OF `transformers serve`]

The server knows a model only by what it was started with (a path, seen in every answer), lists in
`/v1/models` only what lies in the Hugging Face cache, and fails there when that folder is missing. So the run
gets a cache of its own (`HF_HOME`) in which the model has its name.

Left alone, it also answers mistakes as FastAPI does, and computes whatever it is sent: one prompt of some MiB
keeps it from everybody for minutes. So errors get OpenAI's form, and what is longer than the model's context
is refused. It runs in the engine's environment: standard library, transformers and what serves it.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]

_REVISION = "0" * 40
_LARGEST_BYTES = 64 << 20
"""Of any body; pictures and sound come to tens of MiB."""
_BYTES_PER_TOKEN, _BYTES_BESIDE = 32, 1 << 20
"""Hardly any token is longer; the rest of a body is roles, options and tools."""


class TooLong(ValueError):
    """A prompt that leaves the model no place for a token."""


def name_model(model: Path, name: str) -> None:
    """Give the model its name in the cache of this run."""
    entry = Path(os.environ["HF_HOME"]) / "hub" / f"models--{name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True, exist_ok=True)
    (entry / "refs" / "main").write_text(_REVISION, encoding="ascii")
    (entry / "snapshots").mkdir(exist_ok=True)
    link = entry / "snapshots" / _REVISION
    # A restarted instance finds the link of its first start.
    link.unlink(missing_ok=True)
    link.symlink_to(model, target_is_directory=True)


def largest_body(model: Path) -> int:
    """Return how many bytes a request may have: of a model of text alone, what its context can hold."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or any(key.endswith("_config") for key in config):
        return _LARGEST_BYTES  # pictures and sound are described by a configuration of their own
    return min(_LARGEST_BYTES, _BYTES_BESIDE + _BYTES_PER_TOKEN * positions)


def bound_prompts() -> None:
    """Refuse to generate where the prompt fills the context; see `TooLong`."""
    mixin = importlib.import_module("transformers").GenerationMixin
    plain = mixin.generate

    def generate(self: Any, inputs: Any = None, **options: Any) -> Any:
        ids = options.get("input_ids", inputs)
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if ids is not None and isinstance(positions, int) and ids.shape[-1] >= positions:
            raise TooLong(
                f"This model's maximum context length is {positions} tokens. However, the prompt has "
                f"{ids.shape[-1]} tokens."
            )
        return plain(self, inputs, **options)

    mixin.generate = generate


def mend_answers(largest: int) -> None:
    """Let whatever app uvicorn is given answer mistakes in OpenAI's form, and bound its requests' bodies."""
    uvicorn = importlib.import_module("uvicorn")
    plain = uvicorn.Config.__init__

    def begin(self: Any, app: Any, **options: Any) -> None:
        refuse_in_form(app)
        app.add_middleware(Bounded, largest=largest)
        plain(self, app, **options)

    uvicorn.Config.__init__ = begin


def answer(status: int, message: str) -> Any:
    """Say in OpenAI's form what went wrong."""
    response = importlib.import_module("starlette.responses").JSONResponse
    kind = "invalid_request_error" if status < 500 else "internal_error"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return response({"error": error}, status_code=status)


def refuse_in_form(app: Any) -> None:
    """Register what answers an error."""
    exceptions = importlib.import_module("starlette.exceptions")
    validation = importlib.import_module("fastapi.exceptions").RequestValidationError

    async def refused(_request: Any, error: Any) -> Any:
        # Here 422 is a field that the server does not know; OpenAI says 400 to every bad request.
        status = 400 if error.status_code == 422 else error.status_code
        return answer(status, str(error.detail))

    async def misread(_request: Any, error: Any) -> Any:
        told = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        return answer(400, "; ".join(told))

    async def too_long(_request: Any, error: Exception) -> Any:
        return answer(400, str(error))

    async def failed(_request: Any, error: Exception) -> Any:
        return answer(500, f"{type(error).__name__}: {error}")

    app.add_exception_handler(exceptions.HTTPException, refused)
    app.add_exception_handler(validation, misread)
    app.add_exception_handler(TooLong, too_long)
    app.add_exception_handler(Exception, failed)


class Bounded:
    """Ends the reading of a body that is too large, whether its length is told before or not."""

    def __init__(self, app: Any, *, largest: int) -> None:
        """Stand in front of an app."""
        self.app, self.largest = app, largest
        self.refusal = answer(413, f"The body has more than {largest} bytes, all that this model can use.")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass one request on."""
        told = int(dict(scope.get("headers", ())).get(b"content-length", b"0"))
        if told > self.largest:
            await self.refusal(scope, receive, send)
            return
        taken = 0

        async def counted() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return message if taken <= self.largest else {"type": "http.disconnect"}

        async def unless_refused(message: Any) -> None:
            if taken <= self.largest:
                await send(message)

        await self.app(scope, counted, unless_refused)
        if taken > self.largest:
            await self.refusal(scope, receive, send)


def main() -> None:
    """Name the model, then become the server."""
    model, name = Path(sys.argv[1]), sys.argv[2]
    name_model(model, name)
    bound_prompts()
    mend_answers(largest_body(model))
    sys.argv = ["transformers", "serve", name, *sys.argv[3:]]
    runpy.run_module("transformers.cli.transformers", run_name="__main__")


if __name__ == "__main__":
    main()
