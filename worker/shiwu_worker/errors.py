"""The tree of fates: what an error says about the job it happened to.

JobError
├── Rejected      the picture or the request can't be: answered at once, never retried
│   └── Unreachable   the same, but told like a source that is away
└── Unavailable   not now: given back with a delay, until the attempts are used up

FatalError        this process can't go on: jobs are released, the process exits with `exit_code`
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import ClassVar

from shiwu.contract import ErrorCode, ErrorInfo, Stage, as_utf8


class JobError(Exception):
    """One job went wrong; the text says what was expected, what came and what to do."""

    retryable: ClassVar[bool] = False

    def __init__(self, code: ErrorCode, message: str, *, stage: Stage | None = None, detail: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.stage = stage
        self.detail = None if detail is None else as_utf8(detail)
        """What only the log may say."""

    def info(self) -> ErrorInfo:
        """The error as it stands in the answer."""
        return ErrorInfo(code=self.code, message=str(self), stage=self.stage, retryable=self.retryable)


class Rejected(JobError):
    """Trying again would give the same error."""


class Unreachable(Rejected):
    """Refused by the operator's rules, or no such host. Told as a source that is away, and not tried again here."""

    retryable = True


class Unavailable(JobError):
    """Trying again later may succeed."""

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
        """The pause that the source asks for; None where it asks for none."""
        self.is_untried = is_untried
        """The source was not asked, because a pause that it asked for was not over: no attempt of this job."""


class WrongVectors(ValueError):
    """The model's answer for a batch can't be used as it is. `rows` names the guilty ones where that is known."""

    def __init__(self, message: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.rows = rows


class NonFiniteError(WrongVectors):
    """The model gave NaN or infinity."""


class DeviceErrorKind(Enum):
    """What an error of the device means for the batch that met it."""

    OUT_OF_MEMORY = "out_of_memory"  # a smaller batch may fit
    LOST = "lost"  # the device's context is corrupted: nothing can succeed in this process any more
    OTHER = "other"


class AddressRefused(Exception):
    """The guard of addresses refused a host; only the log may say why."""


class UnknownHost(Exception):
    """The name server knows no such name. Told like AddressRefused, or answers would say which inner names exist."""


class ExitCode(IntEnum):
    """Why a worker process ended. Named, so that an operator need not guess."""

    OK = 0
    CONFIG = 64  # a setting is missing or wrong
    MODEL = 65  # the model did not load or did not warm up
    LOADERS = 66  # loader processes can't be kept alive
    DEVICE = 67  # the device context is corrupted
    CANARY = 68  # the known picture got a wrong answer: the device computes wrong
    GAVE_UP = 69  # the launcher: a worker died again and again
    INTERNAL = 70  # a thread of the pipeline ended by a defect of ours
    OVERDUE = 71  # the launcher: a worker was killed before it had drained


class FatalError(Exception):
    """The process can't go on. It releases its jobs and exits with `exit_code`."""

    def __init__(self, exit_code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
