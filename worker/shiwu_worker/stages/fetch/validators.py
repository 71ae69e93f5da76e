"""ETags: what a source says about the version of a file, and to which address that belongs.

Only strong ETags count, because a weak one may stand for other bytes. An ETag is sent to the address only from which it
came: a redirect may lead to another server, whose ETags mean other files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import msgspec

MAX_ETAG_CHARS: Final = 200
_STRONG: Final = re.compile(rf'"[\x21\x23-\x7e]{{1,{MAX_ETAG_CHARS - 2}}}"')
_PLACE: Final = re.compile(r"[0-9a-f]{32}")
OWN_STORE: Final = "0" * 32
"""The place of every object of the configured store: its reference says the rest."""


class Validator(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """The ETag of a file, and the digest of the URL that gave it; a digest, because URLs may have secrets."""

    etag: str
    place: str

    @property
    def is_valid(self) -> bool:
        """Whether both parts have the form that `validator_of` gives them."""
        return _STRONG.fullmatch(self.etag) is not None and _PLACE.fullmatch(self.place) is not None

    def etag_for(self, place: str) -> str | None:
        """The ETag to send to this place, or None where it belongs to another."""
        return self.etag if self.place == place else None


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """The bytes of a file, and what can later be asked instead of them."""

    data: bytes
    validator: Validator | None = None


def place_of(url: str) -> str:
    """The digest of a URL."""
    return blake2b(url.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def validator_of(etag: str | None, place: str) -> Validator | None:
    """The validator of a reply; None without a strong ETag of usual length."""
    etag = (etag or "").strip()
    return Validator(etag, place) if _STRONG.fullmatch(etag) else None
