"""Errors that a user can mend: one clear line and the exit code of the command that meets them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # records needs numpy, which --help must not wait for
    from storage.records import Reason


class VidxError(Exception):
    """Something outside our code is wrong; the message names it, what is allowed, and what to do."""

    exit_code = 1
    advice = ""  # what to do, where every error of the kind is met in the same way; the commands add it to the message


class UsageError(VidxError):
    """A wrong option, source, model directory or question."""

    exit_code = 2


class ArchiveError(VidxError):
    """The archive cannot be written, or what it holds is damaged or too new for this version."""

    exit_code = 5


class DamagedError(ArchiveError):
    """What the archive holds is not what was written."""

    advice = "; `vidx verify` lists all that is damaged, and `vidx repair` mends what it can"


class ClusterError(VidxError):
    """Ray died, does not answer or ran out of memory; what is committed stays, and the same command goes on."""

    exit_code = 6


class VideoProblem(Exception):
    """One video cannot be read, wholly or in part; it becomes that video's status, never the job's end.

    Attributes:
        reason: the counted reason.
        detail: one line for people.
    """

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = " ".join(detail.split())
