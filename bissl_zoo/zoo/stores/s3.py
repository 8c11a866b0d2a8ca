"""A zoo in a bucket of S3, or of a server that speaks its protocol with conditional writes."""

import contextlib
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores.store import Body, Conflict, Content, Transient, WritableStore

#: bytes that S3 takes in one request, which alone can be made conditional on what is there
PUT_LIMIT = 5 << 30
_BLOCK = 1 << 20
_LOCATION = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/([^?#]*))?", re.IGNORECASE)
_BUSY = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
_REFUSED = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"}


class _Missing(ZooError):
    """There is no such object."""


class S3Store(WritableStore):
    """Objects below a prefix of a bucket.

    Credentials, region and endpoint are those that boto3 finds (`AWS_PROFILE`, `AWS_ENDPOINT_URL_S3`, ...). Where it
    finds no credentials, requests are anonymous, which is enough to read a public bucket.

    Writing relies on conditional requests (If-None-Match and If-Match of PutObject). A server that ignores them would
    let two publishers overwrite each other's index unseen, so the first write of a store tries them out.
    """

    def __init__(self, location: str) -> None:
        parts = _LOCATION.fullmatch(location)
        if parts is None:
            shown = re.sub(r"//[^/]*@", "//", location)
            raise ZooError(
                f"'{shown}' is not the address of an S3 zoo, which is s3://BUCKET or s3://BUCKET/FOLDER. Credentials "
                "do not belong in it; boto3 takes them from the environment or ~/.aws."
            )
        prefix = (parts[2] or "").strip("/")
        self.location = "/".join(filter(None, [f"s3://{parts[1]}", prefix]))
        self._bucket, self._prefix = parts[1], f"{prefix}/" if prefix else ""
        self._tried_conditions = False
        with _telling(self.location):
            self._client, self._anonymous = _connect()

    def read(self, path: str, limit: int) -> Content | None:
        """See :class:`Store`."""
        try:
            with self._telling(path):
                answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + path)
                with contextlib.closing(answer["Body"]) as body:
                    if answer["ContentLength"] > limit:
                        raise ZooError(
                            f"{self.location}/{path} has {answer['ContentLength']:,} bytes, more than the {limit:,} "
                            "that such a file may have."
                        )
                    return Content(body.read(), answer["ETag"])
        except _Missing:
            return None

    @contextlib.contextmanager
    def open(self, path: str, offset: int = 0) -> Iterator[Body]:
        """See :class:`Store`."""
        span = {"Range": f"bytes={offset}-"} if offset else {}
        with contextlib.ExitStack() as stack:
            try:
                with self._telling(path):
                    answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + path, **span)
                blocks = self._blocks(path, stack.enter_context(contextlib.closing(answer["Body"])))
            except _PastTheEnd:
                blocks = iter(())
            yield Body(offset, blocks)

    def create(self, path: str, source: Path | bytes) -> None:
        """See :class:`WritableStore`."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > PUT_LIMIT:
            raise ZooError(f"{source} has {size:,} bytes; a file of an S3 zoo may have {PUT_LIMIT:,} at most.")
        self._require_conditions()
        self._put(path, source, IfNoneMatch="*")

    def replace(self, path: str, content: bytes, tag: str | None) -> None:
        """See :class:`WritableStore`."""
        self._require_conditions()
        try:
            self._put(path, content, **({"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}))
        except _Missing as error:
            raise Conflict(f"{self.location}/{path} was removed by another process.") from error

    def folders(self) -> list[str]:
        """See :class:`WritableStore`."""
        found = [page.get("CommonPrefixes", []) for page in self._pages(self._prefix, Delimiter="/")]
        names = [item["Prefix"].removeprefix(self._prefix).rstrip("/") for items in found for item in items]
        return sorted(name for name in names if name and not name.startswith("."))

    def remove_folder(self, name: str) -> None:
        """See :class:`WritableStore`."""
        for page in self._pages(f"{self._prefix}{name}/"):
            for item in page.get("Contents", []):
                self.remove(item["Key"].removeprefix(self._prefix))

    def remove(self, path: str) -> None:
        """See :class:`WritableStore`."""
        with self._telling(path):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + path)

    def _put(self, path: str, source: Path | bytes, **condition: str) -> None:
        attempt = secrets.token_hex(8)
        with contextlib.ExitStack() as stack:
            body = source if isinstance(source, bytes) else stack.enter_context(open(source, "rb"))
            try:
                with self._telling(path):
                    self._client.put_object(
                        Bucket=self._bucket,
                        Key=self._prefix + path,
                        Body=body,
                        Metadata={"attempt": attempt},
                        **condition,
                    )
            except Transient:
                # only the answer may have been lost; the caller's next attempt would meet its own file
                if self._attempt_at(path) != attempt:
                    raise

    def _attempt_at(self, path: str) -> str | None:
        try:
            with self._telling(path):
                found = self._client.head_object(Bucket=self._bucket, Key=self._prefix + path)
        except _Missing:
            return None
        return found["Metadata"].get("attempt")

    def _require_conditions(self) -> None:
        """Raise `ZooError` where the server writes although the condition does not hold.

        Reading an index back after its replacement could not tell: what is found may as well be the next publisher's,
        who had rightly read this one.
        """
        if self._tried_conditions:
            return
        probe = f".conditions-{secrets.token_hex(8)}"
        self._put(probe, b"")
        try:
            for condition in ({"IfNoneMatch": "*"}, {"IfMatch": f'"{"0" * 32}"'}):
                try:
                    self._put(probe, b"", **condition)
                except Conflict:
                    continue
                raise ZooError(
                    f"The server of {self.location} ignores {next(iter(condition))}, so that publishers could "
                    "overwrite each other's entries. Publish to a folder and copy it there, or update the server."
                )
        finally:
            self.remove(probe)
        self._tried_conditions = True

    def _blocks(self, path: str, body: Any) -> Iterator[bytes]:
        with self._telling(path):
            yield from body.iter_chunks(_BLOCK)

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        with self._telling(""):
            paginator = self._client.get_paginator("list_objects_v2")
            yield from paginator.paginate(Bucket=self._bucket, Prefix=prefix, **options)

    def _telling(self, path: str) -> contextlib.AbstractContextManager[None]:
        return _telling(f"{self.location}/{path}".rstrip("/"), self._anonymous)


class _PastTheEnd(ZooError):
    """The range begins where the object ends."""


def _connect() -> tuple[Any, bool]:
    """A client, and whether it is anonymous."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    session = boto3.Session()
    anonymous = session.get_credentials() is None
    options = Config(
        retries={"total_max_attempts": 1},  # whoever uses a store decides what is tried again
        connect_timeout=10,
        signature_version=UNSIGNED if anonymous else None,
    )
    return session.client("s3", config=options), anonymous


