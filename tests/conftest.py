"""Fixtures: real servers and workers, started at first use; no test connects to another machine."""

from __future__ import annotations

import gc
import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import hypothesis
import hypothesis.configuration
import pytest
import redis

from tests.support import preloaded, rewriting, waiting
from tests.support.both_clients import OPENERS, OpenClient
from tests.support.loopback import only_loopback
from tests.support.processes import ROOT, clean_environment
from tests.support.servers import PictureServer, S3Server, Valkey, WorkerProcess
from tests.support.skips import unexpected_skips
from tests.support.waiting import wait_until as wait_until_true

hypothesis.settings.register_profile("fixed", deadline=None, max_examples=40, derandomize=True, database=None)
hypothesis.settings.register_profile(
    "seeded", deadline=None, max_examples=40, derandomize=False, database=None, print_blob=True
)
# What hypothesis keeps between runs must not lie in the source tree.
hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / f"hypothesis-{os.getuid()}")

FAILED = pytest.StashKey[bool]()
LEAST_WAIT_S = 30.0
"""No `wait_until` of a test gives up before: a busy machine may take long for what usually takes milliseconds."""
LONG = 80
"""Characters of a parameter that are enough for a test's name."""


def choose_seed(asked: str | None, *, is_ci: bool) -> str | None:
    """The seed of hypothesis' examples: as asked for, in CI a new one for each run; None for always the same ones."""
    return asked if asked is not None or not is_ci else str(random.SystemRandom().randrange(10**9))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose hypothesis' seed before its plugin reads the option, let processes be interrupted, make bytecode."""
    # pytest-xdist passes the option on, so all processes of a run have one seed.
    config.option.hypothesis_seed = choose_seed(config.getoption("hypothesis_seed"), is_ci=bool(os.environ.get("CI")))
    hypothesis.settings.load_profile("fixed" if config.option.hypothesis_seed is None else "seeded")
    waiting.least_s = LEAST_WAIT_S
    # Undo what `nohup` and a shell's `&` ignore: every process that a test starts would inherit it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    worker = getattr(config, "workerinput", None)
    if worker is None:
        rewriting.compile_sources(ROOT)
    else:
        number = int(worker["workerid"].removeprefix("gw"))
        rewriting.rewrite_part(config, ROOT / "tests", number=number, count=worker["workercount"])


def pytest_report_header(config: pytest.Config) -> str:
    """Print how to repeat the examples of this run."""
    seed = config.getoption("hypothesis_seed")
    return "hypothesis: always the same examples" if seed is None else f"hypothesis: --hypothesis-seed={seed}"


