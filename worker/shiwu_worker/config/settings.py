"""All settings of the worker with unit, default and description; `docs/settings.md` is generated from them."""

from __future__ import annotations

import os
import socket
from datetime import tzinfo
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from shiwu.broker.maintenance import MAX_LEASE_S
from shiwu.broker.redis_url import RedisAddress, read_redis_url
from shiwu.broker.retention import DEAD_AGE_S, DEAD_LENGTH, DONE_TTL_S, RESULT_TTL_S, STREAM_LENGTH
from shiwu.contract import TASK_NAME, Lane
from shiwu_worker.config.source_settings import SourceSettings
from shiwu_worker.config.types import (
    Device,
    Formats,
    Fusions,
    Lanes,
    Names,
    ProbeFile,
    Retries,
    Timezone,
    Traces,
    UserAgent,
    WorkerName,
    check_duration,
    read_retry,
    split,
)
from shiwu_worker.policy.callback_rules import MAX_TASKS
from shiwu_worker.runtime.cpus import usable_cores


class Settings(SourceSettings):
    """Settings, read once at the start from `SHIWU_*`. Lists are separated by commas."""

    model_config = SettingsConfigDict(
        env_prefix="SHIWU_", frozen=True, extra="ignore", hide_input_in_errors=True, allow_inf_nan=False
    )

    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="one database for queue and results: redis://, rediss://, valkey://, valkeys://, unix:///path or "
        "sentinel://host:port,host:port/name/0; or a cluster: cluster://host:port,host:port/?shards=16",
    )
    redis_timeout_s: float = Field(5.0, gt=0, description="time-out of connecting to Redis and of each reply")
    worker_name: WorkerName = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}",
        description="name of this worker in answers and logs",
    )

    model: str | None = Field(
        None,
        description="folder or hub id of a dual encoder; ID@REVISION selects a revision; unset or photo-zh: the "
        "embedded model",
    )
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float16 on CUDA, bfloat16 on CPUs that support it, otherwise float32"
    )
    torch_threads: int = Field(
        0,
        ge=0,
        description="fixed number of threads of the model on a CPU; 0: the cores that affinity and cgroup allow, "
        "counted every 5 s, or one less if an image takes little time",
    )
    compile: bool = Field(
        False,
        description="compile the model, which needs a compiler and is not done without one: slightly faster on a CPU, "
        "and 15 to 60 s for each batch size at the first start; on a GPU it fuses kernels, takes 30 to 90 s for each, "
        "and is captured as CUDA graphs",
    )
    cuda_graphs: bool = Field(True, description="replay a CUDA graph for each batch size")
    fuse: Fusions = Field(
        ("auto",),
        description="what makes the image tower faster with the same result: patches (normalisation and patch "
        "embedding as one matrix product), qkv (queries, keys and values as one), attention (its kernel chosen by "
        "measurement on a GPU), norms (batch normalisations as parts of convolutions), or none; auto: all of them on a "
        "GPU, norms on a CPU",
    )
    labels_dir: Path | None = Field(None, description="folder with label sets (*.yaml), added to the embedded ones")
    labels_poll_s: float = Field(3.0, ge=0, description="time between looks for changed label files; 0: only SIGHUP")
    default_labels: str = Field("everyday-zh", description="label set of requests that name none")
    shadow: str | None = Field(
        None, description="label set that is tried on a share of the images; answers do not change; unset: none"
    )
    shadow_of: str | None = Field(
        None, description="label set whose jobs the shadow is compared with; unset: SHIWU_DEFAULT_LABELS"
    )
    shadow_share: float = Field(0.1, gt=0, le=1, description="share of the images that the shadow is tried on")
    label_cache: int = Field(256, ge=1, description="number of inline label sets whose vectors are cached")
    label_cache_mb: int = Field(256, ge=1, description="memory for the vectors of inline labels")
    label_cost_s: float = Field(60.0, gt=0, description="device time that the new labels of one request may take")

    max_batch: int = Field(
        0,
        ge=0,
        le=512,
        description="largest batch size; sizes are the powers of two up to it, on a GPU also those in between (24, 48, "
        "96, …). The worker starts with it and makes smaller batches if they reach as many images per second. 0: "
        "learned; on a CPU up to 64, and no batch takes much more than a second; on a GPU up to 512, and no batch "
        "takes more than 25 ms unless smaller ones reach less than 90 % of the throughput",
    )
    tune_file: Path | None = Field(
        None,
        description="file in which `shiwu-worker --tune` stores its result for this machine and model",
    )
    linger_ms: float = Field(
        0.0, ge=0, le=1000, description="time for which a batch that is not full waits for more images; 0: none"
    )
    slots: int = Field(
        0,
        ge=0,
        le=4096,
        description="images that are claimed and not encoded yet; 0: three batches + the images being loaded",
    )
    lanes: Lanes = Field(
        tuple(Lane),
        description="lanes that this worker serves: interactive, bulk or both; -Q shiwu.interactive does the same",
    )
    bulk_share: float = Field(
        0.1, ge=0, le=0.9, description="share of the images that bulk keeps while interactive jobs wait"
    )
    interactive_reserve: float = Field(
        0.25,
        ge=0,
        le=0.9,
        description="share of the loader threads and slots that bulk never gets, at least one of each; a worker that "
        "serves one lane reserves nothing",
    )

    share_images: bool = Field(
        True, description="jobs with the same image share one decode and one vector; false: each job has its own"
    )
    vector_cache: int = Field(
        0, ge=0, le=10_000_000, description="image vectors kept for later jobs with the same image, 2 to 5 kB each"
    )

    lease_s: float = Field(
        15.0, ge=1, le=MAX_LEASE_S, description="time after which the jobs of a crashed worker return to their lane"
    )
    watchers: int = Field(2, ge=1, le=100, description="on a cluster: workers that watch each shard (docs/cluster.md)")
    max_attempts: int = Field(3, ge=1, description="attempts of one job, including crashes and retries")
    retry_first_s: float = Field(2.0, gt=0, description="delay after the first failed fetch; doubles, with jitter")
    retry_longest_s: float = Field(60.0, gt=0, description="longest delay between attempts")
    retry_after_longest_s: float = Field(
        300.0,
        ge=0,
        description="longest pause that a source may ask for (Retry-After); longer ones are shortened to this",
    )
    retry: Retries = Field(
        {},
        description="attempts and delays for single error codes, code=tries:first_s:longest_s, …; docs/errors.md "
        "lists the codes that are retried by default and those that are retried only if they are named here",
    )
    grace_s: float = Field(20.0, ge=0, description="time after SIGTERM to finish the jobs in flight")

    timezone: Timezone = Field(
        "UTC", description="time zone of an eta or expires without one, like Celery's setting of the same name"
    )
    eta_longest_s: float = Field(
        7 * 86_400,
        ge=1,
        description="longest eta or countdown, for which Redis holds the message; others are rejected",
    )
    result_ttl_s: int = Field(RESULT_TTL_S, ge=60, description="time for which an answer can be read by its id")
    done_ttl_s: int = Field(
        DONE_TTL_S, ge=60, description="time for which an id counts as answered; longer than result_ttl_s"
    )
    marks: Literal["auto", "both", "hashes"] = Field(
        "auto", description="marks of answered ids: `hashes`, `both` for earlier versions too, `auto` by the database"
    )
    stream_length: int = Field(STREAM_LENGTH, ge=1000, description="answers that the results stream keeps")
    answer_tags_kb: int = Field(
        128, ge=4, le=10_000, description="largest list of tags of one answer; more are left out, with a warning"
    )
    stream_mb: int = Field(
        256, ge=1, le=1_000_000, description="memory of Redis that the results stream may take; the oldest answers go"
    )
    dead_length: int = Field(DEAD_LENGTH, ge=100, description="dead letters that are kept")
    dead_mb: int = Field(
        256, ge=1, le=1_000_000, description="memory of Redis that dead letters may take together; the oldest go"
    )
    dead_ttl_s: int = Field(DEAD_AGE_S, ge=60, description="time for which dead letters are kept")
    commit_replicas: int = Field(0, ge=0, le=10, description="replicas of Redis that must confirm each answer")
    replicas_timeout_s: float = Field(
        1.0, gt=0, description="time for these confirmations; then the answer is written again"
    )
    revoke: bool = Field(True, description="handle Celery's revoke; every client that may PUBLISH can then cancel jobs")
    callback_tasks: Names = Field(
        (TASK_NAME,),
        description="tasks that Celery callbacks (link, chain, chord) may call, names or patterns as app.*, or none; "
        "others are refused before the image is fetched",
    )
    callback_queue: str = Field("celery", description="queue of callbacks that name none")
    callback_queues: Names = Field((), description="other queues that callbacks may name; patterns as app.*")
    callback_most: int = Field(
        MAX_TASKS, ge=1, le=10_000, description="largest number of tasks that the callbacks of one message may lead to"
    )

    loaders: int = Field(0, ge=0, le=256, description="loader processes; 0: the number of cores minus one, at least 1")
    loader_spares: int = Field(2, ge=0, le=16, description="started loaders that replace a crashed one immediately")
    loader_threads: int = Field(8, ge=1, le=64, description="images that one loader fetches and decodes at a time")
    source_threads: int = Field(
        0,
        ge=0,
        le=16_384,
        description="images of one worker that are loaded from one host or bucket at a time; 0: half of the loader "
        "threads, all of them once the source has proved quick, and an eighth while it is slow",
    )
    loader_memory_mb: int = Field(
        4096,
        ge=1024,
        description="address space of the sandbox process of one loader, including libraries and thread stacks",
    )
    decode_cpu_s: float = Field(10.0, ge=0.5, description="CPU time to decode one image")
    sandbox: bool = Field(
        True, description="decode under a system-call filter, without access to files, sockets and processes"
    )
    load_timeout_s: float = Field(
        30.0, gt=0, description="time to fetch and decode one image; after it the loader is replaced"
    )
    fetch_timeout_s: float = Field(
        15.0, gt=0, description="time to fetch one image, including quick retries; at most 0.9 × load_timeout_s"
    )
    connect_timeout_s: float = Field(3.0, gt=0, description="time-out of one connection attempt")
    read_timeout_s: float = Field(10.0, gt=0, description="longest wait for the next bytes of a server")
    min_rate_kb_s: int = Field(
        8,
        ge=0,
        le=1_000_000,
        description="least average rate of an image's bytes in KiB/s; a slower source is given up and tried again "
        "later; 0: no least rate",
    )
    min_rate_after_s: float = Field(
        5.0, gt=0, description="time from the first byte on after which the least rate is checked"
    )
    max_redirects: int = Field(
        3, ge=0, le=20, description="redirects of one http(s):// reference; each is checked like the reference"
    )
    user_agent: UserAgent | None = Field(
        None, description="User-Agent of requests to web servers and stores; unset: shiwu/ and the version"
    )
    max_bytes: int = Field(20 * 1024 * 1024, ge=1024, description="largest image file")
    max_pixels: int = Field(50_000_000, ge=1, description="largest image, width × height")
    max_side: int = Field(65_535, ge=1, description="longest side of an image; max_pixels limits memory and time")
    max_frames: int = Field(5000, ge=1, description="frames of one animation, if its header has their number")
    max_scans: int = Field(100, ge=1, description="scans of one JPEG; usual progressive ones have about ten")
    formats: Formats = Field(
        ("JPEG", "PNG", "WEBP", "GIF", "AVIF"),
        description="allowed image formats; BMP, TIFF, and with pillow-heif HEIF (HEIC) can be added",
    )
    exact_decode: bool = Field(
        False, description="always decode a JPEG at full size: slower, with the same pixels as transformers"
    )
    http_host: str = Field("0.0.0.0", description="address of the HTTP port")  # noqa: S104 probes come from outside
    http_port: int = Field(0, ge=0, le=65535, description="port of /livez, /readyz and /metrics; 0: no server")
    canary_s: float = Field(
        300.0,
        ge=0,
        description="interval of the health-check image; a wrong result ends the worker; 0: at the start only",
    )
    ready_file: ProbeFile | None = Field(None, description="file that exists while the worker is ready")
    alive_file: ProbeFile | None = Field(
        None, description="file that is touched every second while the pipeline makes progress"
    )
    stuck_s: float = Field(
        90.0,
        gt=0,
        description="time with work and no progress after which a worker counts as stuck: leases end, /livez is 503",
    )
    traces: Traces = Field(
        False,
        description="send OpenTelemetry spans of jobs and batches over OTLP/HTTP; the OTEL_… variables say where to",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="info logs one line per job")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, otherwise JSON"
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Strip spaces and line ends; a variable without other characters counts as not set.

        An empty Redis URL is kept and refused, because its default would be the server on this machine.
        """
        stripped = {name: value.strip() if isinstance(value, str) else value for name, value in values.items()}
        return {name: value for name, value in stripped.items() if value != "" or name == "redis_url"}

    @field_validator("dtype", "s3_client", "log_level", "log_format", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("*")
    @classmethod
    def _check_duration(cls, value: object, info: ValidationInfo) -> Any:
        check_duration(info.field_name or "", value)
        return value

    @field_validator(
        *("formats", "allow_hosts", "only_hosts", "deny_hosts", "allow_networks", "deny_networks", "nat64_prefixes"),
        *("fetch_ports", "allow_buckets", "deny_buckets", "allow_folders", "deny_folders"),
        *("callback_tasks", "callback_queues", "lanes", "fuse"),
        mode="before",
    )
    @classmethod
    def _split(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        # An empty variable means the default, so these settings need a word for an empty list.
        is_none = info.field_name in {"callback_tasks", "fetch_ports", "fuse"} and value.lower() == "none"
        return () if is_none else tuple(split(value))

    @field_validator("retry", mode="before")
    @classmethod
    def _read_retries(cls, value: object) -> object:
        return dict(map(read_retry, split(value))) if isinstance(value, str) else value

    @field_validator("redis_url")
    @classmethod
    def _check_url(cls, value: SecretStr) -> SecretStr:
        read_redis_url(value.get_secret_value(), may_be_cluster=True)
        return value

    @property
    def redis_address(self) -> RedisAddress:
        """Address of Redis, from which every client takes its arguments."""
        return read_redis_url(self.redis_url.get_secret_value(), may_be_cluster=True)

    @property
    def user_agent_text(self) -> str:
        """User-Agent of requests to sources."""
        return self.user_agent or f"shiwu/{version('shiwu')}"

    @property
    def zone(self) -> tzinfo:
        """Time zone of times that name none."""
        return ZoneInfo(self.timezone)

    @property
    def loader_count(self) -> int:
        """Loader processes to start."""
        return self.loaders or max(1, usable_cores() - 1)
