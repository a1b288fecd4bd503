"""One door to local folders and S3: list, resumable read, atomic write, conditional create.

A `Storage` is rooted at a URI and speaks in keys below it. Both kinds promise the same:

* `Storage.writer` publishes a whole object or nothing; an exception, or a killed process, leaves
  nothing visible under the key;
* `Storage.create` makes an object only if there is none, and `Storage.replace` only over one known
  version, so two runs cannot both succeed (`conditional_write_defects` asks whether that is true);
* `Storage.open` pins one version of an object: if it is replaced meanwhile, reading fails with
  `SourceChangedError` instead of mixing two versions.

S3 goes through boto3 and its standard credential chain; ``AWS_ENDPOINT_URL`` and the rest of the
SDK's environment are honoured. pyarrow and fsspec are not used for data because both publish a
truncated object when the body of their ``with`` block raises (docs/pipeline.md).
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from one4all.errors import UsageError
from one4all.extras import require
from one4all.storage.base import INTERNAL, Attributes, ObjectInfo, Reader, Storage, Writer
from one4all.storage.local import LocalStorage
from one4all.storage.probe import conditional_write_defects

__all__ = [
    "INTERNAL",
    "Attributes",
    "LocalStorage",
    "ObjectInfo",
    "Reader",
    "Storage",
    "Writer",
    "conditional_write_defects",
    "open_storage",
]


_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:[\w:.-]+")
# Of a URI, or of what was meant to be one; a path begins with / or . or ~ where it looks like one.
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")


def open_storage(uri: str) -> Storage:
    """The storage for a local path, ``file:///path`` or ``s3://bucket/prefix``.

    A relative path that begins like a URI, such as ``old:photos``, is written ``./old:photos``:
    what was meant to be a bucket must not become a folder here.

    Raises:
        UsageError: Another scheme, or one that is misspelt; no bucket; or nothing at all.
    """
    if not uri.strip():
        raise UsageError(
            "no place is given; use a local path (. is this folder) or s3://bucket/..."
        )
    if not (match := _SCHEME.match(uri)):
        return LocalStorage(Path(uri))
    rest = uri[match.end() :]
    if uri.startswith("file:///") and rest.strip("/"):
        return LocalStorage(Path(unquote(rest.removeprefix("//"))))
    bucket, _, prefix = rest.removeprefix("//").partition("/")
    if uri.startswith("s3://") and _BUCKET.fullmatch(bucket):
        require("boto3", "s3")
        from one4all.storage.s3 import S3Storage

        return S3Storage(bucket, prefix.strip("/"))
    raise UsageError(
        f"cannot open {uri!r}: use s3://bucket/prefix, file:///path or a local path"
        + _hint(match[1].lower(), rest, uri)
    )


def _hint(scheme: str, rest: str, uri: str) -> str:
    """What may have been meant by what looks like a URI."""
    place = rest.strip("/ ")
    if scheme in ("s3", "s3a", "s3n"):
        bucket = place.partition("/")[0]
        if not bucket:
            return "; it names no bucket"
        if not _BUCKET.fullmatch(bucket):
            return f"; {bucket!r} cannot be the name of a bucket"
        return f"; did you mean s3://{place}?"
    if scheme == "file":
        return f"; did you mean file:///{place}?"
    return "" if rest.startswith("//") else f"; or ./{uri} for a folder of that name"
