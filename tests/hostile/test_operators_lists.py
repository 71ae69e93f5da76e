"""The operator's lists of hosts, networks, buckets and folders, and the proxy that is configured on purpose."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from shiwu.network.address_rules import HostList
from shiwu_worker.config.settings import Settings
from shiwu_worker.config.views import access_rules
from shiwu_worker.errors import Rejected, Unavailable, Unreachable
from shiwu_worker.policy.access_rules import AccessRules, allows_bucket
from shiwu_worker.stages.fetch.local_files import LocalFiles
from tests.hostile.conftest import BODY, PLAIN, SECRET, World, failure
from tests.support.picture_server import PictureServer

LISTS = [
    # what is asked, the rules, whether it arrives
    ("http://inner.example:IN/a", {"allow_hosts": ("inner.example",)}, True),
    ("http://inner.example:IN/a", {"allow_hosts": ("inner.example:IN",)}, True),
    ("http://inner.example:IN/a", {"allow_hosts": ("inner.example:81",)}, False),
    ("http://inner.example:IN/a", {"allow_hosts": ("*.example",)}, True),
    ("http://inner.example:IN/a", {"allow_hosts": ("*.inner.example",)}, False),
    ("http://inner.example:IN/a", {"allow_hosts": ("*.ample",)}, False),
    ("http://inner.example:IN/a", {"allow_hosts": ("127.0.0.2",)}, False),
    ("http://127.0.0.2:IN/a", {"allow_hosts": ("127.0.0.2",)}, True),
    ("http://[::ffff:127.0.0.2]:IN/a", {"allow_hosts": ("127.0.0.2",)}, False),
    ("http://inner.example:IN/a", {"allow_networks": ("127.0.0.0/30",)}, True),
    ("http://mapped.example:IN/a", {"allow_networks": ("127.0.0.0/30",)}, True),
    ("http://inner.example:IN/a", {"allow_networks": ("127.0.0.0/30",), "deny_networks": ("127.0.0.2/32",)}, False),
    ("http://mapped.example:IN/a", {"allow_networks": ("127.0.0.0/30",), "deny_networks": ("127.0.0.2/32",)}, False),
    ("http://inner.example:IN/a", {"allow_hosts": ("inner.example",), "deny_networks": ("127.0.0.2/32",)}, False),
    ("http://inner.example:IN/a", {"allow_hosts": ("inner.example",), "deny_hosts": ("inner.example",)}, False),
    ("http://good.example:OUT/a", {"deny_hosts": ("good.example",)}, False),
    ("http://GOOD.example.:OUT/a", {"deny_hosts": ("good.example",)}, False),
    ("http://good.example:OUT/a", {"deny_hosts": ("Good.Example:OUT",)}, False),
    ("http://good.example:OUT/a", {"deny_hosts": ("good.example:81", "other.example")}, True),
    ("http://good.example:OUT/a", {"deny_networks": ("127.0.0.0/8",)}, False),
    ("http://good.example:OUT/a", {"only_hosts": ("*.example",)}, True),
    ("http://good.example:OUT/a", {"only_hosts": ("other.example",)}, False),
    ("http://inner.example:IN/a", {"only_hosts": ("inner.example",)}, False),
    ("http://inner.example:IN/a", {"only_hosts": ("other.example",), "allow_hosts": ("inner.example",)}, True),
    ("http://good.example:OUT/a", {"ports": (80, 443)}, False),
    ("http://good.example:OUT/a", {"ports": (80, 443), "allow_hosts": ("good.example",)}, True),
]


@pytest.mark.parametrize(("url", "rules", "arrives"), LISTS)
def test_deny_overrides_allow(world: World, url: str, rules: dict[str, tuple[str, ...]], arrives: bool) -> None:
    """Hosts by name, networks by address, also for names that the operator trusts."""
    changed = {
        name: tuple(world.url(entry) if isinstance(entry, str) else entry for entry in entries)
        for name, entries in rules.items()
    }
    fetcher = world.fetcher(**changed)
    if arrives:
        assert fetcher.fetch(world.url(url)) == BODY
    else:
        assert isinstance(failure(fetcher, world.url(url)), Unreachable)
        assert not world.inner.hits + world.outer.hits


def test_answers_tell_refusals_if_the_operator_wants_it(world: World) -> None:
    """With its own code; a name that does not exist keeps the other one."""
    error = failure(world.fetcher(tells_refusals=True), world.url(f"http://inner.example:IN/a?{SECRET}"))
    assert (type(error), error.code.value) == (Rejected, "source_forbidden")
    assert "127.0.0.2 is not public: loopback" in str(error)
    assert isinstance(failure(world.fetcher(tells_refusals=True), "http://none.example/a"), Unreachable)


@pytest.mark.parametrize("entry", ["", "a b", "http://a", "a/b", "user@a", "a:0", "a:65536", "*", "a.*.b", "*."])
def test_entry_that_is_no_host_is_refused_at_the_start(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty list could be mistaken for one that forbids everything."""
    with pytest.raises(ValueError, match="expected"):
        HostList((entry,))
    monkeypatch.setenv("SHIWU_DENY_HOSTS", f"good.example,{entry or '*'}")
    with pytest.raises(ValidationError, match="expected"):
        Settings()


