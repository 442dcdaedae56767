"""Files read and written: what goes wrong is one clear error, and nothing is half written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ringfx.errors import InvalidArgument, RingfxError

__all__ = ["check_writable", "is_there", "read_text", "write_text"]

LARGEST = 2**28
"""Bytes of the largest file that is read: plans, profiles and records have a thousandth of it."""

MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
"""First bytes of compressed files."""

_PLAIN_PATH = "Do: give a path without control characters."


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; no name is too long to ask."""
    try:
        return path.exists()
    except OSError:
        return False


def read_text(path: Path, error: type[RingfxError] = InvalidArgument, what: str = "") -> str:
    """The text of a UTF-8 file; a byte order mark at its start is left out.

    Parameters
    ----------
    what
        Stands before the path in errors, such as ``profile``.

    Raises
    ------
    RingfxError
        Of the type ``error``: there is no such file, it may not be read, or it is not text.
    """
    name = f"{what} {path}".lstrip()
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as problem:
        raise error(
            f"{name} cannot be read: {_reason(problem)}. Do: name a file that is there and that "
            "you may read; a relative path starts in the current folder."
        ) from problem
    except ValueError as problem:  # a NUL in the path
        raise error(f"{name!r} cannot be read: {problem}. {_PLAIN_PATH}") from problem
    if len(content) > LARGEST:
        raise error(
            f"{name} has more than {LARGEST:,} bytes: no file of ringfx is so large. Do: name a "
            "plan, a profile, records or a config.json."
        )
    for magic, packed in MAGIC.items():
        if content.startswith(magic):
            raise error(f"{name} is compressed ({packed}). Do: unpack it first.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(
            f"{name} is not UTF-8 text: byte {problem.start} is 0x{content[problem.start]:02x}."
            " Do: write it again, or convert it to UTF-8."
        ) from problem


def write_text(path: Path, text: str, error: type[RingfxError] = InvalidArgument) -> None:
    """Replaces the file as a whole: whoever reads it meets the old text or the new one.

    Raises
    ------
    RingfxError
        Of the type ``error``: the file cannot be written; what was there is as it was.
    """
    content = text.encode("utf-8", "backslashreplace")
    with _blaming(path, error):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_bytes(content)  # a pipe or a terminal
            return
        _refuse_unwritable(target)
        _replace(target, content)


def check_writable(
    path: Path, error: type[RingfxError] = InvalidArgument, *, make_folders: bool = False
) -> None:
    """Refuses now what ``write_text`` would refuse later."""
    with _blaming(path, error):
        target = Path(os.path.realpath(path))
        if make_folders:
            target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_unwritable(target)
        if not target.exists():
            with tempfile.TemporaryFile(dir=target.parent):
                pass


def _replace(target: Path, content: bytes) -> None:
    number, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, _mode(target))
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _mode(target: Path) -> int:
    """As it was, or as any new file has it."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _refuse_unwritable(target: Path) -> None:
    if target.is_dir():
        raise IsADirectoryError(21, "Is a directory")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(13, "Permission denied")


@contextlib.contextmanager
def _blaming(path: Path, error: type[RingfxError]) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise error(
            f"{path} cannot be written: {_reason(problem)}. Do: name a file in a folder that you"
            " may write."
        ) from problem
    except ValueError as problem:  # a NUL in the path
        raise error(f"{str(path)!r} cannot be written: {problem}. {_PLAIN_PATH}") from problem


def _reason(problem: OSError) -> str:
    return problem.strerror or str(problem)