def _takes_long(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("slow", "long"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Group tests for parallel runs: a file's tests share servers in one process, and each long test is its own group.

    A file whose long tests also share its servers sets `pytestmark = pytest.mark.xdist_group(__name__)`.
    """
    for item in items:
        # A test with a real worker runs with one client; with the other one it is a long test.
        if (
            isinstance(item, pytest.Function)
            and {"open_client", "start_worker"} <= set(item.fixturenames)
            and item.callspec.params.get("open_client") == "asyncio"
        ):
            item.add_marker(pytest.mark.long)
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.name if _takes_long(item) else item.path.stem))
    if config.getoption("loadgroup", default=False):
        # Long tests come first, so that others can run in parallel; otherwise the order is random.
        items.sort(key=lambda item: 0 if _takes_long(item) else 1 if item.path.parent.name != "unit" else 2)


def pytest_collection_finish() -> None:
    """Exempt what was imported and collected from garbage collection, which otherwise visits it thousands of times."""
    gc.collect()
    gc.freeze()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Keep names short: a test's name is in the environment of its processes, which Linux limits to 128 KiB."""
    return ascii(val[:LONG]) if isinstance(val, str | bytes) and len(val) > LONG else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Let fixtures know at teardown whether their test failed, so that they show their logs."""
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed  # type: ignore[attr-defined]  # a TestReport
    return report


def skip_reasons(config: pytest.Config) -> Counter[str]:
    """Why tests were skipped in this run, and how many for each reason."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", ()) if reporter is not None else ()
    found = [report.longrepr[2] for report in reports if isinstance(report.longrepr, tuple)]
    return Counter(reason.removeprefix("Skipped: ") for reason in found)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print one line with the tests that were skipped on this machine, and why; and how much those of chance ran."""
    for report in terminalreporter.stats.get("passed", ()):
        for name, value in report.user_properties:
            if name == "ran":
                terminalreporter.write_line(f"ran {value}")
    reasons = skip_reasons(terminalreporter.config)
    if reasons:
        skipped = "; ".join(f"{count} because: {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"NOT TESTED HERE: {skipped}", yellow=True)
    if os.environ.get("CI"):
        for line in unexpected_skips(reasons):
            terminalreporter.write_line(f"FAILED: {line}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run in CI that skipped a test which a machine of CI can run."""
    if os.environ.get("CI") and session.exitstatus == 0 and unexpected_skips(skip_reasons(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session", autouse=True)
def _preloaded() -> Iterator[None]:
    """Let workers start from a process that has imported the libraries; it starts with the first of them."""
    preloaded.current = preloaded.Preloaded(root=ROOT, env=clean_environment({}))
    yield
    preloaded.current.stop()
    preloaded.current = None


@pytest.fixture(autouse=True)
def _loopback() -> Iterator[None]:
    """Fail a test whose process connects to an address that is not on loopback."""
    with pytest.MonkeyPatch.context() as patch, only_loopback(patch.setattr) as left:
        yield
    assert not left, f"expected connections to loopback only, got {left}"


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Remove environment variables that a library has set during a test, such as obstore's TOKIO_WORKER_THREADS.

    With one more variable than at the start, each later worker of this process would import its libraries anew.
    """
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:
        del os.environ[name]


@pytest.fixture(scope="session")
def valkey_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """The server behind `redis_url`."""
    with Valkey(folder=tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def redis_url(valkey_session: Valkey) -> str:
    """An empty real Valkey. One server for the whole run: do not stop it, use `valkey` for that."""
    with valkey_session.client() as client:
        client.flushall()
    return valkey_session.url


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of `redis_url`."""
    with redis.Redis.from_url(redis_url, socket_timeout=10) as client:
        yield client


@pytest.fixture(params=list(OPENERS))
def open_client(request: pytest.FixtureRequest) -> OpenClient:
    """Opens a client, once the blocking and once the asyncio one: `with open_client(redis_url) as client`."""
    opener: OpenClient = OPENERS[request.param]
    return opener


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A server for this test only, which keeps its data when it is killed and restarted."""
    with Valkey(folder=tmp_path / "valkey", config={"appendonly": "yes", "appendfsync": "always"}) as server:
        yield server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 store with the bucket `pictures`. One for the whole run: choose your own keys."""
    with S3Server(folder=tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def picture_server() -> Iterator[PictureServer]:
    """The server behind `http_server`, on one port for the whole run, so that workers can be set to allow it."""
    with PictureServer() as server:
        yield server


@pytest.fixture
def http_server(picture_server: PictureServer) -> PictureServer:
    """An HTTP server for images, good or faulty, with nothing to serve yet."""
    picture_server.clear()
    return picture_server


class StartWorker(Protocol):
    """Start a worker: settings by their names without prefix; `ready=False` does not wait for it."""

    def __call__(self, *, redis_url: str, ready: bool = True, **options: Any) -> WorkerProcess:
        """Return the started worker, which is stopped at the end of the test."""
        ...


@pytest.fixture
def start_worker(
    tmp_path: Path, picture_server: PictureServer, request: pytest.FixtureRequest
) -> Iterator[StartWorker]:
    """Starts real worker processes and stops them; shows their logs when the test fails.

    `start_worker(redis_url=redis_url, env=s3.env, lease_s=2, max_batch=2)`; names are worker-0, worker-1, …
    They may fetch from `http_server` unless `allow_hosts` is given. The largest batch is 8 unless given, because
    measuring batch sizes takes two seconds of a core at each start.
    """
    workers: list[WorkerProcess] = []

    def start(*, redis_url: str, ready: bool = True, **options: Any) -> WorkerProcess:
        name = f"worker-{len(workers)}"
        usual: dict[str, Any] = {"name": name, "allow_hosts": picture_server.host, "max_batch": 8}
        worker = WorkerProcess(redis_url=redis_url, folder=tmp_path, **(usual | options))
        workers.append(worker)
        worker.start()
        return worker.wait_ready() if ready else worker

    yield start
    for worker in workers:
        worker.stop()
        if request.node.stash.get(FAILED, False):
            print(f"--- {worker.name}, exit code {worker.exit_code} ---\n{worker.log_tail(lines=60)}")  # noqa: T201 pytest shows it with the failure


@pytest.fixture(scope="session")
def shared_worker(
    s3: S3Server, picture_server: PictureServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerProcess]:
    """One warm worker for `s3` and `http_server`, on a Valkey of its own: `shared_worker.redis_url`.

    For tests that enqueue and read answers: choose your own ids, stop nothing, flush nothing.
    """
    folder = tmp_path_factory.mktemp("shared-worker")
    with (
        Valkey(folder=folder / "valkey") as server,
        WorkerProcess(
            redis_url=server.url,
            folder=folder,
            name="shared",
            env=s3.env,
            allow_hosts=picture_server.host,
            max_batch=8,
            retry="unknown_label_set=2:0.1:0.1",
            share_images=True,
            vector_cache=20_000,
        ) as worker,
    ):
        yield worker.wait_ready()


@pytest.fixture
def silent_transformers() -> Iterator[None]:
    """No bars and remarks of transformers, which it shows when a test saves a checkpoint."""
    from tests.support.checkpoints import quiet_transformers  # noqa: PLC0415 loads transformers

    with quiet_transformers():
        yield


@pytest.fixture
def wait_until() -> Callable[..., Any]:
    """`wait_until(condition, timeout_s=5)`: return the condition's value when it is true."""
    return wait_until_true
