"""Answer a file of requests: JSON lines in, JSON lines out, in the order of the input.

Each input line is `{"prompt": ...}`, `{"messages": [...]}`, or a line of an OpenAI batch file
(`{"custom_id": ..., "body": {...}}`); further keys are options of the request. Each output line has the
number of its input line (`index`, from 0), and either `text`, `finish_reason`, `usage` or `error`.

A line is written when its answer is there, so a run that was killed goes on where it was: lines with an
answer are kept, the others are asked again. When all have been asked, the file is put in order.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from flagscale_serve.chat import Server, check_text, find_server, key_of, listed_model, message_of
from flagscale_serve.errors import InvalidService, NotServing
from flagscale_serve.runs import Options, check, prepare, start, wait_ready

if TYPE_CHECKING:
    import httpx

__all__ = ["Progress", "Sampling", "generate"]

_TRIES = 4
_BUSY = (429, 502, 503, 504)
_ASK_TIMEOUT_S = 3600.0
_CONNECT_TIMEOUT_S = 10.0
_PATHS = {"prompt": "completions", "messages": "chat/completions"}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What holds for every request that does not say otherwise itself."""

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    system: str | None = None
    """Instructions in front of every conversation that has none."""


@dataclass(kw_only=True)
class Progress:
    """How far it has come."""

    total: int
    done: int = 0
    """Lines that have an answer, those of an earlier run included."""
    kept: int = 0
    """Of these, lines of an earlier run."""
    failed: int = 0
    tokens: int = 0
    """Generated in this run."""
    began: float = field(default_factory=time.monotonic)

    @property
    def tokens_per_s(self) -> float:
        """Rate of this run."""
        return self.tokens / max(1e-9, time.monotonic() - self.began)

    def to_dict(self) -> dict[str, Any]:
        """Render as plain JSON."""
        counts = {name: getattr(self, name) for name in ("total", "done", "kept", "failed", "tokens")}
        return {**counts, "tokens_per_s": round(self.tokens_per_s, 3)}


def generate(  # noqa: PLR0913 - what people set on a batch
    target: str | None,
    source: Path,
    output: Path,
    *,
    overrides: tuple[str, ...] = (),
    options: Options | None = None,
    model: str | None = None,
    sampling: Sampling | None = None,
    concurrency: int = 64,
    api_key: str | None = None,
    tell: Callable[[Progress], None] | None = None,
) -> Progress:
    """Answer every line of a file.

    Args:
        target: address of any OpenAI-compatible server, or what `find_run` takes. A serve file, recipe or
            model that is not being served is served for as long as this takes.
        source: file of requests.
        output: file of answers; an earlier one is completed.
        overrides: Hydra overrides of a serve file.
        options: how to start a service.
        model: which of several served models.
        sampling: what holds for every request.
        concurrency: requests under way at a time.
        api_key: the server's key; else `$OPENAI_API_KEY`.
        tell: called after each line.

    Returns:
        How it ended; `failed` lines have an `error` in the output.

    Raises:
        InvalidService: the input cannot be read, or the output cannot be written.
        NotServing: nobody answers, or nobody does any more; what has been answered is in the output.
    """
    if concurrency < 1:
        raise InvalidService(f"concurrency: {concurrency}: at least 1 request at a time is needed: raise it")
    if output.exists() and source.exists() and output.samefile(source):
        raise InvalidService(f"output: {output}: is the input itself: choose another file")
    settings = sampling or Sampling()
    if settings.system is not None:
        check_text("system", settings.system)
    lines = _read(source)
    digests = {number: _digest(text, settings, model) for number, text in lines.items()}
    kept = _keep(output, digests)
    progress = Progress(total=len(lines), done=len(kept), kept=len(kept))
    with ExitStack() as during:
        todo = {number: text for number, text in lines.items() if number not in kept}
        if todo:
            server = _server(target, overrides, options, model, during)
            file = during.enter_context(_opened(output))
            batch = _Batch(
                server=server,
                settings=settings,
                key=key_of(api_key or server.api_key),
                digests=digests,
                file=file,
                progress=progress,
                tell=tell or _silent,
            )
            batch.run(todo, concurrency)
    _put_in_order(output)
    return progress


