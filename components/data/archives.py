"""Compressed files as streams; and the members of .zip and .tar, read one after another and never written to disk.

A member that climbs out of its folder, a link, a device, or one that is encrypted, is turned away by name.
"""

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

Member = tuple[str, IO[bytes] | None, str | None]  # its name, its bytes, and why it is not read


def errors() -> tuple[type[Exception], ...]:
    """What a broken container raises; NotImplementedError is zipfile's word for a compression it does not know."""
    return (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, NotImplementedError)


def unpacked(f: IO[bytes], packed: str | None) -> IO[bytes]:
    """The bytes of a stream without its compression."""
    if packed is None:
        return f
    opener: Any = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "zst": _zstandard}[packed]
    opened: IO[bytes] = opener(f)
    return opened


def _zstandard(f: IO[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Zstandard(f), 1 << 17)


class _Zstandard(io.RawIOBase):
    """A .zst as a stream. Unlike the library's own reader it notices that the end is missing."""

    def __init__(self, f: IO[bytes]):
        import zstandard

        self.f, self.fresh, self.ready = f, lambda: zstandard.ZstdDecompressor().decompressobj(), b""
        self.frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self.ready:
            rest = self.frame.unused_data if self.frame is not None and self.frame.eof else b""
            chunk = rest or self.f.read(1 << 17)
            if not chunk:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("the compressed data ends before its end-of-stream marker")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.fresh()
            try:
                self.ready = self.frame.decompress(chunk)
            except Exception as e:
                if type(e).__name__ != "ZstdError":
                    raise
                raise OSError(str(e)) from None
        n = min(len(into), len(self.ready))
        into[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


def members(f: IO[bytes], kind: str) -> Iterator[Member]:
    """The files of an archive in their order; each is read before the next is asked for."""
    yield from _zip(f) if kind == "zip" else _tar(f)


def _zip(f: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(f) as archive:
        for member in archive.infolist():
            mode = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir():
                continue
            if reason := _climbs(member.orig_filename):
                yield member.orig_filename, None, reason
            elif mode not in (0, stat.S_IFREG):
                yield member.filename, None, "archive: the member is a link or a device"
            elif member.flag_bits & 1:
                yield member.filename, None, "archive: the member is encrypted"
            else:
                with archive.open(member) as opened:
                    yield member.filename, opened, None


def _tar(f: IO[bytes]) -> Iterator[Member]:
    with tarfile.open(fileobj=f, mode="r|") as archive:
        for member in archive:
            if member.isdir():
                continue
            if reason := _climbs(member.name):
                yield member.name, None, reason
            elif not member.isreg():
                yield member.name, None, "archive: the member is a link or a device"
            else:
                yield member.name, archive.extractfile(member), None


def _climbs(name: str) -> str | None:
    path = PurePosixPath(name.replace("\\", "/"))
    away = path.is_absolute() or ".." in path.parts or name[1:2] == ":"
    return "archive: the member's name climbs out of its folder" if away else None
