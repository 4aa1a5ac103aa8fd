"""Images that a command has drawn so far, kept in a file until it is done."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmtool.errors import BusyError, InputError, ResourceError, UserError, is_full
from cmtool.system.portable import flags, lock, read_at, write_at

OTHER = "give another --out, remove it, or --overwrite"


class KeptImages:
    """Images (C, H, W) uint8 in a file, one after the other, of which a killed process leaves some.

    The `key` stands for all that the images depend on. Raises UserError for a file of images of
    another key or shape, unless it may be overwritten; BusyError while another process writes it;
    InputError for what is no regular file.
    """

    def __init__(self, path: Path, key: str, shape: Sequence[int], overwrite: bool) -> None:
        self.path, self.shape, self.bytes = path, tuple(shape), math.prod(shape)
        header = json.dumps({"images drawn so far": key, "shape": self.shape}).encode() + b"\n"
        self.start = len(header)
        try:
            how = flags("O_RDWR", "O_CREAT", "O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC")
            self.file = open(os.open(path, how, 0o666), "r+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}", OTHER) from None
        try:
            self.count = self._begin(header, overwrite)
        except BaseException:
            self.file.close()
            raise

    def _begin(self, header: bytes, overwrite: bool) -> int:
        """Return how many images there are. Without the header the file is begun anew."""
        if not stat.S_ISREG(os.fstat(self.file.fileno()).st_mode):
            raise InputError(f"{self.path} is not a regular file", OTHER)
        _lock(self.file.fileno(), self.path)
        found = self.file.read(self.start)
        if not header.startswith(found) and not overwrite:
            raise UserError(f"{self.path} holds images of other settings", OTHER)
        if found != header:
            self.file.truncate(0)
            self._write(header, 0)
        return (os.fstat(self.file.fileno()).st_size - self.start) // self.bytes

    def __len__(self) -> int:
        return self.count

    def all(self, images: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images that are kept, then the given ones, which are kept from now on."""
        for index in range(len(self)):
            content = read_at(self.file.fileno(), self.bytes, self.start + index * self.bytes)
            yield torch.from_numpy(np.frombuffer(bytearray(content), np.uint8).reshape(self.shape))
        for image in images:
            self._write(image.numpy().tobytes(), self.start + self.count * self.bytes)
            self.count += 1
            yield image

    def _write(self, content: bytes, at: int) -> None:
        """Write at a place. Raises ResourceError when the disk is full."""
        try:
            if write_at(self.file.fileno(), content, at) < len(content):
                raise OSError(errno.ENOSPC, "no room for all of it")
        except OSError as error:
            if not is_full(error):
                raise
            raise ResourceError(f"no room on the disk for {self.path}", "free disk space") from None

    def close(self, done: bool) -> None:
        """Close the file; remove it if the command is `done`, or nothing is kept."""
        if done or not self.count:
            self.path.unlink(missing_ok=True)
        self.file.close()


def _lock(descriptor: int, path: Path) -> None:
    """Raise BusyError while another process has the file; some file systems have no locks."""
    try:
        lock(descriptor)
    except BlockingIOError:
        what = f"{path} is being written by another process"
        raise BusyError(what, "wait for it, or give another --out") from None
    except OSError:
        return
