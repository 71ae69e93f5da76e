"""Certificates for tests, made by the program `openssl`, which comes with a machine's own certificates."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate that vouches for itself, and its key; both PEM files."""

    path: Path
    key: Path

    @classmethod
    def make(cls, folder: Path, *, name: str) -> Certificate:
        """A certificate for one host name, good for two days."""
        made = cls(folder / f"{name}.pem", folder / f"{name}.key")
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-nodes", "-days", "2", "-newkey", "ec"),
                *("-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", f"/CN={name}"),
                # rustls takes no authority's certificate for a server's.
                *("-addext", "basicConstraints=critical,CA:FALSE"),
                *("-addext", f"subjectAltName=DNS:{name}", "-keyout", str(made.key), "-out", str(made.path)),
            ],
            check=True,
            capture_output=True,
            timeout=30,
        )
        return made

    def server_context(self) -> ssl.SSLContext:
        """What a server needs to show it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path, self.key)
        return context
