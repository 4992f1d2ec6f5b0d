"""Find the checkpoint a path means; in a training directory the newest iteration that is whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from flagscale_convert.errors import SourceDamaged, SourceNotFound, Unsupported
from flagscale_convert.huggingface import CONFIG, INDEX, SINGLE, HuggingFaceSource, read_json
from flagscale_convert.megatron_source import MegatronSource
from flagscale_convert.mp_rank import MpRankSource
from flagscale_convert.torch_dist import TorchDistSource

__all__ = ["STAGING", "TRACKER", "Opened", "open_checkpoint"]

TRACKER = "latest_checkpointed_iteration.txt"
STAGING = ".flagscale-convert"
"""Folder in a destination that holds an unfinished conversion."""
_ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class Opened:
    """A checkpoint found and opened."""

    root: Path
    """What the user named, or the training directory around it."""
    directory: Path
    """Where the tensors are."""
    source: HuggingFaceSource | MegatronSource
    notes: tuple[str, ...] = ()
    """Findings such as a newer, unfinished iteration that was passed over."""

    @property
    def format(self) -> str:
        """`hf`, `torch_dist` or `torch` (one file per rank)."""
        return "hf" if isinstance(self.source, HuggingFaceSource) else self.source.format


def open_checkpoint(path: Path) -> Opened:
    """Open a model directory, an iteration directory or a training directory.

    Raises:
        SourceNotFound: nothing there, or nothing that is a checkpoint.
        SourceDamaged: a checkpoint, but no whole one.
        Unsupported: a format that is not read.
        UnsafePickle: a pickle in it names something no checkpoint needs.
    """
    if not path.is_dir():
        kind = "is a file, not a directory" if path.exists() else "does not exist"
        raise SourceNotFound(f"{path}: {kind}: give a model directory or a Megatron checkpoint directory")
    if (path / STAGING).exists():
        raise SourceDamaged(
            f"{path}: holds a conversion that did not finish: run the same `flagscale-convert run` again to"
            " finish it"
        )
    if _looks_like_iteration(path):
        return _open_iteration(path)
    iterations = _iterations(path)
    if iterations or (path / TRACKER).exists():
        return _open_newest(path, iterations)
    if any((path / name).exists() for name in (SINGLE, INDEX, CONFIG)) or any(path.glob("*.safetensors")):
        return _open_model(path)
    return _refuse(path)


def _looks_like_iteration(path: Path) -> bool:
    return (path / ".metadata").exists() or any(path.glob("*.distcp")) or any(path.glob("mp_rank_*"))


def _open_model(path: Path) -> Opened:
    if not (path / CONFIG).exists():
        raise SourceDamaged(f"{path}: has weights but no {CONFIG}: copy the whole model directory")
    return Opened(path, path, HuggingFaceSource(path))


def _open_iteration(path: Path) -> Opened:
    root = path.parent if _ITERATION.fullmatch(path.name) or path.name == "release" else path
    if any(path.glob("mp_rank_*")):
        return Opened(root, path, MpRankSource(path))
    if not (path / "metadata.json").exists() or not (path / ".metadata").exists():
        missing = "metadata.json" if (path / ".metadata").exists() else ".metadata"
        raise SourceDamaged(f"{path}: has no {missing}: the save did not finish: use an older iteration")
    backend = read_json(path / "metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        raise Unsupported(f"{path / 'metadata.json'}: sharded_backend ({backend}): only torch_dist is read")
    return Opened(root, path, TorchDistSource(path))


def _iterations(root: Path) -> list[Path]:
    """List iteration directories, newest first; `release` comes last."""
    numbered = [entry for entry in root.iterdir() if entry.is_dir() and _ITERATION.fullmatch(entry.name)]
    numbered.sort(key=lambda entry: int(entry.name.removeprefix("iter_")), reverse=True)
    release = root / "release"
    return [*numbered, release] if release.is_dir() else numbered


def _open_newest(root: Path, iterations: list[Path]) -> Opened:
    notes: list[str] = []
    for candidate in iterations:
        try:
            opened = _open_iteration(candidate)
        except (SourceDamaged, SourceNotFound) as error:
            notes.append(f"{candidate.name} passed over: {error}")
            continue
        tracked = _tracked(root)
        if tracked not in (None, candidate.name):
            notes.append(f"{TRACKER} names {tracked}, the newest whole one is {candidate.name}")
        return Opened(root, candidate, opened.source, tuple(notes))
    if not iterations:
        raise SourceNotFound(
            f"{root}: has a {TRACKER}, but no iteration directory: copy the whole checkpoint"
        )
    raise SourceDamaged(f"{root}: no iteration is whole: {'; '.join(notes)}")


def _tracked(root: Path) -> str | None:
    """Tell the directory the tracker file names; None without a readable one."""
    try:
        text = (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return f"iter_{int(text):07d}" if text.isdecimal() else text or None


def _refuse(path: Path) -> Opened:
    bins = sorted(entry.name for pattern in ("*.bin", "*.pt", "*.pth") for entry in path.glob(pattern))
    if bins:
        raise Unsupported(
            f"{path}: holds {bins[0]}: pickled weights must be loaded whole and can execute code, only"
            " safetensors and"
            " torch_dist are read: save a Hugging Face model again with"
            " `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)`"
        )
    nested = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and _is_root(entry))
    advice = f": did you mean {path / nested[0]}?" if nested else ""
    raise SourceNotFound(f"{path}: is neither a Hugging Face model nor a Megatron checkpoint{advice}")


def _is_root(path: Path) -> bool:
    return (path / TRACKER).exists() or (path / CONFIG).exists()
