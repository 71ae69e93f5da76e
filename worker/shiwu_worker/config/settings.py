"""Every knob of the worker: its environment name, unit, default and reason. `docs/settings.md` lists them."""

from __future__ import annotations

import os
import socket
from datetime import tzinfo
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shiwu.broker.maintenance import MAX_LEASE_S
from shiwu.broker.redis_url import RedisAddress, read_redis_url
from shiwu.broker.retention import DEAD_AGE_S, DEAD_LENGTH, DONE_TTL_S, RESULT_TTL_S, STREAM_LENGTH
from shiwu.contract import TASK_NAME, Lane
from shiwu_worker.config.types import (
    Device,
    Endpoint,
    Formats,
    Hosts,
    Lanes,
    Names,
    Networks,
    OutputFile,
    Paths,
    Ports,
    Prefixes,
    Region,
    Retries,
    S3Client,
    Timezone,
    Traces,
    UserAgent,
    WorkerName,
    check_duration,
    check_proxy,
    read_retry,
    split,
)
from shiwu_worker.policy.access_rules import HTTP_PORTS, AccessRules
from shiwu_worker.policy.callback_rules import MAX_TASKS, CallbackRules
from shiwu_worker.runtime.cpus import usable_cores

DEFAULT_BATCH_CAP = 64


