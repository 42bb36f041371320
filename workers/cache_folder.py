"""Where vidx keeps what it can make again: hashes of files and tensors, converted weights, vLLM's compiled models."""

import errno
import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """The folder that VIDX_CACHE names, else the user's cache folder.

    Raises:
        OSError: VIDX_CACHE is not set and the user has no home folder.
    """
    if os.environ.get("VIDX_CACHE"):
        return Path(os.environ["VIDX_CACHE"])
    try:
        folder = Path(platformdirs.user_cache_dir("vidx"))
    except RuntimeError:
        folder = Path()
    if not folder.is_absolute():
        raise FileNotFoundError(errno.ENOENT, "no home folder is known")
    return folder
