"""Ask a served model, once or in a conversation, and stream what it says."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flagscale_serve.application import ENGINE as APPLICATION
from flagscale_serve.errors import InvalidService, NotServing, RequestFailed
from flagscale_serve.state import InstanceStatus, status_of, vllm_python
from flagscale_serve.targets import find_run

if TYPE_CHECKING:
    import httpx

__all__ = [
    "Conversation",
    "Server",
    "chat",
    "check_text",
    "find_server",
    "first_model",
    "key_of",
    "listed_model",
    "message_of",
]

_CONNECT_TIMEOUT_S = 10.0
_TOKEN_TIMEOUT_S = 600.0
_DONE = "[DONE]"


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where to ask."""

    url: str
    """Base address ending in `/v1`."""
    model: str | None
    """None: the first that the server lists."""
    has_chat_template: bool | None = None
    """None: not known."""
    engines: tuple[str, ...] = ()
    """What answers there; none: not known."""
    tokenizer: str | None = None
    """Directory of the tokenizer, where it is known."""
    python: str | None = None
    """Interpreter that runs a vLLM there, where it is known."""
    api_key: str | None = None
    """Its key, where this process started it and so knows."""
    run_dir: str | None = None
    """Where its run lives; None for an address."""

    @property
    def is_local(self) -> bool:
        """Whether it is this machine: no proxy of the environment must see, or break, a request to it."""
        return (urlsplit(self.url).hostname or "") in ("localhost", "127.0.0.1", "::1")


def chat(  # noqa: PLR0913 - what people set on a request
    target: str | None,
    message: str,
    *,
    system: str | None = None,
    complete: bool = False,
    overrides: Sequence[str] = (),
    model: str | None = None,
    max_tokens: int = 512,
    temperature: float | None = None,
    api_key: str | None = None,
) -> Iterator[str]:
    """Ask once and yield the answer piece by piece, as it is generated.

    Args:
        target: address of any OpenAI-compatible server, or what `find_run` takes.
        message: what to say; with `complete`, the text to go on from.
        system: instructions in front of the message.
        complete: continue plain text, without the model's chat template.
        overrides: Hydra overrides of a serve file.
        model: name or instance to ask when the target serves several.
        max_tokens: length of the answer at most, in tokens.
        temperature: 0 always takes the likeliest token; None leaves it to the server.
        api_key: the server's key; else `$OPENAI_API_KEY`.

    Raises:
        NotServing: nobody answers there, or not yet.
        InvalidService: the model has no chat template, or there is no text to send.
        RequestFailed: the server refused, or broke off.
    """
    check_text("message", message)
    if system is not None:
        check_text("system", system)
    server = find_server(target, model, overrides)
    if not complete:
        talk = Conversation(
            server, system=system, max_tokens=max_tokens, temperature=temperature, api_key=api_key
        )
        yield from talk.say(message)
        return
    if system is not None:
        raise InvalidService(
            "system: a plain completion has no system message: put it into the text, or leave out complete"
        )
    yield from _ask(server, _body({"prompt": message}, max_tokens, temperature), key_of(api_key))


def _body(question: dict[str, Any], max_tokens: int, temperature: float | None) -> dict[str, Any]:
    body = {**question, "max_tokens": max_tokens, "stream": True}
    return body if temperature is None else {**body, "temperature": temperature}


@dataclass
class Conversation:
    """Questions and answers that a model is sent again with each further question.

    Raises:
        InvalidService: the model has no chat template.
    """

    server: Server
    _: KW_ONLY
    system: str | None = None
    """Instructions in front of it; may change on the way."""
    max_tokens: int = 512
    """Length of each answer at most, in tokens."""
    temperature: float | None = None
    api_key: str | None = None
    """The server's key; else `$OPENAI_API_KEY`."""
    said: list[dict[str, str]] = field(default_factory=list)
    """What was said so far: messages with `role` and `content`, without the instructions."""

    def __post_init__(self) -> None:
        if self.server.has_chat_template is False:
            raise InvalidService(
                f"{self.server.model}: the model has no chat template: ask for a plain completion "
                "(--complete), or put a chat_template.jinja into its directory"
            )

    def say(self, message: str) -> Generator[str, None, None]:
        """Yield the answer piece by piece; one that is broken off is kept as far as it came.

        Raises:
            NotServing, InvalidService, RequestFailed: as `chat`; an unanswered question is not kept.
        """
        check_text("message", message)
        question = {"role": "user", "content": message}
        front = [{"role": "system", "content": self.system}] if self.system is not None else []
        body = _body({"messages": [*front, *self.said, question]}, self.max_tokens, self.temperature)
        pieces: list[str] = []
        try:
            for piece in _ask(self.server, body, key_of(self.api_key)):
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.said += [question, {"role": "assistant", "content": "".join(pieces)}]


def key_of(given: str | None) -> str | None:
    """Return the key that is given, else `$OPENAI_API_KEY`.

    Raises:
        InvalidService: it cannot stand in a header.
    """
    key = given or os.environ.get("OPENAI_API_KEY")
    if key and not (key.isascii() and key.isprintable()):
        raise InvalidService(
            "api_key: holds a line break or a letter that no key has: copy it again (--api-key, or "
            "$OPENAI_API_KEY)"
        )
    return key


