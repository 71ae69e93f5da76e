"""Settings of where images are read from: the S3 store, and what may be fetched."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings

from shiwu.network.address_rules import HTTP_PORTS, check_proxy
from shiwu_worker.config.types import Endpoint, Hosts, Names, Networks, Paths, Ports, Prefixes, Region, S3Client


class SourceSettings(BaseSettings):
    """The part of `Settings` about sources."""

    s3_endpoint_url: Endpoint | None = Field(
        None, description="S3-compatible store, http(s)://host[:port]; unset: from the AWS configuration, otherwise AWS"
    )
    s3_region: Region | None = Field(None, description="region of the store; unset: from the AWS configuration")
    s3_client: S3Client = Field(
        "boto3",
        description="boto3, or obstore if it is installed: less CPU for each object, but not all keys can be requested",
    )
    s3_addressing: Literal["auto", "path", "virtual"] = Field(
        "auto", description="where requests name the bucket: path, virtual (bucket.host), or auto: virtual on AWS only"
    )
    s3_anonymous: bool = Field(
        False, description="send requests without credentials and signatures, for public buckets only"
    )
    s3_requester_pays: bool = Field(
        False, description="the account of the worker pays for requests to requester-pays buckets"
    )
    allow_hosts: Hosts = Field((), description="host[:port] that may be fetched even if its address is not public")
    only_hosts: Hosts = Field(
        (), description="if set, no other host is fetched over http(s)://; *.name for all subdomains"
    )
    deny_hosts: Hosts = Field((), description="host[:port] that is never fetched")
    allow_networks: Networks = Field((), description="networks (CIDR) whose addresses count as public")
    deny_networks: Networks = Field((), description="networks (CIDR) to which the worker never connects")
    nat64_prefixes: Prefixes = Field((), description="IPv6 prefixes that this network translates to IPv4 (RFC 6052)")
    fetch_ports: Ports = Field(
        HTTP_PORTS, description="allowed ports of http(s)://, or none; other ports only for allow_hosts"
    )
    allow_buckets: Names = Field(
        (), description="if set, no other bucket is read; may end in *. Suffixes that AWS reserves need such an entry"
    )
    deny_buckets: Names = Field((), description="buckets that are never read; may end in *")
    allow_folders: Paths = Field((), description="folders that file:// may read; none by default")
    deny_folders: Paths = Field((), description="subfolders that file:// may not read")
    proxy_url: SecretStr | None = Field(
        None,
        description="proxy for http(s)://, which must then check the addresses of host names; HTTP_PROXY and similar "
        "variables are ignored",
    )
    tell_refusals: bool = Field(
        False, description="answers say that these rules refused a source, which reveals which internal hosts exist"
    )

    @field_validator("proxy_url")
    @classmethod
    def _check_proxy(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_proxy(value.get_secret_value())
        return value
