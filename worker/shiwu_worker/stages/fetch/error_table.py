"""The error table: what each reply or exception means for the job. The code reads it, and docs/errors.md prints it.

A row has the replies or exceptions with the same meaning, the error code of the answer, whose fault it is, whether the
job is retried, and the log level. Everything else is `UNKNOWN`: a fault of the service, retried and logged as an error,
never a fact about the image. Exceptions are named as text, so the table imports no library.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from shiwu.contract import CODES, RETRIED, ErrorCode, Fault, LogLevel


class Kind(StrEnum):
    """What the keys of a row are."""

    S3_CODE = "Error codes of S3"
    S3_CODE_WITH_VERSION = "Error codes of S3, where the reference names a version"
    S3_STATUS = "HTTP statuses of S3 without a code that the table knows"
    HTTP_STATUS = "HTTP statuses"
    EXCEPTION = "Exceptions of botocore, urllib3, ssl and Python"
    OBSTORE = "Errors of obstore that are no reply"
    FILE = "Errors of files (errno)"


@dataclass(frozen=True, slots=True)
class Row:
    """The meaning of some replies or exceptions."""

    keys: tuple[str, ...]
    means: str
    code: ErrorCode | None
    """The error code of the answer; None if the error is not about one job."""
    fault: Fault
    is_final: bool
    """Whether the job is never retried, whatever SHIWU_RETRY is."""
    log_level: LogLevel

    @property
    def error_code(self) -> ErrorCode:
        """The error code of the answer, for rows about a job."""
        return self.code or ErrorCode.SOURCE_ERROR


def row(code: ErrorCode, means: str, *keys: str, is_final: bool | None = None) -> Row:
    """A row about a job, with the defaults of its error code; `is_final` overrides the retry."""
    info = CODES[code]
    return Row(keys, means, code, info.fault, code not in RETRIED if is_final is None else is_final, info.log_level)


UNKNOWN: Final = row(ErrorCode.SOURCE_ERROR, "anything that no row names")

_S3_CODES: Final = (
    row(ErrorCode.SOURCE_NOT_FOUND, "no such object", "NoSuchKey", "NoSuchBucket", "NoSuchVersion"),
    row(
        ErrorCode.SOURCE_FORBIDDEN,
        "the worker's identity may not read the object",
        *("AccessDenied", "AccessDeniedException", "AllAccessDisabled", "InvalidPayer", "Unauthorized"),
    ),
    row(ErrorCode.SOURCE_ARCHIVED, "the object must be restored first", "InvalidObjectState"),
    row(
        ErrorCode.SOURCE_CREDENTIALS,
        "the credentials are unknown, expired, or signed wrongly",
        *("ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidSecurity"),
        *("InvalidToken", "NotSignedUp", "RequestExpired", "SignatureDoesNotMatch", "TokenRefreshRequired"),
        *("UnrecognizedClientException", "AccountProblem", "UnauthorizedAccess"),
    ),
    row(
        ErrorCode.SOURCE_CREDENTIALS,
        "the region, the endpoint or the form of the signature is wrong",
        *("AuthorizationHeaderMalformed", "AuthorizationQueryParametersError", "IllegalLocationConstraintException"),
        *("InvalidRegion", "PermanentRedirect", "Redirect", "TemporaryRedirect"),
    ),
    row(
        ErrorCode.SOURCE_CREDENTIALS,
        "the key that the object is encrypted with cannot be used",
        *("KMS.DisabledException", "KMS.InvalidStateException", "KMS.KMSInvalidStateException"),
        *("KMS.KeyUnavailableException", "KMS.NotFoundException"),
    ),
    row(
        ErrorCode.SOURCE_CLOCK_SKEW,
        "the time of the request differs too much from the store's",
        *("RequestTimeTooSkewed", "RequestInTheFuture"),
    ),
    row(
        ErrorCode.SOURCE_THROTTLED,
        "fewer requests are asked for",
        *("BandwidthLimitExceeded", "EC2ThrottledException", "KMS.ThrottlingException", "LimitExceededException"),
        *("PriorRequestNotComplete", "ProvisionedThroughputExceededException", "QpsLimitExceeded"),
        *("RequestLimitExceeded", "RequestThrottled", "RequestThrottledException", "SlowDown", "SlowDownRead"),
        *("ThrottledException", "Throttling", "ThrottlingException", "TooManyRequests", "TooManyRequestsException"),
        *("TransactionInProgressException", "DownloadTrafficRateLimitExceeded"),
    ),
    row(
        ErrorCode.SOURCE_UNAVAILABLE,
        "the store cannot answer now",
        *("ConditionalRequestConflict", "InternalError", "InternalFailure", "OperationAborted", "RequestTimeout"),
        *("RequestTimeoutException", "ServerBusy", "ServiceUnavailable", "XMinioServerNotInitialized"),
    ),
    row(
        ErrorCode.INVALID_REFERENCE,
        "the bucket or the key cannot exist",
        *("InvalidBucketName", "InvalidURI", "KeyTooLong", "KeyTooLongError"),
    ),
)
_S3_CODES_WITH_VERSION: Final = (
    row(ErrorCode.SOURCE_NOT_FOUND, "the version is a delete marker", "MethodNotAllowed"),
    row(ErrorCode.INVALID_REFERENCE, "the text is no version id", "InvalidArgument"),
)
_S3_STATUSES: Final = (
    row(
        ErrorCode.SOURCE_CREDENTIALS,
        "the bucket is in another region or behind another endpoint",
        *("300", "301", "302", "303", "305", "307", "308"),
    ),
)
_HTTP_STATUSES: Final = (
    row(ErrorCode.SOURCE_NOT_FOUND, "no such file", "404", "410"),
    row(ErrorCode.SOURCE_FORBIDDEN, "access is refused", "401", "402", "403", "451"),
    row(ErrorCode.SOURCE_CREDENTIALS, "the proxy refuses the worker's credentials", "407"),
    row(ErrorCode.SOURCE_THROTTLED, "fewer requests are asked for", "420", "429", "430", "509", "529"),
    row(
        ErrorCode.SOURCE_UNAVAILABLE,
        "not ready, locked, in conflict or too slow: a later try may succeed",
        *("202", "408", "409", "421", "423", "425"),
    ),
    row(ErrorCode.SOURCE_UNAVAILABLE, "the server fails", "5xx"),
    row(ErrorCode.PICTURE_EMPTY, "a reply without a body by definition", "204", "205"),
    row(ErrorCode.SOURCE_ERROR, "a part of the body, although the whole was asked for", "206"),
    row(ErrorCode.SOURCE_ERROR, "a redirect that leads nowhere, or to what was never asked for", "3xx"),
    row(
        ErrorCode.SOURCE_ERROR,
        "the server does not accept the request, without saying that the file is missing",
        *("400", "405", "406", "412", "414", "416", "418", "431"),
    ),
)
_URLLIB3: Final = "urllib3.exceptions"
_BOTOCORE: Final = "botocore.exceptions"


def _named(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names)


NO_CREDENTIALS: Final = row(
    ErrorCode.SOURCE_CREDENTIALS,
    "no credentials, or settings of S3 that cannot work",
    *_named(_BOTOCORE, "BaseEndpointResolverError", "ConfigNotFound", "ConfigParseError", "CredentialRetrievalError"),
    *_named(_BOTOCORE, "EndpointProviderError", "InvalidChecksumConfigError", "InvalidConfigError"),
    *_named(_BOTOCORE, "InvalidDefaultsMode", "InvalidEndpointConfigurationError", "InvalidIMDSEndpointError"),
    *_named(_BOTOCORE, "InvalidIMDSEndpointModeError", "InvalidProxiesConfigError", "InvalidRegionError"),
    *_named(_BOTOCORE, "InvalidRetryConfigurationError", "InvalidS3AddressingStyleError"),
    *_named(_BOTOCORE, "InvalidS3UsEast1RegionalEndpointConfigError", "InvalidSTSRegionalEndpointsConfigError"),
    *_named(_BOTOCORE, "LoginError", "MetadataRetrievalError", "MissingDependencyException", "NoAuthTokenError"),
    *_named(_BOTOCORE, "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"),
    *_named(_BOTOCORE, "RefreshWithMFAUnsupportedError", "SSOError", "TokenRetrievalError"),
    *_named(_BOTOCORE, "UnknownCredentialError", "UnknownRegionError", "UnknownSignatureVersionError"),
    *_named(_BOTOCORE, "UnknownTokenProviderError", "UnsupportedS3ConfigurationError"),
    *_named(_BOTOCORE, "UnsupportedSignatureVersionError"),
)
WRONG_REFERENCE: Final = row(
    ErrorCode.INVALID_REFERENCE,
    "the reference cannot be asked for",
    *_named(_URLLIB3, "LocationValueError"),
    *_named(_BOTOCORE, "InvalidDNSNameError", "InvalidHostLabelError", "ParamValidationError"),
    *_named(_BOTOCORE, "UnsupportedOutpostResourceError", "UnsupportedS3AccesspointConfigurationError"),
    *_named(_BOTOCORE, "UnsupportedS3ArnError"),
    "builtins.UnicodeEncodeError",
)
_EXCEPTIONS: Final = (
    row(
        ErrorCode.SOURCE_UNAVAILABLE,
        "no connection",
        *_named(_URLLIB3, "ConnectTimeoutError", "NewConnectionError"),
        *_named(_BOTOCORE, "ConnectionError"),
    ),
    row(
        ErrorCode.SOURCE_UNAVAILABLE,
        "the connection ended, fell silent, or carried no HTTP",
        *_named(_URLLIB3, "DecodeError", "InvalidHeader", "ProtocolError", "ProxyError", "SSLError", "TimeoutError"),
        *_named(_BOTOCORE, "ConnectionClosedError", "IncompleteReadError", "ReadTimeoutError"),
        *_named(_BOTOCORE, "ResponseStreamingError", "ChecksumError", "FlexibleChecksumError"),
        *("botocore.parsers.ResponseParserError", "http.client.HTTPException", "ssl.SSLError", "builtins.OSError"),
    ),
    row(
        ErrorCode.SOURCE_UNAVAILABLE,
        "the worker's rules refuse the address, or the name does not exist; not told apart, and not retried",
        *_named("shiwu.network.address_guard", "AddressRefused", "UnknownHost"),
        is_final=True,
    ),
    row(
        ErrorCode.SOURCE_FORBIDDEN,
        "the worker does not accept the certificate of the server",
        "ssl.SSLCertVerificationError",
    ),
    NO_CREDENTIALS,
    WRONG_REFERENCE,
)
NO_REPLY: Final = row(
    ErrorCode.SOURCE_UNAVAILABLE,
    "no connection, or it ended, fell silent, or carried no reply of S3",
    *("Connect", "Decode", "Header", "Interrupted", "Request", "Timeout", "Unknown"),
)
_FILES: Final = (
    row(ErrorCode.SOURCE_NOT_FOUND, "no such file", "ENOENT", "ENOTDIR"),
    row(ErrorCode.SOURCE_FORBIDDEN, "the worker's user may not read the file", "EACCES", "EPERM"),
    row(ErrorCode.INVALID_REFERENCE, "no file can have this path", "EINVAL", "ELOOP", "ENAMETOOLONG"),
    row(ErrorCode.SOURCE_UNAVAILABLE, "the file system fails", "any other"),
)
TABLE: Final[Mapping[Kind, tuple[Row, ...]]] = {
    Kind.S3_CODE: _S3_CODES,
    Kind.S3_CODE_WITH_VERSION: _S3_CODES_WITH_VERSION,
    Kind.S3_STATUS: _S3_STATUSES,
    Kind.HTTP_STATUS: _HTTP_STATUSES,
    Kind.EXCEPTION: _EXCEPTIONS,
    Kind.OBSTORE: (NO_REPLY,),
    Kind.FILE: _FILES,
}
_INDEX: Final = {kind: {key: entry for entry in rows for key in entry.keys} for kind, rows in TABLE.items()}


def s3_row(code: str, status: int, *, has_version: bool) -> Row:
    """The row of a reply of S3: by its code, otherwise by its HTTP status."""
    found = (has_version and _INDEX[Kind.S3_CODE_WITH_VERSION].get(code)) or _INDEX[Kind.S3_CODE].get(code)
    return found or _INDEX[Kind.S3_STATUS].get(str(status)) or http_row(status)


def http_row(status: int) -> Row:
    """The row of an HTTP status other than 200: its own, otherwise that of its class (4xx)."""
    rows = _INDEX[Kind.HTTP_STATUS]
    return rows.get(str(status)) or rows.get(f"{status // 100}xx") or UNKNOWN


def exception_row(error: BaseException) -> Row:
    """The row of an exception: by the error that it wraps, otherwise by its class and the base classes."""
    rows = _INDEX[Kind.EXCEPTION]
    for candidate in _with_wrapped(error):
        for cls in type(candidate).__mro__:
            if found := rows.get(f"{cls.__module__}.{cls.__qualname__}"):
                return found
    return UNKNOWN


def _with_wrapped(error: BaseException) -> Iterator[BaseException]:
    # urllib3's SSLError and botocore's HTTPClientError wrap an error whose class is more specific.
    inner = (getattr(error, "kwargs", None) or {}).get("error", error.args[0] if error.args else None)
    if isinstance(inner, BaseException):
        yield inner
    yield error


def obstore_row(kind: str | None) -> Row:
    """The row of an error of obstore that is no reply of the store."""
    return _INDEX[Kind.OBSTORE].get(kind or "", UNKNOWN)


def file_row(error: OSError) -> Row:
    """The row of an error of a file."""
    rows = _INDEX[Kind.FILE]
    return rows.get(errno.errorcode.get(error.errno or 0, ""), rows["any other"])
