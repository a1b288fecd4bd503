"""S3 through boto3: our own resuming reader and our own multipart writer.

``with fs.open(...)`` of pyarrow and fsspec publishes a truncated object when its body raises, and
`get_object().read()` does not resume a broken body; both are measured in docs/pipeline.md.
"""

from __future__ import annotations

import io
import mimetypes
import os
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

from one4all.errors import (
    AccessError,
    ConflictError,
    NotFoundError,
    SourceChangedError,
    StorageError,
    UsageError,
)
from one4all.storage.base import INTERNAL, Attributes, ObjectInfo, Reader, Storage, Writer

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 8 << 20  # S3 allows 10,000 parts, so shards up to 78 GiB
PARTS_IN_FLIGHT = 2
READ_ATTEMPTS = 8
REQUEST_PAYER = "AWS_REQUEST_PAYER"  # the variable; GDAL has the same
_WRITER = "one4all-writer"  # object metadata: which upload made it
_HEADERS = (
    "ContentType",
    "CacheControl",
    "ContentDisposition",
    "ContentEncoding",
    "ContentLanguage",
)
_EXPIRES = "Expires"  # a date; S3 gives it as text, too
_READ_BYTES = 1 << 20  # a broken body loses at most this much of what had arrived

_Result = TypeVar("_Result")


class S3Storage(Storage):
    """A bucket and a prefix."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    @property
    def _client(self) -> S3Client:
        return _client_for_environment()

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        request: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        if after:
            request["StartAfter"] = self._prefix + after
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(**request)
            for page in pages:
                for entry in page.get("Contents", []):
                    key = entry["Key"][len(self._prefix) :]
                    if key and not key.endswith("/"):
                        modified = entry["LastModified"].timestamp()
                        yield ObjectInfo(key, entry["Size"], entry["ETag"], modified)

    def list_data(self) -> Iterator[ObjectInfo]:
        # Not page by page through the records, which may be as many as the data.
        for info in self.list():
            if info.key.startswith(INTERNAL):
                yield from self.list(after=f"{INTERNAL}\U0010ffff")
                return
            yield info

    def head(self, key: str) -> ObjectInfo:
        with self._errors(key):
            head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
            modified = head["LastModified"].timestamp()
            return ObjectInfo(key, head["ContentLength"], head["ETag"], modified)

    def open(self, key: str, *, etag: str | None = None) -> Reader:
        return _S3Reader(self, key, etag)

    def read_range(self, key: str, start: int, size: int, *, etag: str | None = None) -> bytes:
        if not size:
            return b""
        reader = _S3Reader(self, key, etag, start=start, end=start + size)
        try:
            return b"".join(iter(lambda: reader.read(size), b""))
        finally:
            reader.close()

    def writer(
        self,
        key: str,
        *,
        guarded: bool = True,
        replaces: str | None = None,
        attributes: Attributes | None = None,
    ) -> Writer:
        if guarded and replaces is None:
            replaces = self.standing(key)
        return _S3Writer(self, key, replaces if guarded else None, attributes)

    def create(self, key: str, data: bytes) -> str:
        with self._errors(key):
            return self._client.put_object(
                Bucket=self._bucket, Key=self._prefix + key, Body=data, IfNoneMatch="*"
            )["ETag"]

    def replace(self, key: str, data: bytes, *, etag: str) -> str:
        def put(condition: str) -> str:
            with self._errors(key):
                return self._client.put_object(
                    Bucket=self._bucket, Key=self._prefix + key, Body=data, IfMatch=condition
                )["ETag"]

        try:
            return self._if_match(key, etag, put)
        except NotFoundError as error:
            raise ConflictError(str(error)) from error

    def age_seconds(self, key: str) -> float:
        with self._errors(key):
            head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        return (now - head["LastModified"]).total_seconds()

    def delete(self, key: str) -> None:
        with self._errors(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def check(self, *, writable: bool) -> None:
        # Nobody should wait a minute for a mistyped endpoint; a busy server deserves patience.
        for patient in (False, True):
            client = _client_for_environment(patient=patient)
            try:
                with self._errors(""):
                    client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
                return
            except StorageError as error:
                if patient:
                    raise AccessError(str(error)) from error

    def sweep(self, *, exclusive: bool) -> int:
        if not exclusive:
            return 0
        removed = 0
        with self._errors(""):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            for upload in (upload for page in pages for upload in page.get("Uploads", [])):
                if self._is_below_another_destination(upload["Key"][len(self._prefix) :]):
                    continue
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )
                removed += 1
        return removed

    def _is_below_another_destination(self, key: str) -> bool:
        """Whether a folder between the root and a key has records of its own."""
        folders = list(accumulate(key.split("/")[:-1], lambda above, name: f"{above}/{name}"))
        return any(next(self.list(f"{folder}/{INTERNAL}"), None) for folder in folders)

    def _if_match(self, key: str, etag: str, request: Callable[[str], _Result]) -> _Result:
        """Send a request under the condition that an object is still this version.

        Ceph compares the condition literally with an ETag without its quotes, so a conflict about
        an object that has not changed is tried again in that form.
        """
        try:
            return request(etag)
        except ConflictError:
            if self.head(key).etag != etag:
                raise
            return request(etag.strip('"'))

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Translate the SDK's errors into one sentence each."""
        import botocore.exceptions as sdk

        what = f"{self.uri}/{key}".rstrip("/")
        try:
            yield
        except sdk.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code == "NoSuchBucket":
                raise AccessError(f"bucket {self._bucket!r} does not exist") from error
            if code in ("NoSuchKey", "404", "NotFound"):
                raise NotFoundError(f"no such object: {what}") from error
            if code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                raise ConflictError(f"{what} exists already or has changed") from error
            if code == "InvalidObjectState":
                raise StorageError(
                    f"{what} is archived (Glacier or Deep Archive) and cannot be read; restore it "
                    "first, such as by aws s3api restore-object, and run again"
                ) from error
            if status in (401, 403) or code in ("InvalidAccessKeyId", "SignatureDoesNotMatch"):
                raise AccessError(
                    f"access to {what} was denied ({code}); check the AWS credentials and the "
                    "bucket policy; if the requester has to pay, set "
                    f"{REQUEST_PAYER}=requester"
                ) from error
            raise StorageError(f"{what}: {error}") from error
        except (sdk.NoCredentialsError, sdk.PartialCredentialsError) as error:
            raise AccessError(
                f"no AWS credentials for {what}; set AWS_PROFILE, AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or give this machine a role"
            ) from error
        except (sdk.EndpointConnectionError, sdk.ConnectTimeoutError) as error:
            raise AccessError(f"cannot reach the S3 server of {what}: {error}") from error
        # OSError: a file with credentials, such as a web identity token, is missing.
        except (sdk.BotoCoreError, sdk.HTTPClientError, ValueError, OSError) as error:
            raise StorageError(f"{what}: {error}") from error


