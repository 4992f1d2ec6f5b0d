"""Chats to token ids and to which of them the assistant wrote, by the tokenizer's own chat template.

A file holds one chat per line, in OpenAI's shape (`messages` of `role` and `content`, perhaps `tools`) or in
ShareGPT's and FlagScale's (`conversations` of `from` and `value`, perhaps `system`). What does not live here:
how chats share a sequence (`packing.py`).

A template that marks answers by `{% generation %}` is believed. Of any other an answer is what stands between
the template's invitation to answer (`add_generation_prompt`) and the text it writes after every answer, which
counts as part of it: that is where the model must learn to stop.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_train.worker.refusal import Refusal

__all__ = ["Chats", "Renderer", "messages_of"]

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
"""Roles of ShareGPT's shape, and what OpenAI calls them."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "flagscale answer"
_FORMAT = 1
"""Raised when the same chats would be rendered otherwise, so that older caches are passed over."""


def messages_of(record: Any) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Return the messages of one line in OpenAI's shape, and the tools it offers the assistant.

    Raises:
        ValueError: it is no chat; the text says why.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{type(record).__name__}: an object with messages or conversations is expected")  # noqa: TRY004 -- one error for all that is no chat
    tools = record.get("tools")
    if isinstance(record.get("messages"), list):
        messages = [_openai(message) for message in record["messages"]]
    elif isinstance(record.get("conversations"), list):
        messages = [_sharegpt(turn) for turn in record["conversations"]]
        if record.get("system"):
            messages.insert(0, {"role": "system", "content": str(record["system"])})
    else:
        has = ", ".join(sorted(map(str, record))[:10])
        raise ValueError(f"has neither messages nor conversations (it has: {has})")  # noqa: TRY004 -- as above
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("has no answer of an assistant: there is nothing to learn from it")
    return messages, tools if isinstance(tools, list) and tools else None