def check_text(what: str, text: str) -> None:
    """Refuse what is no text to send.

    Raises:
        InvalidService: it is empty, or was no UTF-8 where it came from.
    """
    if not text.strip():
        raise InvalidService(f"{what}: nothing to say: give some text")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InvalidService(f"{what}: not UTF-8 text: write it in UTF-8")


def find_server(target: str | None, model: str | None = None, overrides: Sequence[str] = ()) -> Server:
    """Find the server that a target means.

    Raises:
        NotServing: there is none, it is not ready, or it serves several models and none was named.
        InvalidService: it is a composed application, or no address.
    """
    if target is not None and target.startswith(("http://", "https://")):
        base = target.rstrip("/")
        _check_address(base)
        return Server(url=base if base.endswith("/v1") else f"{base}/v1", model=model)
    run = find_run(target, overrides)
    now = status_of(run)
    ready = any(one.is_ready for one in now.instances)
    instance = _choose(now.instances, model) if ready else None
    if instance is None or not instance.is_ready:
        raise NotServing(
            f"{now.run_dir}: not ready: it is {now.state}{f' ({now.reason})' if now.reason else ''}"
        )
    if instance.engine == APPLICATION:
        raise InvalidService(
            f"{now.run_dir}: {instance.model}: a composed application, which is no language model: POST its "
            f"fields to {instance.url}"
        )
    if instance.url is None:
        raise NotServing(f"{now.run_dir}: the port of {instance.name} is not known")
    return Server(
        url=instance.url,
        model=instance.model,
        has_chat_template=instance.has_chat_template,
        engines=_engines(now.instances, instance),
        tokenizer=instance.tokenizer,
        python=vllm_python(run),
        run_dir=str(run.dir),
    )


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_one = bool(parts.hostname) and parts.port != 0  # reading the port is what refuses 99999
    except ValueError:
        is_one = False
    if not is_one:
        raise InvalidService(f"{url}: not an address: write it as http://HOST:PORT")


def _engines(instances: tuple[InstanceStatus, ...], door: InstanceStatus) -> tuple[str, ...]:
    """List the engines behind a door, which may be an engine itself."""
    behind = {one.engine for one in instances if one.behind == door.name}
    return tuple(sorted(behind or {door.engine}))


def _choose(instances: tuple[InstanceStatus, ...], model: str | None) -> InstanceStatus:
    doors = tuple(one for one in instances if one.behind is None)
    found = [one for one in doors if model in (None, one.model)]
    found = found or [one for one in instances if model == one.name]
    if len(found) == 1:
        return found[0]
    names = ", ".join(dict.fromkeys(one.model for one in doors))
    given = "several models are served" if model is None else f"model {model!r}: not served"
    raise NotServing(f"{given}: choose one of {names} with --model")


def _ask(server: Server, body: dict[str, Any], api_key: str | None) -> Iterator[str]:
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(_TOKEN_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
    try:
        with httpx.Client(headers=headers, timeout=timeout, trust_env=not server.is_local) as client:
            body["model"] = server.model or first_model(client, server.url)
            path = "completions" if "prompt" in body else "chat/completions"
            with client.stream("POST", f"{server.url}/{path}", json=body) as response:
                _check(response, server.url)
                yield from _pieces(response)
    except httpx.ConnectError as error:
        raise NotServing(f"{server.url}: nobody answers ({error}): is the server running?") from None
    except httpx.InvalidURL as error:
        raise InvalidService(f"{server.url}: not an address: {error}") from None
    except httpx.HTTPError as error:
        raise RequestFailed(f"{server.url}: the answer broke off: {error or type(error).__name__}") from None


def listed_model(server: Server, api_key: str | None) -> str:
    """Return the first model that a server lists; see `first_model`."""
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(
            headers=headers, timeout=_CONNECT_TIMEOUT_S, trust_env=not server.is_local
        ) as client:
            return first_model(client, server.url)
    except httpx.TransportError as error:
        raise NotServing(f"{server.url}: nobody answers ({error}): is the server running?") from None
    except httpx.InvalidURL as error:
        raise InvalidService(f"{server.url}: not an address: {error}") from None


def first_model(client: httpx.Client, url: str) -> str:
    """Return the first model that a server lists.

    Raises:
        NotServing: it lists none.
        RequestFailed: it refuses to tell.
    """
    response = client.get(f"{url}/models")
    _check(response, url)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise NotServing(f"{url}/models: it lists no model: name one with --model") from None


def _check(response: httpx.Response, url: str) -> None:
    if response.status_code == 200:
        return
    response.read()
    cure = "give the server's key with --api-key" if response.status_code == 401 else "see the server's log"
    raise RequestFailed(f"{url}: HTTP {response.status_code}: {message_of(response.text)}: {cure}")


def message_of(text: str) -> str:
    """Find the sentence for people in an error body."""
    try:
        found = json.loads(text)
    except ValueError:
        return text.strip()[:500] or "no explanation"
    for key in ("error", "detail", "message"):
        if isinstance(found, Mapping) and key in found:
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found)[:500]


def _pieces(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == _DONE:
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise RequestFailed(f"the server sent what is not JSON: {data[:200]}") from None
        if "error" in event:
            raise RequestFailed(f"the server broke off: {message_of(data)}")
        for choice in event.get("choices") or ():
            piece = choice.get("text") if "text" in choice else (choice.get("delta") or {}).get("content")
            if piece:
                yield piece
