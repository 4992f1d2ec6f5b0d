"""One wish for FlagOS, rendered into the variables of all its plug-ins, so that they cannot disagree.

Six programs ask the same questions under different names: TransformerEngine-FL (`TE_FL_*`), Megatron-LM-FL
(`MG_FL_*`), vllm-plugin-FL (`VLLM_FL_*`), sglang-plugin-FL (`SGLANG_FL_*`), FlagGems (`USE_FLAGGEMS`) and
FlagCX (`FLAGCX_*`). A profile says each thing once, with our names of chips; every plug-in gets its own
name of the vendor.

Value grammars, from the plug-ins' documents and policy parsers: `*_PREFER` is `flagos`, `vendor` or
`reference`; `*_STRICT` is 1 (an error where the wanted operator is missing) or 0 (another one is taken);
vendors are separated by commas; `*_PER_OP` is `op=a|b;op2=c` with the words `flagos`, `vendor`,
`vendor:<name>`, `reference`; `MG_FL_PREFER` is the name of one vendor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from flagscale_hw.chips import CHIPS, Runtime, runtime
from flagscale_hw.errors import InputError

__all__ = ["KINDS", "FlagOSProfile", "Kind", "flagos_env", "owned_variables"]

Kind = Literal["flagos", "vendor", "reference"]
KINDS: tuple[Kind, ...] = ("flagos", "vendor", "reference")
"""`flagos`: FlagGems' Triton operators; `vendor`: the vendor's library; `reference`: plain torch."""

_OP = re.compile(r"[A-Za-z_]\w*")
_OWNED = ("TE_FL_", "MG_FL_", "VLLM_FL_", "SGLANG_FL_")


@dataclass(frozen=True, kw_only=True)
class FlagOSProfile:
    """Which operators and which communication library a user wants from FlagOS."""

    prefer: Kind | None = None
    """Kind that is tried first; None: the chip's own default, see `Runtime.te_prefer`."""
    strict: bool = False
    """Whether a missing operator is an error; otherwise another kind is taken."""
    allow: tuple[str, ...] = ()
    """Chips whose vendor operators may be used; empty: all."""
    deny: tuple[str, ...] = ()
    """Chips whose vendor operators must not be used."""
    per_op: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Operator -> kinds in the order in which they are tried; `vendor:<chip>` names one vendor."""
    only_ops: tuple[str, ...] = ()
    """If given, FlagGems replaces these operators of torch and no others."""
    except_ops: tuple[str, ...] = ()
    """Operators of torch that FlagGems must not replace."""
    flaggems: bool | None = None
    """Whether FlagGems replaces operators of torch; None: only where `flagos` is preferred."""
    flagcx: str | None = None
    """Folder of an installed FlagCX, which then carries the collectives; None: the chip's own library."""


