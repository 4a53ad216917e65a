"""Addresses in object stores: `s3://bucket/key`, `gs://`, `hf://` or any other URL that fsspec knows."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

from sstoken.errors import SstokenError, UsageError

_SCHEME = re.compile(r"\A([a-z][a-z0-9+.-]*):/+")
_PATIENCE = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 3}}
"""Settings of botocore, in seconds and attempts per request: a store that is down is an error within a minute."""
S3 = ("s3", "s3a")
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "oid", "mtime", "created")
"""Facts about an object that change with its content, the most reliable first."""
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class RemotePath(PurePosixPath):
    """A file or folder in an object store, with the methods of `Path` that look and read.

    Writing goes through `sstoken.stages.storage`. A folder exists while there is a file below it. Other libraries
    cannot open it: `sstoken.stages.storage.local` makes a copy on the local disk.

    Every method raises `SstokenError` if the store does not answer or refuses access.
    """

    def __str__(self) -> str:
        return _SCHEME.sub(r"\1://", super().__str__())

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __fspath__(self) -> str:
        return str(self)

    @property
    def scheme(self) -> str:
        """The URL's scheme, such as `s3`."""
        return self.parts[0].removesuffix(":") if self.parts else ""

    def resolve(self) -> "RemotePath":
        """Return itself: a URL is absolute, has no home folder, and object stores have no links."""
        return self

    absolute = expanduser = resolve

    def is_symlink(self) -> bool:
        """Return False: object stores have no links."""
        return False

    def info(self) -> dict[str, Any] | None:
        """Return the store's facts about it; None if it does not exist."""
        if len(self.parts) < 2:
            return None
        filesystem, key = self.located()
        try:
            with explained(self):
                return cast(dict[str, Any], filesystem.info(key))
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        return self.info() is not None

    def is_file(self) -> bool:
        info = self.info()
        return info is not None and info["type"] == "file"

    def is_dir(self) -> bool:
        info = self.info()
        return info is not None and info["type"] == "directory"

    def stat(self) -> SimpleNamespace:
        """Return the fields of `os.stat_result` that callers use; `st_ino` changes with the content."""
        info = self.info()
        if info is None:
            raise FileNotFoundError(2, "no such file", str(self))
        size = int(info["size"] or 0)
        return SimpleNamespace(st_size=size, st_ino=int(version(info), 16), st_mtime_ns=0, st_ctime_ns=0)

    def read_bytes(self) -> bytes:
        filesystem, key = self.located()
        with explained(self):
            return bytes(filesystem.cat_file(key))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Takes one request, for small files."""
        filesystem, key = self.located()
        with explained(self):
            more = {"max_concurrency": 1} if self.scheme in S3 else {}  # else s3fs asks for the size first
            return bytes(filesystem.cat_file(key, **more)).decode(encoding)

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open it for reading; the file can seek, and downloads only what is read."""
        assert mode == "rb", "write through sstoken.stages.storage"
        filesystem, key = self.located()
        with explained(self):
            return cast(BinaryIO, filesystem.open(key, "rb"))

    def files(self) -> dict["RemotePath", dict[str, Any]]:
        """Return the store's facts about every file below it, sorted by name."""
        filesystem, key = self.located()
        try:
            with explained(self):
                found = filesystem.find(key, detail=True)
        except FileNotFoundError:
            return {}
        start = key.rstrip("/") + "/"
        below = {name.removeprefix(start): info for name, info in found.items() if name.startswith(start)}
        return {self / name: below[name] for name in sorted(below)}

    def iterdir(self) -> Iterator["RemotePath"]:
        filesystem, key = self.located()
        try:
            with explained(self):
                found = filesystem.ls(key, detail=False)
        except FileNotFoundError:
            return iter(())
        names = {PurePosixPath(name).name for name in found if name.rstrip("/") != key.rstrip("/")}
        return iter([self / name for name in sorted(names)])

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Yield the matching files, no folders; `*` stays within a name."""
        wanted = PurePosixPath(pattern).parts
        for file in self.files():
            parts = file.relative_to(self).parts
            if len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted)):
                yield file

    def rglob(self, pattern: str) -> Iterator["RemotePath"]:
        """Yield the files, no folders, whose name matches."""
        return (file for file in self.files() if fnmatchcase(file.name, pattern))

    def located(self) -> tuple[Any, str]:
        """Return its fsspec file system, and its key there.

        Raises:
            UsageError: fsspec does not know the scheme, or needs a package for it.
        """
        import fsspec

        try:
            filesystem = fsspec.filesystem(self.scheme, **options(self.scheme))
        except ImportError as error:
            package = _PACKAGES.get(self.scheme, "the fsspec package for it")
            raise UsageError(f"{self}: {self.scheme}:// needs another package; install {package}") from error
        except ValueError as error:
            raise UsageError(
                f"{self}: unknown kind of storage {self.scheme!r}; s3, gs, hf and fsspec's others are known"
            ) from error
        return filesystem, filesystem._strip_protocol(str(self))


def options(scheme: str) -> dict[str, Any]:
    """Return the arguments for the fsspec file system of a scheme."""
    import fsspec

    found: dict[str, Any] = {"use_listings_cache": False}  # other machines write there
    if scheme in S3:
        found["config_kwargs"] = {**_PATIENCE, **fsspec.config.conf.get("s3", {}).get("config_kwargs", {})}
    return found


def version(info: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that change with an object's content, from the store's facts about it."""
    said = next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), repr(sorted(info)))
    return hashlib.sha256(f"{info.get('size')}:{said}".encode()).hexdigest()[:16]


@contextmanager
def explained(place: PurePosixPath) -> Iterator[None]:
    """Turn exceptions of fsspec and its file systems into one-line errors.

    Raises:
        SstokenError: names the place and the reason.
        FileNotFoundError, FileExistsError: passed on.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, SstokenError):
        raise
    except Exception as error:  # each file system raises its own types
        raise SstokenError(f"{place}: {_why(error)}") from error


def _why(error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, PermissionError) or kinds & {"GatedRepoError", "InvalidAccessKeyId"}:
        return f"the store refuses access ({_line(error)}); check the credentials and what they allow"
    if kinds & {
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "CredentialRetrievalError",
    }:
        return f"no usable credentials ({_line(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    if isinstance(error, ConnectionError | TimeoutError) or kinds & {
        "EndpointConnectionError",
        "ConnectionError",
        "HTTPClientError",
        "ClientConnectorError",
        "ConnectError",
    }:
        return f"the store does not answer ({_line(error)}); check AWS_ENDPOINT_URL and the network, then try again"
    return _line(error)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = re.sub(r"(https?://)[^\s/@]*@|\?\S*", r"\1", lines[0])[:200] if lines else ""
    return text or type(error).__name__
