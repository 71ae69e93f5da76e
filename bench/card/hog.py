"""`python -m bench.card.hog MIB`: take the GPU's memory but for so many MiB, say `ready`, and keep it until SIGTERM."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tests.support.processes import Process, clean_environment
from tests.support.waiting import wait_until

READY_S = 30.0


@contextmanager
def taking_all_but(mib: int, *, folder: Path) -> Iterator[None]:
    """Run a hog until the block ends. On a CPU it takes nothing."""
    command = [sys.executable, "-m", "bench.card.hog", str(mib)]
    with Process(command, name=f"hog-{mib}", folder=folder, env=clean_environment({})) as hog:
        wait_until(lambda: "ready" in hog.log_text() or not hog.is_running, timeout_s=READY_S, what="the hog is ready")
        if not hog.is_running:
            raise hog.error("expected to hold memory")
        yield


def main() -> None:
    """Take the memory."""
    kept = None
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        kept = torch.empty(max(1, free - int(sys.argv[1]) * 2**20), dtype=torch.uint8, device="cuda")
    print("ready", flush=True)
    signal.sigwait([signal.SIGTERM])
    del kept


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    main()