@contextlib.contextmanager
def _telling(address: str, anonymous: bool = False) -> Iterator[None]:
    """Raise what boto3 raises inside as an error for people."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise ZooError(f'{address} needs boto3. Install it with: pip install "bissl_zoo[s3]"') from error
    try:
        yield
    except ClientError as error:
        raise _answer_told(error.response, address, anonymous) from error
    except BotoCoreError as error:
        raise _failure_told(error, address) from error


def _answer_told(answer: dict[str, Any], address: str, anonymous: bool) -> ZooError:
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code, message = answer.get("Error", {}).get("Code", ""), answer.get("Error", {}).get("Message", "")
    told = f"{address}: the server answered {status} {code} ({message})."
    if code in _BUSY or status in (429, 500, 502, 503, 504):
        return Transient(told)
    if code == "NoSuchBucket":
        return ZooError(f"{address}: there is no such bucket. Correct the name, or create it.")
    if status == 404:
        return _Missing(f"{address} does not exist.")
    if status in (409, 412):
        return Conflict(f"{address} was written by another process. {told}")
    if status == 416:
        return _PastTheEnd(told)
    if anonymous and status in (401, 403):
        return ZooError(
            f"{told} No credentials were found, so it was asked anonymously. Run `aws configure`, or set AWS_PROFILE, "
            "or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    if code in _REFUSED or status in (401, 403):
        return ZooError(
            f"{told} Check with `aws sts get-caller-identity` whose credentials these are. Reading takes the rights "
            "s3:GetObject and s3:ListBucket (without the latter a missing file is refused as well), publishing also "
            "s3:PutObject and s3:DeleteObject."
        )
    return ZooError(told)


def _failure_told(error: Exception, address: str) -> ZooError:
    from botocore import exceptions as boto

    if isinstance(error, boto.SSLError):
        return ZooError(
            f"{address}: the server's certificate was not accepted ({error}). Set AWS_CA_BUNDLE to its own."
        )
    if isinstance(error, (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError)):
        return Transient(f"{address}: {error} Check the network, and AWS_ENDPOINT_URL_S3 where it is set.")
    return ZooError(f"{address}: {error} Check the settings of AWS (`aws configure list`).")