WRONG = {"DENY_NETWORKS": "10.0.0.1/8", "ALLOW_NETWORKS": "ten", "NAT64_PREFIXES": "64:ff9b:1::/50", "FETCH_PORTS": "0"}


@pytest.mark.parametrize("name", [*WRONG, "PROXY_URL"])
def test_other_lists_are_checked_at_the_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wrong setting is named."""
    monkeypatch.setenv(f"SHIWU_{name}", WRONG.get(name, "socks5://a"))
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_settings_become_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name that the documentation gives."""
    for name, value in {
        "ALLOW_HOSTS": "minio:9000,[::1]:80",
        "DENY_NETWORKS": "203.0.113.0/24",
        "FETCH_PORTS": "80,443,8080",
        "DENY_FOLDERS": "/srv/pictures/private",
        "PROXY_URL": f"http://user:{SECRET}@proxy:3128",
        "TELL_REFUSALS": "1",
    }.items():
        monkeypatch.setenv(f"SHIWU_{name}", value)
    settings = Settings()
    assert access_rules(settings) == AccessRules(
        allow_hosts=("minio:9000", "[::1]:80"),
        deny_networks=("203.0.113.0/24",),
        ports=(80, 443, 8080),
        deny_folders=(Path("/srv/pictures/private"),),
        proxy_url=f"http://user:{SECRET}@proxy:3128",
        tells_refusals=True,
    )
    assert SECRET not in repr(settings)