class Settings(BaseSettings):
    """Read once at start from `SHIWU_*`; nobody below `wiring` sees it. Lists are separated by commas."""

    model_config = SettingsConfigDict(
        env_prefix="SHIWU_", frozen=True, extra="ignore", hide_input_in_errors=True, allow_inf_nan=False
    )

    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="broker and results, one database, so that commit is one step: redis://, rediss://, valkey://, "
        "valkeys://, unix:///path or sentinel://host:port,host:port/name/0",
    )
    redis_timeout_s: float = Field(5.0, gt=0, description="socket and connect time-out; no wait on Redis is longer")
    worker_name: WorkerName = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}",
        description="stands in answers and logs",
    )

    model: str | None = Field(
        None,
        description="folder or hub id of a dual encoder, ID@REVISION for one revision; unset: the embedded pictogram "
        "model",
    )
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float16 on CUDA, bfloat16 on CPUs that have it, else float32"
    )
    torch_threads: int = Field(
        0,
        ge=0,
        description="threads of the model on a CPU, for as long as the worker runs; 0: the cores that affinity and "
        "cgroup allow, counted every 5 s, or one less where an image is quick",
    )
    compile: bool = Field(
        False,
        description="compile the model on a CPU: somewhat quicker, 15 to 60 s a batch size at the start",
    )
    cuda_graphs: bool = Field(True, description="replay a CUDA graph for each batch size")
    labels_dir: Path | None = Field(None, description="folder of label sets (*.yaml) beside the embedded ones")
    default_labels: str = Field("six-zh", description="label set of requests that name none")
    label_cache: int = Field(256, ge=1, description="label sets whose vectors are kept")

    max_batch: int = Field(
        0,
        ge=0,
        le=512,
        description="no batch is larger; sizes are the powers of two up to it. The worker begins with this size and "
        "makes smaller batches where they bring as many images a second. 0: up to 64, learned, and none takes much "
        "more than a second",
    )
    tune_file: Path | None = Field(
        None,
        description="where `shiwu-worker --tune` keeps what it found for this machine and model",
    )
    linger_ms: float = Field(0.0, ge=0, le=1000, description="how long a batch that is not full waits; 0: never")
    slots: int = Field(
        0, ge=0, le=4096, description="pictures claimed and not yet encoded; 0: three batches + what is loading"
    )
    lanes: Lanes = Field(
        tuple(Lane),
        description="lanes that this worker serves: interactive, bulk or both; -Q shiwu.interactive says the same",
    )
    bulk_share: float = Field(0.1, ge=0, le=0.9, description="share that bulk keeps while interactive jobs wait")

    lease_s: float = Field(
        15.0, ge=1, le=MAX_LEASE_S, description="a dead worker's jobs are back in their lane after this"
    )
    max_attempts: int = Field(3, ge=1, description="tries of one job, over crashes and retries")
    retry_first_s: float = Field(2.0, gt=0, description="delay after the first failed fetch; doubles, with jitter")
    retry_longest_s: float = Field(60.0, gt=0, description="longest such delay")
    retry_after_longest_s: float = Field(
        300.0, ge=0, description="longest pause that a source may ask for (Retry-After); longer ones count as this"
    )
    retry: Retries = Field(
        {},
        description="tries and pauses of one class of error, code=tries:first_s:longest_s, …; docs/errors.md tells "
        "which codes are retried by default and which only if they are named here",
    )
    grace_s: float = Field(20.0, ge=0, description="time to finish what is held after SIGTERM")

    timezone: Timezone = Field(
        "UTC", description="time zone of an eta or expires that names none, as Celery's setting of this name"
    )
    result_ttl_s: int = Field(RESULT_TTL_S, ge=60, description="how long an answer can be read under its key")
    done_ttl_s: int = Field(
        DONE_TTL_S, ge=60, description="how long an id counts as answered; longer than result_ttl_s"
    )
    stream_length: int = Field(STREAM_LENGTH, ge=1000, description="how many answers the results stream keeps")
    dead_length: int = Field(DEAD_LENGTH, ge=100, description="how many dead letters are kept")
    dead_ttl_s: int = Field(DEAD_AGE_S, ge=60, description="how long dead letters are kept")
    commit_replicas: int = Field(0, ge=0, le=10, description="replicas of Redis that must confirm each answer")
    replicas_timeout_s: float = Field(1.0, gt=0, description="time for that; then the answer is written again")
    revoke: bool = Field(True, description="listen to Celery's revoke; anybody who may PUBLISH can then cancel jobs")
    callback_tasks: Names = Field(
        (TASK_NAME,),
        description="tasks that Celery callbacks (link, chain, chord) may call, names or patterns as app.*, or none; "
        "others are refused before the picture is fetched",
    )
    callback_queue: str = Field("celery", description="queue of callbacks that name none")
    callback_queues: Names = Field((), description="other queues that callbacks may name; patterns as app.*")
    callback_most: int = Field(
        MAX_TASKS, ge=1, le=10_000, description="tasks that the callbacks of one message may lead to"
    )

    loaders: int = Field(0, ge=0, le=256, description="loader processes; 0: one for each core but one, at least 1")
    loader_spares: int = Field(2, ge=0, le=16, description="warm loaders that stand in for one that died")
    loader_threads: int = Field(8, ge=1, le=64, description="pictures that one loader fetches and decodes at a time")
    loader_memory_mb: int = Field(
        4096, ge=1024, description="address space of one loader's decoder, its libraries and threads' stacks included"
    )
    decode_cpu_s: float = Field(10.0, ge=0.5, description="CPU that decoding one picture may take")
    sandbox: bool = Field(
        True, description="decode under a filter of system calls: no file, no socket, no process can be opened there"
    )
    load_timeout_s: float = Field(
        30.0, gt=0, description="fetch and decode of one picture; then its loader is replaced"
    )
    fetch_timeout_s: float = Field(15.0, gt=0, description="whole fetch of one picture, with its quick retries")
    connect_timeout_s: float = Field(3.0, gt=0, description="one connection attempt")
    read_timeout_s: float = Field(10.0, gt=0, description="one silence of a server")
    max_redirects: int = Field(
        3, ge=0, le=20, description="redirects of one http(s):// reference; each of them is checked like the reference"
    )
    user_agent: UserAgent | None = Field(
        None, description="User-Agent of requests to web servers and stores; unset: shiwu/ and the version"
    )
    max_bytes: int = Field(20 * 1024 * 1024, ge=1024, description="largest picture file")
    max_pixels: int = Field(50_000_000, ge=1, description="largest picture, width × height")
    max_side: int = Field(65_535, ge=1, description="longest side in pixels; max_pixels is what bounds memory and time")
    max_frames: int = Field(5000, ge=1, description="frames of one animation, where its header tells them")
    max_scans: int = Field(100, ge=1, description="scans of one JPEG; honest progressive ones have about ten")
    formats: Formats = Field(
        ("JPEG", "PNG", "WEBP", "GIF", "AVIF"),
        description="may add BMP, TIFF, and HEIF (HEIC) where pillow-heif is installed",
    )
    exact_decode: bool = Field(
        False, description="never decode a JPEG at reduced size: slower, pixels as transformers'"
    )
    s3_endpoint_url: Endpoint | None = Field(
        None, description="S3-compatible store, http(s)://host[:port]; unset: what the AWS chain says, else AWS"
    )
    s3_region: Region | None = Field(None, description="unset: the usual AWS chain")
    s3_client: S3Client = Field(
        "boto3",
        description="boto3, or obstore where it is installed: less CPU for an object, but it can't ask for every key",
    )
    s3_anonymous: bool = Field(
        False, description="ask the store without credentials and signatures, which reads public buckets only"
    )
    s3_requester_pays: bool = Field(
        False, description="the worker's account pays for requests and traffic of buckets that ask for that"
    )
    allow_hosts: Hosts = Field((), description="host[:port] that may be fetched although the address is not public")
    only_hosts: Hosts = Field((), description="if set, http(s):// of no other host is fetched; *.name for all below it")
    deny_hosts: Hosts = Field((), description="host[:port] that is never fetched")
    allow_networks: Networks = Field((), description="networks (CIDR) whose addresses count as public")
    deny_networks: Networks = Field((), description="networks (CIDR) that are never connected to")
    nat64_prefixes: Prefixes = Field((), description="IPv6 prefixes that this network translates to IPv4, by RFC 6052")
    fetch_ports: Ports = Field(HTTP_PORTS, description="ports of http(s)://, or none; others only for allow_hosts")
    allow_buckets: Names = Field(
        (),
        description="if set, s3:// of no other bucket is read; may end in *. Names that make the AWS SDK leave the "
        "endpoint (ending in --x-s3, --xa-s3, --op-s3) are read only if an entry ends in the same way",
    )
    deny_buckets: Names = Field((), description="buckets that are never read; may end in *")
    allow_folders: Paths = Field((), description="folders that file:// may read; none by default")
    deny_folders: Paths = Field((), description="folders below these that it may not")
    proxy_url: SecretStr | None = Field(
        None,
        description="http(s):// goes through this proxy, which then judges the addresses of names; HTTP_PROXY and its "
        "like are not looked at",
    )
    tell_refusals: bool = Field(
        False, description="answers say that these rules refused a source; they then tell which inner hosts exist"
    )

    http_host: str = Field("0.0.0.0", description="address of the HTTP port")  # noqa: S104 probes come from outside
    http_port: int = Field(0, ge=0, le=65535, description="port of /livez, /readyz and /metrics; 0: none")
    canary_s: float = Field(
        300.0,
        ge=0,
        description="how often a known picture must get its known answer, or the worker ends; 0: at the start only",
    )
    ready_file: OutputFile | None = Field(None, description="exists while the worker is warm and claims")
    alive_file: OutputFile | None = Field(None, description="touched every second while the pipeline makes progress")
    stuck_s: float = Field(
        90.0,
        gt=0,
        description="with work and no progress for this long a worker counts as hung: leases end, /livez is 503",
    )
    traces: Traces = Field(
        False, description="OpenTelemetry spans of jobs and batches, over OTLP/HTTP to where the OTEL_… variables say"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="info writes one line per job")
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: JSON unless on a terminal")

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Strip spaces and line ends; a variable without other characters counts as not set.

        But for the Redis URL: one that was left empty by mistake would lead to the server on this machine.
        """
        stripped = {name: value.strip() if isinstance(value, str) else value for name, value in values.items()}
        return {name: value for name, value in stripped.items() if value != "" or name == "redis_url"}

    @field_validator("dtype", "s3_client", "log_level", "log_format", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("*")
    @classmethod
    def _check_duration(cls, value: Any, info: ValidationInfo) -> Any:
        check_duration(info.field_name or "", value)
        return value

    @field_validator(
        *("formats", "allow_hosts", "only_hosts", "deny_hosts", "allow_networks", "deny_networks", "nat64_prefixes"),
        *("fetch_ports", "allow_buckets", "deny_buckets", "allow_folders", "deny_folders"),
        *("callback_tasks", "callback_queues", "lanes"),
        mode="before",
    )
    @classmethod
    def _split(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        # An empty variable means the default, so that these two need a word for an empty list.
        is_none = info.field_name in {"callback_tasks", "fetch_ports"} and value.lower() == "none"
        return () if is_none else tuple(split(value))

    @field_validator("retry", mode="before")
    @classmethod
    def _read_retries(cls, value: object) -> object:
        return dict(map(read_retry, split(value))) if isinstance(value, str) else value

    @field_validator("proxy_url")
    @classmethod
    def _check_proxy(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_proxy(value.get_secret_value())
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_url(cls, value: SecretStr) -> SecretStr:
        read_redis_url(value.get_secret_value())
        return value

    @property
    def redis_address(self) -> RedisAddress:
        """Where Redis is; every client of it takes its arguments from here."""
        return read_redis_url(self.redis_url.get_secret_value())

    @property
    def user_agent_text(self) -> str:
        """What requests to sources name as their sender."""
        return self.user_agent or f"shiwu/{version('shiwu')}"

    @property
    def zone(self) -> tzinfo:
        """The time zone of times that name none."""
        return ZoneInfo(self.timezone)

    @property
    def access(self) -> AccessRules:
        """What may be reached."""
        return AccessRules(
            allow_hosts=self.allow_hosts,
            only_hosts=self.only_hosts,
            deny_hosts=self.deny_hosts,
            allow_networks=self.allow_networks,
            deny_networks=self.deny_networks,
            nat64_prefixes=self.nat64_prefixes,
            ports=self.fetch_ports,
            allow_buckets=self.allow_buckets,
            deny_buckets=self.deny_buckets,
            allow_folders=self.allow_folders,
            deny_folders=self.deny_folders,
            proxy_url=self.proxy_url.get_secret_value() if self.proxy_url else None,
            tells_refusals=self.tell_refusals,
        )

    @property
    def callback_rules(self) -> CallbackRules:
        """What callbacks may call."""
        queues = (self.callback_queue, *self.callback_queues)
        return CallbackRules(tasks=self.callback_tasks, queues=queues, max_tasks=self.callback_most)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Allowed batch sizes: powers of two below the largest batch, and that batch."""
        sizes = []
        size = 1
        while size < self.batch_cap:
            sizes.append(size)
            size *= 2
        return (*sizes, self.batch_cap)

    @property
    def batch_cap(self) -> int:
        """The largest batch that may be: asked for, or tried at the start."""
        return self.max_batch or DEFAULT_BATCH_CAP

    @property
    def loader_count(self) -> int:
        """Loader processes to start."""
        return self.loaders or max(1, usable_cores() - 1)

    @property
    def slot_count(self) -> int:
        """Slots of the shared memory, for the largest batch that may be."""
        return self.slots_for(self.batch_cap)

    def slots_for(self, batch: int) -> int:
        """What to claim: the batch on the device, the one copied ahead, the one being filled, and what is loading."""
        return self.slots or 3 * batch + self.loader_count * self.loader_threads