def _client_for_environment(*, patient: bool = True) -> S3Client:
    """The client for this process and its AWS_* variables; impatient for start-up checks."""
    variables = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _client(os.getpid(), variables, patient)


@lru_cache(maxsize=4)
def _client(process_id: int, variables: tuple[tuple[str, str], ...], patient: bool) -> S3Client:
    """One client a process, since a client does not survive a fork.

    Raises:
        AccessError: No client can be made of the settings.
    """
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise UsageError("s3:// needs boto3: pip install boto3") from error
    config = Config(
        retries={"mode": "standard", "max_attempts": 8 if patient else 2},
        max_pool_connections=32,
        connect_timeout=5,
        read_timeout=60,
        tcp_keepalive=True,
    )
    try:
        # Not boto3's default session, which keeps the credentials that it saw first.
        client = boto3.Session().client("s3", config=config)
    except (BotoCoreError, ValueError, OSError) as error:
        raise AccessError(
            f"the AWS settings cannot be used: {str(error).rstrip('.')}; {_advice(error)}"
        ) from error
    if payer := os.environ.get(REQUEST_PAYER):
        if payer != "requester":
            raise AccessError(f"{REQUEST_PAYER} is {payer!r}; it must be requester, or not be set")
        client.meta.events.register("before-call.s3", _let_the_requester_pay)
    return client


def _advice(error: Exception) -> str:
    """What to do about settings of which no client can be made."""
    import botocore.exceptions as sdk

    if isinstance(error, sdk.ProfileNotFound):
        return "set AWS_PROFILE to a profile of ~/.aws/config, or unset it"
    if isinstance(error, sdk.InvalidRegionError):
        return "set AWS_DEFAULT_REGION, or region in ~/.aws/config, to a name such as eu-west-1"
    if isinstance(error, sdk.ConfigParseError):
        return "mend that file; AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE name others"
    if str(error).startswith("Invalid endpoint"):
        return "write AWS_ENDPOINT_URL with its scheme, such as https://host:9000"
    return "check the AWS_* variables and ~/.aws/config"