def _openai(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {message!r:.60}: an object with role and content is expected")  # noqa: TRY004 -- one error for all that is no chat
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("content: only parts of type text are read")
        content = "".join(parts)  # type: ignore[arg-type]
    if not isinstance(content, str) and not message.get("tool_calls"):
        raise ValueError(f"content: {type(content).__name__}: a text is expected")
    return {**message, "content": content or ""}


def _sharegpt(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise ValueError(f"turn {turn!r:.60}: an object with from and value is expected")  # noqa: TRY004 -- one error for all that is no chat
    role = _ROLES.get(str(turn.get("from")).lower())
    if role is None:
        raise ValueError(f"from: {turn.get('from')}: must be one of {', '.join(_ROLES)}")
    return {"role": role, "content": turn["value"]}


class Renderer:
    """Renders chats by one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer of transformers.

        Raises:
            Refusal: it has no chat template, or cannot say which characters a token stands for.
        """
        name = tokenizer.name_or_path
        if not tokenizer.is_fast:
            raise Refusal(f"tokenizer_model: {name}: has no tokenizer.json, which chats need")
        if not isinstance(tokenizer.chat_template, str):
            raise Refusal(
                f"tokenizer_model: {name}: has no chat template: take the tokenizer of a chat model"
            )
        self._tokenizer = tokenizer
        self._is_marked = _GENERATION.search(tokenizer.chat_template) is not None
        self._end = "" if self._is_marked else self._end_of_answer()

    def _text(self, messages: list[dict[str, Any]], tools: Any = None, *, invite: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=invite
            )
        )

    def _end_of_answer(self) -> str:
        """Return what the template writes after every answer, the last or not: `<|im_end|>` and the like."""
        user = {"role": "user", "content": "flagscale question"}
        chat = [user, {"role": "assistant", "content": _PROBE}]
        after = [self._text(each).rpartition(_PROBE)[2] for each in (chat, [*chat, user])]
        end = after[0][: _shared(*after)].strip()
        if not end:
            raise Refusal(
                f"tokenizer_model: {self._tokenizer.name_or_path}: its chat template writes nothing after an "
                "answer, so that the model could not learn to stop: mark the answers by {% generation %}"
            )
        return end

    def encode(self, record: Any) -> tuple[list[int], list[bool]]:
        """Render one chat.

        Args:
            record: a line of a file, parsed.

        Returns:
            The token ids, and which of them the assistant wrote.

        Raises:
            ValueError: it is no chat, or the template does not let answers be told apart.
        """
        from jinja2.exceptions import TemplateError

        messages, tools = messages_of(record)
        try:
            return self._marked(messages, tools) if self._is_marked else self._found(messages, tools)
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template refuses it: {error}") from None

    def _marked(self, messages: list[dict[str, Any]], tools: Any) -> tuple[list[int], list[bool]]:
        if any(message.get("weight") == 0 for message in messages):
            raise ValueError("weight: 0: cannot be followed where the template marks answers itself")
        out = self._tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(out["input_ids"]), [bool(mark) for mark in out["assistant_masks"]]

    def _found(self, messages: list[dict[str, Any]], tools: Any) -> tuple[list[int], list[bool]]:
        text = self._text(messages, tools)
        # As the template wrote it: it has named the special tokens itself.
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        is_answer = np.zeros(len(text) + 1, dtype=bool)
        for first, last in self._answers(messages, tools, text):
            is_answer[first:last] = True
        offsets = encoded["offset_mapping"]
        return list(encoded["input_ids"]), [bool(is_answer[first:last].any()) for first, last in offsets]

    def _answers(self, messages: list[dict[str, Any]], tools: Any, text: str) -> Iterator[tuple[int, int]]:
        """Yield where each answer begins and ends in the text of the whole chat."""
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            if index == 0:
                raise ValueError("begins with an answer: a question is expected before it")
            before = self._text(messages[:index], tools)
            # What the template invites with may hold more than an answer has, such as an opened thought.
            first = _shared(self._text(messages[:index], tools, invite=True), text)
            last = text.find(self._end, first)
            if not text.startswith(before) or first < len(before) or last < 0:
                raise ValueError(
                    f"message {index + 1}: the chat template writes what stands before this answer otherwise "
                    "once more follows, so that the answer cannot be told apart: split the chat, or mark the "
                    "answers by {% generation %} in the template"
                )
            yield first, last + len(self._end)


def _shared(one: str, other: str) -> int:
    """Return how many characters two texts have in common from their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class Chats:
    """Rendered chats of one file, as arrays that are mapped and not read."""

    tokens: np.ndarray
    """Ids of all chats, one chat after another, int32."""
    answers: np.ndarray
    """Which of them the assistant wrote, bool."""
    ends: np.ndarray
    """Where each chat ends, int64, with a 0 before them."""

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        place = slice(self.ends[index], self.ends[index + 1])
        return self.tokens[place], self.answers[place]

    @classmethod
    def whole(cls, folder: Path) -> Chats | None:
        """Map what `render` wrote; None if it is not there."""
        if not folder.is_dir():
            return None
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__annotations__})

    @classmethod
    def render(cls, path: Path, renderer: Renderer, folder: Path) -> None:
        """Render a file into `folder`, which appears only when it is whole.

        Args:
            path: JSON lines, one chat on each.
            renderer: by which they are rendered.
            folder: as `cache_folder` names it.

        Raises:
            Refusal: a line is no chat, or the folder cannot be written.
        """
        tokens: list[np.ndarray] = []
        answers: list[np.ndarray] = []
        for ids, is_answer in _encoded(path, renderer):
            tokens.append(np.array(ids, dtype=np.int32))
            answers.append(np.array(is_answer, dtype=bool))
        if not tokens:
            raise Refusal(f"data_path: {path}: holds no chat")
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            partial.mkdir(parents=True)
            np.save(partial / "tokens.npy", np.concatenate(tokens))
            np.save(partial / "answers.npy", np.concatenate(answers))
            np.save(partial / "ends.npy", np.cumsum([0, *map(len, tokens)], dtype=np.int64))
            partial.rename(folder)
        except OSError as error:
            if folder.is_dir():
                return  # another process was faster, with the same content
            raise Refusal(
                f"{folder}: {error.strerror}: name a folder to write to by data_cache_path"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @staticmethod
    def cache_folder(path: Path, tokenizer: Any, root: Path) -> Path:
        """Name the folder of a rendered file below `root`, by the content of file and tokenizer."""
        content = hashlib.sha256(f"{_FORMAT}\0{tokenizer.chat_template}\0".encode())
        content.update(tokenizer.backend_tokenizer.to_str().encode())
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                content.update(piece)
        return root / f"chats-{content.hexdigest()[:32]}"


def _encoded(path: Path, renderer: Renderer) -> Iterator[tuple[list[int], list[bool]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield renderer.encode(json.loads(line))
                except ValueError as error:
                    raise Refusal(f"{path}:{number}: {error}") from None