# ------------------------------------------------------------------------------------ proxies
def test_proxies_of_the_environment_are_not_used(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise HTTP_PROXY would move all checks to another machine."""
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, world.url("http://127.0.0.2:IN"))
    assert world.fetcher().fetch(world.url("http://good.example:OUT/a")) == BODY
    assert not world.inner.hits


def test_configured_proxy_gets_allowed_requests_only(world: World) -> None:
    """It looks names up itself; addresses, ports, spellings and lists are checked before."""
    with PictureServer() as proxy:
        proxy.serve("http://good.example/a", PLAIN)
        fetcher = world.fetcher(proxy_url=f"http://user:pass@{proxy.host}", deny_hosts=("denied.example",))
        assert fetcher.fetch("http://good.example/a") == BODY
        assert proxy.headers["http://good.example/a"]["proxy-authorization"].startswith("Basic ")
        for url in (
            "http://denied.example/a",
            "http://10.0.0.1/a",
            "http://[::1]/a",
            "http://2130706434/a",
            "http://good.example:22/a",
        ):
            assert isinstance(failure(fetcher, url), Unreachable)
        assert isinstance(failure(fetcher, "https://good.example/a"), Unavailable), "it knows no CONNECT"
        assert proxy.hits.total() == 1
    assert not world.names.asked - type(world.names.asked)({"127.0.0.1": 9})


# ------------------------------------------------------------------------------------ buckets
@pytest.mark.parametrize(
    ("allow", "deny", "bucket", "is_allowed"),
    [
        ((), (), "any", True),
        (("pictures",), (), "pictures", True),
        (("pictures",), (), "pictures2", False),
        (("pictures",), (), "Pictures", False),
        (("tenant-*",), (), "tenant-1", True),
        (("tenant-*",), ("tenant-1",), "tenant-1", False),
        ((), ("logs*",), "logs-2026", False),
        ((), ("logs*",), "pictures", True),
    ],
)
def test_bucket_rules_allow_or_deny(
    allow: tuple[str, ...], deny: tuple[str, ...], bucket: str, is_allowed: bool
) -> None:
    """By name, or by how the name begins."""
    assert allows_bucket(AccessRules(allow_buckets=allow, deny_buckets=deny), bucket) is is_allowed


def test_denied_bucket_is_answered_like_a_refused_one(world: World) -> None:
    """The store is not asked."""
    error = failure(world.fetcher(deny_buckets=("private",)), "s3://private/a?versionId=v")
    assert (type(error), error.code.value) == (Rejected, "source_forbidden")
    assert "expected an object that this worker may read" in str(error)


@pytest.mark.parametrize(
    "bucket",
    [
        "arn:aws:s3:us-east-1:123456789012:accesspoint/mine",
        "arn:aws:s3-object-lambda:eu-west-1:123456789012:accesspoint:mine",
        "arn:aws:s3::123456789012:accesspoint:mine.mrap",
        *("127.0.0.2:9000", "user@bucket", "user:pass@127.0.0.2", "[::1]", "-bucket", "bucket%2f..", "büro", "a" * 256),
    ],
)
def test_no_message_names_an_endpoint(world: World, bucket: str) -> None:
    """An ARN would choose region, account and host; S3's address is the configuration's."""
    error = failure(world.fetcher(), f"s3://{bucket}/key")
    assert (type(error), error.code.value) == (Rejected, "invalid_reference")


# ------------------------------------------------------------------------------------ folders
@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A folder that is allowed, with a part that is denied, and one that is not."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, inside / "private", outside, outside / "locked"):
        folder.mkdir()
        (folder / "a").write_bytes(BODY)
    (inside / "link").symlink_to(outside / "a")
    (inside / "good link").symlink_to(inside / "a")
    (inside / "folder link").symlink_to(outside)
    (inside / "circle").symlink_to(inside / "circle")
    os.mkfifo(inside / "pipe")
    return inside, outside


def test_all_files_outside_get_the_same_answer(world: World, folders: tuple[Path, Path]) -> None:
    """There or not there, readable or not, by any way: the same words for each."""
    inside, outside = folders
    fetcher = world.fetcher(allow_folders=(inside,), deny_folders=(inside / "private",))
    errors = {
        str(failure(fetcher, f"file://{path}"))
        for path in (
            *(outside / "a", outside / "none", outside / "a" / "below", outside, outside / ("x" * 300), "/proc/1/mem"),
            *(inside / "link", inside / "folder link" / "a", inside / "folder link" / "none", "/dev/zero", "/"),
            *(f"{inside}/../out/a", f"{inside}/%2e%2e/out/a", f"{inside}/..%2fout/a", "/proc/self/environ"),
            *(inside / "private" / "a", inside / "private" / "none", f"{inside}/x/../private/a", f"{inside}-b/a"),
            f"/proc/self/root{outside}/a",
        )
    }
    assert errors == {"expected a file in one of the folders that the operator allows"}


def test_files_in_allowed_folders_are_read(world: World, folders: tuple[Path, Path]) -> None:
    """Links within the folder are followed; pipes are not waited for."""
    inside, _ = folders
    fetcher = world.fetcher(allow_folders=(inside,))
    for path in ("a", "good%20link", "./a", "private/../a", "private/a"):
        assert fetcher.fetch(f"file://{inside}/{path}") == BODY
    assert fetcher.fetch(f"file:///proc/self/root{inside}/a") == BODY
    for path, code in {
        "pipe": "source_not_a_file",
        "private": "source_not_a_file",
        "none": "source_not_found",
        "circle": "invalid_reference",
        "a%00.png": "invalid_reference",
        "a%0a": "invalid_reference",
    }.items():
        assert failure(fetcher, f"file://{inside}/{path}").code.value == code, path


def test_link_that_changes_during_the_check_is_refused(folders: tuple[Path, Path]) -> None:
    """The file that was checked is the one that is read: never a byte from outside."""
    inside, outside = folders
    (outside / "a").write_bytes(SECRET.encode())
    good, bad, turning = inside / "good", inside / "bad", inside / "turning"
    stop = threading.Event()

    def turn() -> None:
        while not stop.is_set():
            for name, target in ((good, inside / "a"), (bad, outside / "a")):
                name.symlink_to(target)
                name.replace(turning)

    turning.symlink_to(inside / "a")
    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    folders, read, refused = LocalFiles((inside,)), 0, 0
    try:
        while read + refused < 2000:
            try:
                with folders.open(turning.as_uri()) as (file, _):
                    assert file.read() == BODY
                    read += 1
            except Rejected:
                refused += 1
    finally:
        stop.set()
        thread.join(5)
    assert read
    assert refused