def _let_the_requester_pay(params: dict[str, Any], **_: Any) -> None:
    """Agree to pay for a request; a bucket whose owner pays does not look at it."""
    params["headers"]["x-amz-request-payer"] = "requester"


class _S3Reader:
    """One GET, resumed from the last good byte when the body breaks; pinned by If-Match.

    Args:
        storage, key, etag: Object, and its version.
        start: Place of the first byte.
        end: Place behind the last one, if it is not that of the object.
    """

    def __init__(
        self,
        storage: S3Storage,
        key: str,
        etag: str | None,
        *,
        start: int = 0,
        end: int | None = None,
    ) -> None:
        self._storage, self._key, self._etag = storage, key, etag
        self._position, self._end = start, end
        self._size = -1
        self._body: Any = None
        self._response: dict[str, Any] = {}
        self._connect()

    @property
    def attributes(self) -> Attributes:
        found = self._response
        headers = {name: found[name] for name in _HEADERS if found.get(name)}
        if expires := found.get("ExpiresString") or found.get(_EXPIRES):
            headers[_EXPIRES] = str(expires)
        metadata = {name: text for name, text in found["Metadata"].items() if name != _WRITER}
        return Attributes(headers, metadata, self._tags() if found.get("TagCount") else {})

    def _tags(self) -> dict[str, str]:
        storage = self._storage
        with storage._errors(self._key):
            found = storage._client.get_object_tagging(
                Bucket=storage._bucket, Key=storage._prefix + self._key
            )
        return {tag["Key"]: tag["Value"] for tag in found["TagSet"]}

    def read(self, size: int, /) -> bytes:
        import urllib3.exceptions
        from botocore.exceptions import BotoCoreError, FlexibleChecksumError

        for attempt in range(READ_ATTEMPTS):
            try:
                if self._body is None:
                    self._connect()
                data: bytes = self._body.read(min(size, _READ_BYTES))
            except FlexibleChecksumError as error:  # noticed at the end, when the bytes are used
                raise StorageError(f"{self._storage.uri}/{self._key}: {error}") from error
            except (BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
                self._drop()
                if attempt == READ_ATTEMPTS - 1:
                    raise StorageError(
                        f"{self._storage.uri}/{self._key}: reading broke off at byte "
                        f"{self._position:,} {READ_ATTEMPTS} times in a row: {error}"
                    ) from error
                _pause(attempt)
                continue
            if data or not size or self._position == self._size:
                self._position += len(data)
                return data
            self._drop()  # the body ended early without an error
            _pause(attempt)
        raise StorageError(
            f"{self._storage.uri}/{self._key}: ends at byte {self._position:,} of {self._size:,}"
        )

    def close(self) -> None:
        self._drop()

    def _connect(self) -> None:
        storage = self._storage
        request: dict[str, Any] = {
            "Bucket": storage._bucket,
            "Key": storage._prefix + self._key,
        }
        if self._position == self._size:
            self._body = io.BytesIO()
            return
        if self._position or self._end is not None:
            last = "" if self._end is None else self._end - 1
            request["Range"] = f"bytes={self._position}-{last}"

        def get(condition: str | None = None) -> Any:
            if condition is not None:
                request["IfMatch"] = condition
            with storage._errors(self._key):
                return storage._client.get_object(**request)

        try:
            if self._etag is None:
                response = get()
            else:
                response = storage._if_match(self._key, self._etag, get)
        except ConflictError as error:
            raise SourceChangedError(
                f"{storage.uri}/{self._key} changed since it was listed"
            ) from error
        self._etag = response["ETag"]
        self._size = self._position + response["ContentLength"]
        self._body = response.pop("Body")
        self._response = response

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None


class _S3Writer(Writer):
    """A multipart upload with a bounded number of parts in flight; one PUT if it is small."""

    def __init__(
        self, storage: S3Storage, key: str, replaces: str | None, attributes: Attributes | None
    ) -> None:
        super().__init__()
        self._storage, self._key = storage, key
        self._replaces = replaces  # None: whatever stands
        self._request: dict[str, Any] = {
            "Bucket": storage._bucket,
            "Key": storage._prefix + key,
        }
        self._buffer = bytearray()
        self._token = uuid.uuid4().hex
        self._described: dict[str, Any] = {"Metadata": {_WRITER: self._token}}
        if attributes is not None:
            self._described = _described(attributes, key, self._token)
        self._upload_id = ""
        self._pool: ThreadPoolExecutor | None = None
        self._in_flight: deque[Future[str]] = deque()
        self._etags: list[str] = []

    def _write(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= PART_BYTES:
            part = bytes(self._buffer[:PART_BYTES])
            del self._buffer[:PART_BYTES]
            self._send(part)

    def _send(self, part: bytes) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(PARTS_IN_FLIGHT, "upload")
            with self._storage._errors(self._key):
                created = self._storage._client.create_multipart_upload(
                    **self._request, **self._described
                )
            self._upload_id = created["UploadId"]
        while len(self._in_flight) >= PARTS_IN_FLIGHT:
            self._etags.append(self._in_flight.popleft().result())
        number = len(self._etags) + len(self._in_flight) + 1
        self._in_flight.append(self._pool.submit(self._upload, number, part))

    def _upload(self, number: int, part: bytes) -> str:
        with self._storage._errors(self._key):
            uploaded = self._storage._client.upload_part(
                **self._request, PartNumber=number, UploadId=self._upload_id, Body=part
            )
            return uploaded["ETag"]

    def _commit(self) -> str:
        if self._pool is None:
            return self._publish(self._put)
        if self._buffer:
            self._send(bytes(self._buffer))
            self._buffer.clear()
        while self._in_flight:
            self._etags.append(self._in_flight.popleft().result())
        etag = self._publish(self._complete)
        self._pool.shutdown()
        return etag

    def _publish(self, send: Callable[[dict[str, Any]], str]) -> str:
        """Send the request that makes the object visible, under its condition."""
        storage, replaces = self._storage, self._replaces
        try:
            if replaces is None:
                return send({})
            if replaces:
                return storage._if_match(self._key, replaces, lambda etag: send({"IfMatch": etag}))
            return send({"IfNoneMatch": "*"})
        except StorageError as error:
            # The answer to a first try may have been lost; the SDK's second then finds no upload,
            # or our own object under the key.
            if (etag := self._standing_etag()) is not None:
                return etag
            if isinstance(error, (ConflictError, NotFoundError)):
                raise ConflictError(
                    f"{storage.uri}/{self._key} was written by somebody else meanwhile; theirs is "
                    "kept"
                ) from error
            raise

    def _put(self, condition: dict[str, Any]) -> str:
        with self._storage._errors(self._key):
            return self._storage._client.put_object(
                **self._request,
                **condition,
                **self._described,
                Body=bytes(self._buffer),
            )["ETag"]

    def _complete(self, condition: dict[str, Any]) -> str:
        parts = [
            {"ETag": etag, "PartNumber": number} for number, etag in enumerate(self._etags, start=1)
        ]
        with self._storage._errors(self._key):
            done = self._storage._client.complete_multipart_upload(
                **self._request,
                **condition,
                UploadId=self._upload_id,
                MultipartUpload={"Parts": parts},  # type: ignore[typeddict-item]
            )
        # Ceph's answer holds an empty ETag, or one without the quotes that listings have.
        return self._standing_etag() or done["ETag"]

    def _standing_etag(self) -> str | None:
        """The ETag of the object under our key if this very upload made it."""
        try:
            with self._storage._errors(self._key):
                standing = self._storage._client.head_object(**self._request)
        except StorageError:
            return None
        return standing["ETag"] if standing["Metadata"].get(_WRITER) == self._token else None

    def _abort(self) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(cancel_futures=True)  # waits: a part that lands later is billed
        if self._upload_id:
            with self._storage._errors(self._key):
                self._storage._client.abort_multipart_upload(
                    **self._request, UploadId=self._upload_id
                )


def _described(attributes: Attributes, key: str, token: str) -> dict[str, Any]:
    """Attributes as a request to write an object has them."""
    headers = dict(attributes.headers)
    if "ContentType" not in headers and (guessed := mimetypes.guess_type(key)[0]):
        headers["ContentType"] = guessed
    request: dict[str, Any] = {**headers, "Metadata": {**attributes.metadata, _WRITER: token}}
    if expires := headers.get(_EXPIRES):
        request[_EXPIRES] = parsedate_to_datetime(expires)
    if attributes.tags:
        request["Tagging"] = urlencode(attributes.tags)
    return request


def _pause(attempt: int) -> None:
    """Exponential back-off with full jitter, 20 s at most (seconds; not part of any result)."""
    time.sleep(random.uniform(0, min(20.0, 0.1 * 2**attempt)))
