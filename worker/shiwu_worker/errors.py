"""Exception hierarchy: which errors reject a job, which retry it, which stop the process.

JobError
├── Rejected          the image or the request cannot be processed: answered immediately, never retried
│   └── Unreachable   a rejection that the caller sees as an unavailable source
└── Unavailable       may succeed later: released with a delay until the attempts are used up

FatalError            the process cannot continue: it releases its jobs and exits with `exit_code`
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import ClassVar, Final

from shiwu.contract import ErrorCode, ErrorInfo, Stage, as_utf8, printable_lines, without_logins


class JobError(Exception):
    """One job failed. The text says what was expected, what came and what to do."""

    retryable: ClassVar[bool] = False

    def __init__(self, code: ErrorCode, message: str, *, stage: Stage | None = None, detail: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.stage = stage
        self.detail = None if detail is None else as_utf8(detail)
        """Facts for the log that the caller must not see; None without any."""

    def info(self) -> ErrorInfo:
        """Return the error in the form that the answer has."""
        return ErrorInfo(code=self.code, message=str(self), stage=self.stage, retryable=self.retryable)


class Rejected(JobError):
    """Another attempt would give the same error."""


class Unreachable(Rejected):
    """The operator's rules refuse the source, or its host does not exist. The caller sees an unavailable source."""

    retryable = True


class Unavailable(JobError):
    """A later attempt may succeed."""

    retryable = True

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        stage: Stage | None = None,
        detail: str | None = None,
        retry_after_s: float | None = None,
        is_untried: bool = False,
    ) -> None:
        super().__init__(code, message, stage=stage, detail=detail)
        self.retry_after_s = retry_after_s
        """The pause that the source asks for (`Retry-After`); None if it asks for none."""
        self.is_untried = is_untried
        """Whether no request was made, because an earlier pause of the source is not over. Such a try is no attempt."""


class WrongVectors(ValueError):
    """The vectors of a batch are unusable. `rows` holds the indices of the wrong ones; empty if they are unknown."""

    def __init__(self, message: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.rows = rows


class NonFiniteError(WrongVectors):
    """The model returned NaN or infinity."""


class DeviceErrorKind(Enum):
    """What an error of the device means for the batch that was running."""

    OUT_OF_MEMORY = "out_of_memory"  # a smaller batch may fit
    LOST = "lost"  # the device's context is corrupted: every later call of this process fails
    OTHER = "other"


class ExitCode(IntEnum):
    """Why a worker process ended; docs/operations.md explains each code."""

    OK = 0
    CONFIG = 64  # a setting is missing or wrong
    MODEL = 65  # the model did not load or did not warm up
    LOADERS = 66  # the loader processes crash repeatedly
    DEVICE = 67  # the device context is corrupted
    CANARY = 68  # the canary failed: the device computes wrong results
    GAVE_UP = 69  # launcher: a worker crashed too often
    INTERNAL = 70  # a pipeline thread ended by a defect of shiwu
    OVERDUE = 71  # launcher: a worker was killed before it had drained


BROKEN_DEVICE: Final = frozenset({ExitCode.DEVICE, ExitCode.CANARY})
"""Exit codes of a process whose device must not be trusted any more."""


class FatalError(Exception):
    """The process cannot continue. It releases its jobs and exits with `exit_code`.

    URLs in the message lose user name and password, because a library may quote the URL of a hub, a store or a
    collector. Control characters are escaped, because a file of a model may have any name and content.
    """

    def __init__(self, exit_code: ExitCode, message: str) -> None:
        super().__init__(printable_lines(without_logins(message)))
        self.exit_code = exit_code
