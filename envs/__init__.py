"""Environments: the paper's tasks, small worlds for tests, and how Director runs them."""

import errno
import importlib
import io
import os
import pathlib

# Errors of a full disk, a missing permission, an unsuitable path or a closed pipe.
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
                errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
                errno.EPIPE}


class UserError(ValueError):
    """A mistake of the user's: the program prints it in one line and exits with code 2."""


def require(module: str, message: str):
    """An optional package; UserError with this message if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(message) from error


def write_file(path: pathlib.Path, buffer: io.BytesIO, run_id: str = ""):
    """Create or replace a file as a whole: if this is interrupted, the old content stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{run_id or os.urandom(8).hex()}")
    temporary.unlink(missing_ok=True)  # of a process of this run that was killed
    try:
        with open(temporary, "xb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
