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

from pathlib import Path
from urllib.parse import unquote, urlsplit

from one4all.errors import UsageError
from one4all.extras import require
from one4all.storage.base import INTERNAL, ObjectInfo, Reader, Storage, Writer
from one4all.storage.local import LocalStorage
from one4all.storage.probe import conditional_write_defects

__all__ = [
    "INTERNAL",
    "LocalStorage",
    "ObjectInfo",
    "Reader",
    "Storage",
    "Writer",
    "conditional_write_defects",
    "open_storage",
]


def open_storage(uri: str) -> Storage:
    """The storage for a local path, ``file://`` or ``s3://bucket/prefix``.

    Raises:
        UsageError: Another scheme, or no bucket.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStorage(Path(uri))
    if scheme == "file":
        return LocalStorage(Path(unquote(urlsplit(uri).path)))
    if scheme == "s3":
        require("boto3", "s3")
        from one4all.storage.s3 import S3Storage

        bucket, _, prefix = rest.partition("/")
        if bucket:
            return S3Storage(bucket, prefix.strip("/"))
        raise UsageError(f"{uri!r} names no bucket; write s3://bucket/prefix")
    raise UsageError(f"cannot open {uri!r}: use a local path, file:// or s3://bucket/prefix")
