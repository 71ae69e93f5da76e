"""What a worker knows of files that it fetched before: their ETag, and the hash of their bytes."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from shiwu_worker.stages.fetch.validators import Validator


class KnownFile(NamedTuple):
    """A file as it was when it was fetched."""

    validator: Validator
    sha256: str


class KnownFiles:
    """The files of the last references, up to `size`. Not thread-safe.

    A reference is kept as a digest, because it may be long, and a signed one has a secret. It counts with its query, so
    what one signature reads is never taken for what another reads.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._files: OrderedDict[bytes, KnownFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def note(self, reference: str, file: KnownFile) -> None:
        """Remember what a fetch of this reference gave."""
        key = _key(reference)
        self._files[key] = file
        self._files.move_to_end(key)
        if len(self._files) > self._size:
            self._files.popitem(last=False)

    def find(self, reference: str) -> KnownFile | None:
        """What the last fetch of this reference gave."""
        return self._files.get(_key(reference))

    def clear(self) -> None:
        """Forget all."""
        self._files.clear()


def _key(reference: str) -> bytes:
    return blake2b(reference.encode(errors="surrogatepass"), digest_size=16).digest()