def _silent(_progress: Progress) -> None:
    pass


def _read(source: Path) -> dict[int, str]:
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InvalidService(
            f"input: {source}: {reason}: give a file with one JSON object per line"
        ) from None
    found = {number: line for number, line in enumerate(text.split("\n")) if line.strip()}
    if not found:
        raise InvalidService(f"input: {source}: no line in it: give one JSON object per line")
    return found


def _digest(text: str, settings: Sampling, model: str | None) -> str:
    """Tell requests apart, so that an answer is kept only for the very same request."""
    said = json.dumps([text.strip(), vars(settings), model], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _keep(output: Path, wanted: Mapping[int, str]) -> set[int]:
    """Find the lines of an earlier output that are answers to these requests, and drop all others."""
    if not output.exists():
        return set()
    good: dict[int, str] = {}
    for line in _whole_lines(output):
        answer = _object(line)
        number = answer.get("index") if answer else None
        if answer and isinstance(number, int) and answer.get("request") == wanted.get(number):
            if "error" not in answer:
                good[number] = line
        elif answer is None or "request" not in answer:
            raise InvalidService(
                f"output: {output}: holds lines that this command did not write: choose another file"
            )
    _replace(output, (good[number] for number in sorted(good)))
    return set(good)


def _whole_lines(path: Path) -> Iterator[str]:
    """Yield the lines that were written to their end; a killed process may leave half a line."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.endswith("\n"):
                    yield line.rstrip("\n")
    except OSError as error:
        raise InvalidService(f"output: {path}: {error.strerror}: choose a file that can be written") from None


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _replace(path: Path, lines: Iterator[str]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        beside.replace(path)
    except OSError as error:
        raise InvalidService(f"output: {path}: {error.strerror}: choose a file that can be written") from None


def _put_in_order(output: Path) -> None:
    found = {}
    for line in _whole_lines(output):
        answer = _object(line)
        if answer is not None:
            found[int(answer["index"])] = line
    _replace(output, (found[number] for number in sorted(found)))


def _opened(output: Path) -> IO[str]:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return output.open("a", encoding="utf-8")
    except OSError as error:
        raise InvalidService(
            f"output: {output}: {error.strerror}: choose a file that can be written"
        ) from None


def _server(
    target: str | None,
    overrides: tuple[str, ...],
    options: Options | None,
    model: str | None,
    during: ExitStack,
) -> Server:
    """Find the server, or start one that ends with this call."""
    is_address = target is not None and target.startswith(("http://", "https://"))
    try:
        return find_server(target, model, overrides)
    except NotServing:
        if target is None or is_address or (Path(target) / "plan.json").is_file():
            raise
    prepared = prepare(target, overrides, options)
    check(prepared)
    run = start(prepared, detach=False)
    during.callback(run.stop)
    wait_ready(run)
    return replace(find_server(str(run.dir), model), api_key=prepared.api_key)


@dataclass(kw_only=True)
class _Batch:
    """Requests under way, and the file that their answers go to."""

    server: Server
    settings: Sampling
    key: str | None
    digests: Mapping[int, str]
    file: IO[str]
    progress: Progress
    tell: Callable[[Progress], None]
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self, todo: Mapping[int, str], concurrency: int) -> None:
        import httpx

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        timeout = httpx.Timeout(_ASK_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S, pool=None)
        with httpx.Client(
            headers=headers, timeout=timeout, limits=limits, trust_env=not self.server.is_local
        ) as client:
            name = self.server.model or listed_model(self.server, self.key)
            waiting = iter(todo.items())
            with ThreadPoolExecutor(max_workers=concurrency) as pool:
                try:
                    self._drive(pool, waiting, client, name, concurrency)
                finally:
                    self.is_over.set()
                    pool.shutdown(cancel_futures=True)

    def _drive(
        self,
        pool: ThreadPoolExecutor,
        waiting: Iterator[tuple[int, str]],
        client: httpx.Client,
        name: str,
        concurrency: int,
    ) -> None:
        """Keep as many requests under way as wanted, however long the file is."""
        under_way: set[Future[dict[str, Any]]] = set()
        while True:
            while len(under_way) < concurrency and (item := next(waiting, None)) is not None:
                under_way.add(pool.submit(self._answer, client, name, *item))
            if not under_way:
                return
            finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in finished:
                self._write(future.result())

    def _write(self, answer: dict[str, Any]) -> None:
        self.file.write(json.dumps(answer, ensure_ascii=False) + "\n")
        self.file.flush()
        if "error" in answer:
            self.progress.failed += 1
        else:
            self.progress.done += 1
            self.progress.tokens += int((answer.get("usage") or {}).get("completion_tokens") or 0)
        self.tell(self.progress)

    def _answer(self, client: httpx.Client, name: str, number: int, text: str) -> dict[str, Any]:
        """Answer one line; what is wrong with it becomes its answer."""
        answer: dict[str, Any] = {"index": number, "request": self.digests[number]}
        request = _object(text)
        if request is None:
            return {**answer, "error": "not a JSON object"}
        if "custom_id" in request:
            answer["custom_id"] = request["custom_id"]
        try:
            path, body = self._body(request, name)
        except ValueError as error:
            return {**answer, "error": str(error)}
        return {**answer, **self._ask(client, path, body)}

    def _body(self, request: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
        """Return where to ask and what.

        Raises:
            ValueError: the line says neither or both.
        """
        given = request.get("body", request)
        if not isinstance(given, dict):
            raise ValueError("`body` must be a JSON object")  # noqa: TRY004 - a mistake of the line
        body = {key: value for key, value in given.items() if key != "custom_id"}
        kinds = [kind for kind in _PATHS if kind in body]
        if len(kinds) != 1:
            raise ValueError("one of `prompt` and `messages` is needed")
        if body.get("stream"):
            raise ValueError("`stream` makes no sense here: remove it")
        settings = self.settings
        for key in ("max_tokens", "temperature", "seed"):
            value = getattr(settings, key)
            if value is not None:
                body.setdefault(key, value)
        if settings.system is not None and kinds == ["messages"]:
            said = body["messages"]
            if not any(one.get("role") == "system" for one in said if isinstance(one, dict)):
                body["messages"] = [{"role": "system", "content": settings.system}, *said]
        body.setdefault("model", name)
        return _PATHS[kinds[0]], body

    def _ask(self, client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask, several times where the server is busy.

        Raises:
            NotServing: nobody is there any more.
        """
        for attempt in range(_TRIES):
            answer, is_final = self._try(client, path, body)
            if is_final or attempt == _TRIES - 1:
                break
            if self.is_over.wait(0.5 * 2**attempt):
                return {"error": "interrupted"}
        if "nobody" in answer:
            raise NotServing(
                f"{self.server.url}: nobody answers any more ({answer['nobody']}): what was answered is "
                "kept: start the server again, then this command"
            )
        return answer

    def _try(self, client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Ask once; returns the answer and whether asking again is pointless."""
        import httpx

        try:
            response = client.post(f"{self.server.url}/{path}", json=body)
        except httpx.ConnectError as error:
            return {"nobody": str(error)}, False
        except httpx.TransportError as error:
            return {"error": f"the answer broke off: {error or type(error).__name__}"}, False
        if response.status_code == 200:
            return _result(response.text), True
        refused = {"error": f"HTTP {response.status_code}: {message_of(response.text)}"}
        return refused, response.status_code not in _BUSY


def _result(text: str) -> dict[str, Any]:
    body = _object(text)
    try:
        if body is None:
            raise KeyError
        choice = body["choices"][0]
        message = choice.get("message")
        said = choice["text"] if message is None else message.get("content")
    except (LookupError, TypeError, AttributeError):
        return {"error": f"not an answer: {text[:200]}"}
    found = {"text": said, "finish_reason": choice.get("finish_reason"), "usage": body.get("usage")}
    if len(body["choices"]) > 1 or (message is not None and set(message) - {"role", "content"}):
        found["choices"] = body["choices"]  # several answers, tool calls, reasoning: nothing gets lost
    return found