def flagos_env(
    profile: FlagOSProfile, chip: str, *, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Render a profile for a chip into the variables of every FlagOS plug-in.

    Args:
        profile: what is wanted.
        chip: where it will run.
        environ: what is set already, for instance `experiment.envs`; another value there is refused.

    Raises:
        DetectError: the chip is not known.
        InputError: the profile contradicts itself, the chip or `environ`; every contradiction is a line that
            names both sides.
    """
    row = runtime(chip)
    problems = [*_unknown(profile), *_contradictions(profile), *_impossible(profile, row)]
    if problems:
        raise InputError("\n".join(problems))
    rendered = _render(profile, row)
    problems = list(_disagreements(rendered, environ or {}))
    if problems:
        raise InputError("\n".join(problems))
    return dict(sorted(rendered.items()))


def owned_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of FlagOS plug-ins that are set in an environment."""
    names = ("USE_FLAGGEMS", "FLAGCX_PATH", "USE_FLAGCX")
    return {name: value for name, value in environ.items() if name.startswith(_OWNED) or name in names}


def _unknown(profile: FlagOSProfile) -> Iterator[str]:
    if profile.prefer is not None and profile.prefer not in KINDS:
        yield f"prefer: {profile.prefer!r}: not a kind: use one of {', '.join(KINDS)}"
    for where, chips in (("allow", profile.allow), ("deny", profile.deny)):
        for name in sorted(set(chips) - set(CHIPS)):
            yield f"{where}: {name!r}: not a chip: known are {', '.join(CHIPS)}"
    yield from _unknown_operators(profile)


def _unknown_operators(profile: FlagOSProfile) -> Iterator[str]:
    for op, order in profile.per_op.items():
        if not _OP.fullmatch(op):
            yield f"per_op: {op!r}: not the name of an operator: letters, digits and _ only"
        if not order:
            yield f"per_op.{op}: nothing given: name at least one of {', '.join(KINDS)}"
        for word in order:
            if word not in KINDS and word.removeprefix("vendor:") not in CHIPS:
                yield f"per_op.{op}: {word!r}: use {', '.join(KINDS)} or vendor:<chip>"


def _contradictions(profile: FlagOSProfile) -> Iterator[str]:
    for name in sorted(set(profile.allow) & set(profile.deny)):
        yield f"allow: {name}, deny: {name}: both cannot be: remove one"
    for name in sorted(set(profile.only_ops) & set(profile.except_ops)):
        yield f"only_ops: {name}, except_ops: {name}: both cannot be: remove one"
    if profile.only_ops and profile.except_ops:
        yield (
            f"only_ops: {','.join(profile.only_ops)}, except_ops: {','.join(profile.except_ops)}: the "
            "plug-ins take one list or the other: keep one"
        )
    if profile.flaggems is False and profile.only_ops:
        named = ",".join(profile.only_ops)
        yield f"flaggems: false, only_ops: {named}: without FlagGems nothing is replaced: remove one"
    for op, order in profile.per_op.items():
        for word in order:
            yield from _vendor_word(profile, op, word)


def _vendor_word(profile: FlagOSProfile, op: str, word: str) -> Iterator[str]:
    chip = word.removeprefix("vendor:")
    if chip == word:
        return
    if chip in profile.deny:
        yield f"per_op.{op}: {word}, deny: {chip}: both cannot be: remove one"
    if profile.allow and chip not in profile.allow:
        yield f"per_op.{op}: {word}, allow: {','.join(profile.allow)}: {chip} is not allowed: add it there"


def _impossible(profile: FlagOSProfile, row: Runtime) -> Iterator[str]:
    """Yield what cannot work on this chip."""
    if profile.prefer == "vendor" and row.chip in profile.deny:
        yield f"prefer: vendor, deny: {row.chip}: {row.chip} is the chip itself: remove one"
    if profile.prefer == "vendor" and profile.allow and row.chip not in profile.allow:
        allowed = ",".join(profile.allow)
        yield f"prefer: vendor, allow: {allowed}: {row.chip}, the chip itself, is not allowed: add it"
    if profile.strict and profile.prefer == "flagos" and profile.flaggems is False:
        yield "prefer: flagos with strict: true, flaggems: false: FlagGems has those operators: switch it on"
    if profile.flagcx is not None and row.flagcx_adaptor is None:
        yield f"flagcx: {profile.flagcx}, chip: {row.chip}: FlagCX has no adaptor for it: remove flagcx"


def _render(profile: FlagOSProfile, row: Runtime) -> dict[str, str]:
    prefer = profile.prefer or row.te_prefer
    uses_flaggems = profile.flaggems if profile.flaggems is not None else prefer == "flagos"
    rendered = {**dict(row.settings), "USE_FLAGGEMS": str(int(uses_flaggems))}
    if row.megatron_vendor:
        rendered["MG_FL_PREFER"] = row.megatron_vendor
    for prefix, attribute in (
        ("TE_FL", "te_vendor"),
        ("VLLM_FL", "vllm_fl_vendor"),
        ("SGLANG_FL", "sglang_fl_vendor"),
    ):
        rendered[f"{prefix}_PREFER"] = prefer
        rendered[f"{prefix}_STRICT"] = str(int(profile.strict))
        rendered |= _lists(profile, prefix, attribute)
    for prefix in ("VLLM_FL", "SGLANG_FL"):
        if profile.only_ops:
            rendered[f"{prefix}_FLAGOS_WHITELIST"] = ",".join(profile.only_ops)
        if profile.except_ops:
            rendered[f"{prefix}_FLAGOS_BLACKLIST"] = ",".join(profile.except_ops)
    rendered["SGLANG_FL_DIST_BACKEND"] = "flagcx" if profile.flagcx else row.collective_backend
    if profile.flagcx:
        rendered["FLAGCX_PATH"] = profile.flagcx
    return rendered


def _lists(profile: FlagOSProfile, prefix: str, attribute: str) -> dict[str, str]:
    """Render vendors and operators in one plug-in's own names; a chip unknown to it keeps ours."""

    def name(chip: str) -> str:
        return getattr(runtime(chip), attribute) or chip

    found = {}
    if profile.allow:
        found[f"{prefix}_ALLOW_VENDORS"] = ",".join(map(name, profile.allow))
    if profile.deny:
        found[f"{prefix}_DENY_VENDORS"] = ",".join(map(name, profile.deny))
    if profile.per_op:
        found[f"{prefix}_PER_OP"] = ";".join(
            f"{op}={'|'.join(_word(word, name) for word in order)}" for op, order in profile.per_op.items()
        )
    return found


def _word(word: str, name: object) -> str:
    chip = word.removeprefix("vendor:")
    return word if chip == word else f"vendor:{name(chip)}"  # type: ignore[operator]


_SAME = {"true": "1", "yes": "1", "on": "1", "false": "0", "no": "0", "off": "0"}


def _disagreements(rendered: Mapping[str, str], environ: Mapping[str, str]) -> Iterator[str]:
    for name, given in owned_variables(environ).items():
        wanted = rendered.get(name)
        if wanted is not None and _SAME.get(given.strip().lower(), given.strip()) != wanted:
            yield f"{name}: {given} in the environment, {wanted} by the FlagOS profile: remove one"
    legacy = environ.get("TE_FL_PREFER_VENDOR", "").strip()
    prefers_vendor = rendered["TE_FL_PREFER"] == "vendor"
    if legacy in ("0", "1") and (legacy == "1") != prefers_vendor:
        yield (
            f"TE_FL_PREFER_VENDOR: {legacy} in the environment, TE_FL_PREFER={rendered['TE_FL_PREFER']} by "
            "the FlagOS profile: remove the old variable"
        )
