# ruff: noqa: INP001, S101 - scripts beside each other, run by hand on one engine version; a surprise must stop them.
"""Extract the options of llama.cpp's server from the sources of its parser.

    pip download llama-cpp-python==0.3.36 --no-deps --no-binary :all: && tar xzf llama_cpp_python-*.tar.gz
    python extract_llama_cpp.py llama_cpp_python-0.3.36/vendor/llama.cpp 0c1e57098 llama_cpp.json

`common/arg.cpp` makes each option with one `add_opt(common_arg(...))`: its flags, its handler (whose
parameters say what it takes) and the programs that have it. `tools/server/README.md` is written by
llama.cpp's own `llama-gen-docs` from the running parser: it gives help and defaults, and the script stops
when the flags in it are not those found in the source.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import option_file

_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_COMMENT = re.compile(r'("(?:[^"\\]|\\.)*")|//[^\n]*')
_ROW = re.compile(r"^\| `(?P<flags>-.*?)` \| (?P<help>.*) \|$", re.MULTILINE)
_TOGGLE = ["on", "off", "auto"]
# Programs in a shell, not options of a server.
_ACTIONS = {"help", "version", "cache_list", "completion_bash", "list_devices", "license"}


def _blocks(source: str) -> list[str]:
    """Return the text of each `add_opt(...)` call, up to its closing parenthesis."""
    found = []
    for start in re.finditer(r"^\s+add_opt\(", source, re.MULTILINE):
        depth, position = 1, start.end()
        for token in re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|\'(?:[^\'\\]|\\.)\'|[()]').finditer(
            source, position
        ):
            depth += {"(": 1, ")": -1}.get(token[0], 0)
            if depth == 0:
                found.append(source[position : token.start()])
                break
    return found


def _is_servers(block: str) -> bool:
    """Whether the server has the option."""
    tail = block[block.rindex("\n    )") :] if "\n    )" in block else block
    if "set_preset_only" in tail or re.search(r"set_excludes\(\{[^}]*LLAMA_EXAMPLE_SERVER", tail):
        return False
    examples = re.search(r"set_examples\((\{[^}]*\}|\w+)\)", tail)
    if examples is None:
        return True
    return any(
        name in examples[1] for name in ("LLAMA_EXAMPLE_SERVER", "LLAMA_EXAMPLE_COMMON", "mmproj_examples")
    )


def _handler(block: str) -> tuple[str, str]:
    """Return the parameters and the body of the option's handler."""
    found = re.search(
        r"\[[^\]]*\]\s*\((?P<parameters>common_params[^)]*)\)\s*(?:->\s*\w+\s*)?\{(?P<body>.*)",
        block,
        re.DOTALL,
    )
    assert found is not None, block[:200]
    return found["parameters"], found["body"]


def _value(parameters: str, body: str, hint: str) -> dict[str, Any]:
    """Return kind, type and choices of an option with a value."""
    if parameters.count("std::string") == 2:
        return {"kind": "list", "nargs": 2, "type": "str"}
    if hint in {"[on|off|auto]", "[on|off]"}:
        return {"kind": "value", "type": "toggle", "choices": _TOGGLE if "auto" in hint else _TOGGLE[:2]}
    if re.fullmatch(r"\{[\w,]+\}", hint):
        return {"kind": "value", "type": "str", "choices": hint[1:-1].split(",")}
    if "std::string" not in parameters:
        return {"kind": "value", "type": "int"}
    plain = re.sub(r"\s", "", body)
    if re.search(r"std::sto[fd]\(value\)", plain):
        return {"kind": "value", "type": "float"}
    is_whole = re.search(r"=std::sto(ul|ull|i|ll)\(value\);", plain) and "parse" not in plain
    return {"kind": "value", "type": "int" if is_whole and "==" not in plain else "str"}


def _describe(block: str, texts: dict[str, tuple[str, str]]) -> dict[str, Any] | None:
    """Return one option as data, None for one that prints something and ends."""
    lists = re.match(r"\s*common_arg\(\s*(\{[^}]*\})\s*,\s*(\{[^}]*\})?", block)
    assert lists is not None, block[:200]
    every = _STRING.findall(lists[1])
    flags = [flag for flag in every if flag.startswith("--")]
    opposite = [flag for flag in _STRING.findall(lists[2] or "") if flag.startswith("--")]
    flags = flags or ["-" + every[-1]]
    name = flags[0][2:].replace("-", "_")
    if name in _ACTIONS:
        return None
    described: dict[str, Any] = {"name": name, "flags": flags}
    text, default = texts.get(flags[0], ("", ""))
    parameters, body = _handler(block)
    hint = re.match(r'\s*,?\s*"((?:[^"\\]|\\.)*)"\s*,', block[lists.end() :])
    if opposite:
        described.update(kind="pair", negative=opposite[0])
    elif "," not in parameters:
        described["kind"] = "true"
    else:
        described.update(_value(parameters, body, hint[1] if hint else ""))
    return {**described, "default": _typed(default, described), "help": text}


def _typed(text: str, described: dict[str, Any]) -> Any:
    """Return the documented default as the option's type, None where it is words."""
    kind = described.get("type", "bool")
    words = {"true": True, "enabled": True, "on": True, "false": False, "disabled": False, "off": False}
    try:
        if kind in {"int", "float"}:
            return int(text) if kind == "int" else float(text)
        return words.get(text) if kind == "bool" else (text if text in described.get("choices", []) else None)
    except ValueError:
        return None


def _documented(text: str) -> dict[str, tuple[str, str]]:
    """Return help and default of each flag by llama.cpp's own documentation."""
    found: dict[str, tuple[str, str]] = {}
    for row in _ROW.finditer(text):
        words = " ".join(row["help"].replace("<br/>", " ").replace("\\|", "|").split())
        default = re.search(r"\(default: '?([^\s,)']+)", words)
        for flag in re.findall(r"(?<![\w-])(--?[A-Za-z][\w.-]*)", row["flags"]):
            found.setdefault(flag, (words, default[1] if default else ""))
    return found


def main() -> int:
    """Write the table: ROOT VERSION OUTPUT."""
    root = Path(sys.argv[1])
    texts = _documented((root / "tools/server/README.md").read_text(encoding="utf-8"))
    source = _COMMENT.sub(lambda found: found[1] or "", (root / "common/arg.cpp").read_text(encoding="utf-8"))
    blocks = [block for block in _blocks(source) if _is_servers(block)]
    options = [option for option in (_describe(block, texts) for block in blocks) if option is not None]
    found = {flag for block in blocks for flag in _STRING.findall(block) if flag.startswith("--")}
    missing = sorted(flag for flag in texts if flag.startswith("--") and flag not in found)
    assert not missing, f"documented by llama.cpp and not found in its source: {missing}"
    option_file.write(Path(sys.argv[3]), "llama_cpp", sys.argv[2], options)
    sys.stdout.write(f"{len(options)} options of llama.cpp {sys.argv[2]}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
