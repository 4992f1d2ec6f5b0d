"""Bring this package to a host that does not have it: the words to run there, and what to send first.

The host needs a POSIX shell and Python 3.11 or newer, nothing else. Through standard input it gets this very
package as a zip, which it unpacks once into `~/.cache/flagscale/hw-<digest>` (or a private folder in /tmp),
and then becomes the agent (`agent.py`).
"""

from __future__ import annotations

import hashlib
import io
import shlex
import sys
import zipfile
from functools import cache
from pathlib import Path

from flagscale_hw.target import Target

__all__ = ["first_bytes", "script"]

_BOOT = """
import os, sys
def say(text):
    print('{"said": "refused", "text": "%s"}' % text); sys.stdout.flush(); sys.exit(2)
if sys.version_info < (3, 11):
    say("python %d.%d: the supervisor needs 3.11 or newer: install it" % sys.version_info[:2])
def read(count):
    data = b""
    while len(data) < count:
        part = os.read(0, count - len(data))
        if not part:
            sys.exit(3)
        data += part
    return data
head = b""
while not head.endswith(b"\\n"):
    head += read(1)
digest, size = head.decode().split()
data = read(int(size))
def private(folder):
    os.makedirs(folder, mode=0o700, exist_ok=True)
    about = os.stat(folder)
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise OSError("others may write to " + folder)
    return folder
def unpack(base):
    folder = os.path.join(base, "hw-" + digest)
    if not os.path.isdir(folder):
        import io, shutil, tempfile, zipfile
        beside = tempfile.mkdtemp(prefix=".hw-", dir=private(base))
        zipfile.ZipFile(io.BytesIO(data)).extractall(beside)
        try:
            os.rename(beside, folder)
        except OSError:
            shutil.rmtree(beside)
    private(folder)
    return folder
cached = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
for base in (os.path.join(cached, "flagscale"), "/tmp/flagscale-%d" % os.getuid()):
    try:
        sys.path.insert(0, unpack(base))
        break
    except OSError as error:
        problem = str(error)
else:
    say("no place for the supervisor: " + problem.replace('"', "'"))
from flagscale_hw.agent import main
sys.exit(main())
"""

_FIND = """for python in {wanted} python3.13 python3.12 python3.11 python3; do
  if command -v "$python" >/dev/null 2>&1; then exec "$python" -I -S -c {boot}; fi
done
echo '{{"said": "refused", "text": "no python3: the supervisor needs Python 3.11 or newer: install it"}}'
exit 2"""


def script(target: Target) -> str:
    """Return the shell text that starts the agent on a host."""
    return _FIND.format(wanted=shlex.quote(target.python or sys.executable), boot=shlex.quote(_BOOT))


@cache
def first_bytes() -> bytes:
    """Return what the agent's standard input begins with."""
    buffer = io.BytesIO()
    root = Path(__file__).resolve().parent
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            if path.is_file() and "__pycache__" not in inside.parts:
                # A fixed date: the same package gives the same digest.
                archive.writestr(zipfile.ZipInfo(f"flagscale_hw/{inside}"), path.read_bytes())
    data = buffer.getvalue()
    return f"{hashlib.sha256(data).hexdigest()[:20]} {len(data)}\n".encode() + data
