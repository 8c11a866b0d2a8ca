"""A zoo in a model repository of the Hugging Face hub: read with its fsspec file system, published in one commit."""

import random
import re
import time
from collections.abc import Callable
from typing import Any

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.card import PAGE_FILE, render_page
from bissl_zoo.zoo.index import INDEX_FILE, Index, parse_index
from bissl_zoo.zoo.stores import Draft, Missing, Transient
from bissl_zoo.zoo.stores.fsspec import FsspecStore

ATTEMPTS = 20
_LOCATION = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)


class Conflict(ZooError):
    """Another commit was made since the index was read."""


class HuggingFaceStore(FsspecStore):
    """`hf://USER/REPO` or `hf://USER/REPO@REVISION`, with the zoo at the top of a model repository.

    The token is the one that huggingface_hub finds (`hf auth login`, `HF_TOKEN`), and the hub that of `HF_ENDPOINT`.
    An entry, the index and the page are one commit on top of the commit whose index was read; the hub refuses it if
    another commit was made since. A killed publisher leaves nothing.
    """

    writable = True

    def __init__(self, location: str) -> None:
        parts = _LOCATION.fullmatch(location.rstrip("/"))
        if parts is None:
            raise ZooError(f"'{location}' is not a zoo on the hub. Write hf://USER/REPO or hf://USER/REPO@REVISION.")
        try:
            import huggingface_hub
        except ImportError as error:
            raise ZooError(f'{location} needs huggingface_hub: pip install "bissl_zoo[hub]".') from error
        self._hub = huggingface_hub
        self.repo, self.revision = parts[1], parts[2] or "main"
        self.location = location.rstrip("/")
        self.files = huggingface_hub.HfFileSystem(skip_instance_cache=True, use_listings_cache=False)
        self.root = self._at(self.revision)
        self._api = huggingface_hub.HfApi()

    def publish(self, draft: Draft) -> str:
        """See :class:`Store`."""
        tried: dict[str, Any] = {}

        def change(index: Index) -> tuple[Index, list[Any], str] | None:
            sent = [name for name, record in tried.items() if index.records.get(name) == record]
            if sent:  # the answer to an earlier attempt was lost
                return None
            name = index.next_name(draft.base)
            record = draft.complete(name)
            existing = index.find_same(draft.base, record["files"]) if draft.once else None
            tried.pop(existing or name, None)
            tried[existing or name] = record
            if existing:
                return None
            files = {f"{name}/{file}": draft.folder / file for file in record["files"]}
            operations = [self._hub.CommitOperationAdd(path, file) for path, file in files.items()]
            return index.add(name, record), operations, f"Publish {name}"

        self._change(change)
        return list(tried)[-1]

    def remove(self, name: str) -> None:
        """See :class:`Store`. The files stay in the history of the repository."""
        attempts = iter(range(ATTEMPTS))

        def change(index: Index) -> tuple[Index, list[Any], str] | None:
            first = next(attempts) == 0
            if name not in index.records:
                if not first:  # the answer to an earlier attempt was lost
                    return None
                raise ZooError(f"{self.location} lists no entry '{name}', so nothing was removed.")
            return index.remove(name), [self._hub.CommitOperationDelete(f"{name}/", is_folder=True)], f"Remove {name}"

        self._change(change)

    def _change(self, change: Callable[[Index], tuple[Index, list[Any], str] | None]) -> None:
        """Commit what `change` makes of the index; repeat if another commit was made meanwhile."""
        for attempt in range(ATTEMPTS):
            try:
                with self._errors(""):
                    commit = self._api.model_info(self.repo, revision=self.revision).sha
                index = self._index(commit)
                changed = change(index)
                if changed is None:
                    return
                index, operations, message = changed
                for path, content in ((INDEX_FILE, index.to_bytes()), (PAGE_FILE, render_page(index).encode())):
                    operations.append(self._hub.CommitOperationAdd(path, content))
                with self._errors(""):
                    self._api.create_commit(
                        self.repo,
                        operations,
                        commit_message=message,
                        revision=self.revision,
                        parent_commit=commit,
                    )
                return
            except (Conflict, Transient) as error:
                if attempt + 1 == ATTEMPTS:
                    raise ZooError(f"{error} Gave up after {ATTEMPTS} attempts.") from error
            time.sleep(random.SystemRandom().uniform(0.0, min(5.0, 0.1 * 2**attempt)))

    def _index(self, commit: str) -> Index:
        main, self.root = self.root, self._at(commit)
        try:
            return parse_index(self.read_index(INDEX_FILE), f"{self.location}/{INDEX_FILE}")
        finally:
            self.root = main

    def _at(self, revision: str) -> str:
        return f"{self.repo}@{revision.replace('/', '%2F')}"

    def _open(self, path: str, start: int) -> Any:
        # without blocks the file is one streamed response, which cannot seek
        stream = self.files.open(path, "rb", block_size=1 << 24 if start else 0)
        stream.seek(start)
        return stream

    def _error(self, error: Exception, address: str) -> ZooError:
        """See :class:`FsspecStore`."""
        errors, message = self._hub.errors, " ".join(str(error).split())
        address = address.rstrip("/")
        status = getattr(getattr(error, "response", None), "status_code", 0)
        # the error of an upload in a thread, or of a repository that does not exist
        cause = error.__cause__ if isinstance(error, RuntimeError | FileNotFoundError) else None
        if isinstance(cause, errors.HTTPError | OSError):
            return self._error(cause, address)
        if isinstance(error, errors.OfflineModeIsEnabled):
            return ZooError(f"{address} cannot be reached while HF_HUB_OFFLINE is set.")
        if isinstance(error, errors.RevisionNotFoundError):
            return ZooError(f"{self.repo} has no revision '{self.revision}'.")
        if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
            return ZooError(
                f"{address}: the hub answered {status} ({message}). Check that the repository exists (`hf repo create "
                f"{self.repo}`) and that you may read, and for publishing write, it: `hf auth login`, or HF_TOKEN."
            )
        if status in (409, 412):
            return Conflict(f"{address} was changed by another process.")
        if status == 429 or status >= 500 or (not status and isinstance(error, errors.HTTPError | ConnectionError)):
            return Transient(f"{address}: {message or type(error).__name__}. Check the network and HF_ENDPOINT.")
        if isinstance(error, FileNotFoundError | errors.EntryNotFoundError):
            return Missing(f"{address} does not exist.")
        return ZooError(f"{address}: {type(error).__name__}: {message}.")
