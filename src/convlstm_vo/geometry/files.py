"""Writing files so that nobody ever finds half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convlstm_vo.errors import ConvlstmVoError


class WriteError(ConvlstmVoError):
    """A file that could not be written; the one that stood there before is untouched."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to, renamed onto it when the block ends without an error.

    Raises:
        WriteError: the disk is full or the folder cannot be written; the temporary file is removed.
    """
    if path.is_dir():
        raise WriteError(f"{path}: is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        what = "a folder of its path is a file" if isinstance(error, FileExistsError | NotADirectoryError) else None
        raise WriteError(f"{path}: cannot be written ({what or error.strerror or error})") from None
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror or error}); is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file at once; see `replacing`."""
    with replacing(path) as temporary:
        data = content.encode() if isinstance(content, str) else content
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())


def umask() -> int:
    """The process's mask for new files, which temporary ones ignore."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
