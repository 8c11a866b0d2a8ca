"""A zoo in a repository of the Hugging Face hub."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores.store import Body, Conflict, Content, Transient, WritableStore

_BLOCK = 1 << 20
_TIMEOUT_S = 30
_INDEX_LIMIT = 1 << 30
_LOCATION = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)


class _Missing(ZooError):
    """There is no such file."""


class HubStore(WritableStore):
    """Files of a model repository, at a branch, a tag or a commit: `hf://user/repo`, `hf://user/repo@revision`.

    The token is the one that huggingface_hub finds (`hf auth login`, `HF_TOKEN`), and the hub that of `HF_ENDPOINT`.

    A publication is one commit. `create` only remembers a file, and `replace` commits what was created together with
    the index, so that nobody sees half of an entry and a publisher that is killed leaves nothing behind. Files whose
    name begins with '.' claim a name among the publishers of this store, and are never sent.
    """

    def __init__(self, location: str) -> None:
        parts = _LOCATION.fullmatch(location.rstrip("/"))
        if parts is None:
            raise ZooError(
                f"'{location}' is not the address of a zoo on the hub. Write hf://USER/REPO or "
                "hf://USER/REPO@REVISION. It is a model repository, with the zoo at its top."
            )
        self.location = location.rstrip("/")
        self.repo, self.revision = parts[1], parts[2] or "main"
        self._pending: dict[str, Path | bytes] = {}
        self._hub = _library(self.location)
        self._api = self._hub.HfApi()

    def read(self, path: str, limit: int) -> Content | None:
        """See :class:`Store`. The tag is the commit that the content belongs to."""
        commit = self._commit()
        content = bytearray()
        try:
            with self._answer(path, commit) as answer:
                for block in self._blocks(path, answer):
                    content += block
                    if len(content) > limit:
                        raise ZooError(f"{self.location}/{path} has more than the {limit:,} bytes it may have.")
        except _Missing:
            return None
        return Content(bytes(content), commit)

    @contextlib.contextmanager
    def open(self, path: str, offset: int = 0) -> Iterator[Body]:
        """See :class:`Store`."""
        with self._answer(path, self.revision, offset) as answer:
            if answer.status_code == 416:  # the file ends where the range begins
                yield Body(offset, iter(()))
            else:
                yield Body(offset if answer.status_code == 206 else 0, self._blocks(path, answer))

    def create(self, path: str, source: Path | bytes) -> None:
        """See :class:`WritableStore`. Nothing is sent before `replace`."""
        folder, _, name = path.rpartition("/")
        taken = folder if name.startswith(".") else path
        if path in self._pending or self._present([taken], self.revision):
            raise Conflict(f"{self.location}/{taken} exists already.")
        self._pending[path] = source

    def replace(self, path: str, content: bytes, tag: str | None) -> None:
        """See :class:`WritableStore`.

        Raises:
            ZooError: somebody else has published an entry of a name that was claimed here, which a claim cannot
                prevent on the hub. Publishing once more takes the next version.
        """
        parent = tag or self._commit()
        if tag is None and self._present([path], parent):
            raise Conflict(f"{self.location}/{path} was written by another process.")
        files = {name: source for name, source in self._pending.items() if not _is_claim(name)}
        taken = self._present(list(files), parent)
        if taken:
            raise ZooError(
                f"{self.location}/{taken[0]} was published by another process meanwhile, or by an attempt of this one "
                "whose answer was lost. Look at what is there; publish again for the next version."
            )
        names = sorted({name.partition("/")[0] for name in files})
        message = f"Publish {', '.join(names)}" if names else f"Update {path}"
        # operations cannot be used twice, so each attempt has its own
        adding = [self._hub.CommitOperationAdd(name, source) for name, source in {**files, path: content}.items()]
        try:
            self._send(adding, message, parent)
        except Transient:
            # only the answer may have been lost; the caller's next attempt would meet its own commit
            present = self.read(path, _INDEX_LIMIT)
            if present is None or present.content != content:
                raise
        self._pending.clear()

    def folders(self) -> list[str]:
        """See :class:`WritableStore`."""
        with self._telling(""):
            found = list(self._api.list_repo_tree(self.repo, recursive=False, revision=self.revision))
        names = [item.path for item in found if isinstance(item, self._hub.hf_api.RepoFolder)]
        return sorted(name for name in names if not name.startswith("."))

    def remove_folder(self, name: str) -> None:
        """See :class:`WritableStore`. A folder created here and not sent yet is only forgotten."""
        created = [path for path in self._pending if path.startswith(f"{name}/")]
        for path in created:
            del self._pending[path]
        if not created and self._present([name], self.revision):
            self._send([self._hub.CommitOperationDelete(f"{name}/", is_folder=True)], f"Remove {name}")

    def remove(self, path: str) -> None:
        """See :class:`WritableStore`. A file created here and not sent yet is only forgotten."""
        created = self._pending.pop(path, None) is not None
        if not created and not _is_claim(path) and self._present([path], self.revision):
            self._send([self._hub.CommitOperationDelete(path, is_folder=False)], f"Remove {path}")

    def _commit(self) -> str:
        with self._telling(""):
            return self._api.model_info(self.repo, revision=self.revision, timeout=_TIMEOUT_S).sha

    def _present(self, paths: list[str], revision: str) -> list[str]:
        """Those of the files and folders that there are."""
        with self._telling(""):
            return (
                [found.path for found in self._api.get_paths_info(self.repo, paths, revision=revision)] if paths else []
            )

    def _send(self, operations: list[Any], message: str, parent: str | None = None) -> None:
        with self._telling(""):
            self._api.create_commit(
                self.repo, operations, commit_message=message, revision=self.revision, parent_commit=parent
            )

    @contextlib.contextmanager
    def _answer(self, path: str, revision: str, offset: int = 0) -> Iterator[Any]:
        utils = self._hub.utils
        url = self._hub.hf_hub_url(self.repo, path, revision=revision)
        headers = {**utils.build_hf_headers(), "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with contextlib.ExitStack() as stack:
            with self._telling(path):
                stream = utils.get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S)
                answer = stack.enter_context(stream)
                if answer.status_code != 416:
                    utils.hf_raise_for_status(answer)
            yield answer

    def _blocks(self, path: str, answer: Any) -> Iterator[bytes]:
        with self._telling(path):
            yield from answer.iter_bytes(_BLOCK)

    @contextlib.contextmanager
    def _telling(self, path: str) -> Iterator[None]:
        """Raise what huggingface_hub raises inside as an error for people."""
        try:
            yield
        except (self._hub.errors.HTTPError, OSError, RuntimeError, ValueError) as error:
            raise self._told(error, f"{self.location}/{path}".rstrip("/")) from error

    def _told(self, error: Exception, address: str) -> ZooError:
        errors = self._hub.errors
        status = getattr(getattr(error, "response", None), "status_code", 0)
        message = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, (errors.HTTPError, OSError)):
            return self._told(error.__cause__, address)  # of an upload, which runs in a thread
        if isinstance(error, errors.OfflineModeIsEnabled):
            return ZooError(f"{address} cannot be reached while HF_HUB_OFFLINE is set; unset it.")
        if isinstance(error, errors.EntryNotFoundError):
            return _Missing(f"{address} does not exist.")
        if isinstance(error, errors.GatedRepoError):
            return ZooError(
                f"{self.repo} is gated: accept its terms on its page of the hub, then log in with `hf auth login` or "
                "set HF_TOKEN."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return ZooError(
                f"{self.repo} has no revision '{self.revision}'. Name one of its branches, tags or commits."
            )
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            return ZooError(
                f"The hub shows no repository {self.repo}. Create it with `hf repo create {self.repo}`; if it is a "
                "private one, log in with `hf auth login` or set HF_TOKEN to a token that may read it."
            )
        if status in (401, 403):
            return ZooError(
                f"{address}: the hub answered {status} ({message}). Log in with `hf auth login`, or set HF_TOKEN to a "
                "token with the rights for it (publishing takes one that may write to the repository)."
            )
        if status in (409, 412):
            return Conflict(f"{address} was changed by another process: {message}")
        if status == 429 or status >= 500:
            return Transient(f"{address}: the hub answered {status} ({message}).")
        if not status and isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError)):
            return Transient(
                f"{address}: {type(error).__name__}: {message}. Check the network, and HF_ENDPOINT if set."
            )
        return ZooError(f"{address}: {message}")


def _is_claim(path: str) -> bool:
    return path.rpartition("/")[2].startswith(".")


def _library(location: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.hf_api
        import huggingface_hub.utils
    except ImportError as error:
        raise ZooError(f'{location} needs huggingface_hub. Install it with: pip install "bissl_zoo[hub]"') from error
    if int(huggingface_hub.__version__.partition(".")[0]) < 1:
        raise ZooError(
            f"{location} needs huggingface_hub 1.0 or newer, and {huggingface_hub.__version__} is installed. "
            'Upgrade it with: pip install -U "bissl_zoo[hub]"'
        )
    return huggingface_hub
