"""Errors that a user can correct: each has a message of one line and the exit code of the command."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # records imports numpy, which --help must not wait for
    from storage.records import Reason


class VidxError(Exception):
    """Something outside vidx is wrong; the message names it, what is allowed, and what to do."""

    exit_code = 1
    advice = ""  # what to do, if it is the same for every error of the class; the commands add it to the message


class UsageError(VidxError):
    """A wrong option, source, model directory or question."""

    exit_code = 2


class NoArchiveError(UsageError):
    """There is no archive at a place."""

    advice = ", or name another with --archive"


class ArchiveError(VidxError):
    """The archive cannot be read or written, is damaged, or has another format."""

    exit_code = 5


class DamagedError(ArchiveError):
    """A file of the archive is missing or damaged."""

    advice = "; `vidx verify` lists all damage, and `vidx repair` repairs what it can"


class ClusterError(VidxError):
    """Ray died, does not answer or ran out of memory; what is committed stays, and the same command continues."""

    exit_code = 6


class UnavailableError(ClusterError):
    """A cluster or its resources are not there; the same command may work later (sysexits' EX_TEMPFAIL)."""

    exit_code = 75


class VideoProblem(Exception):
    """A video cannot be read, or not completely; this becomes the status of the video and does not end the job.

    Attributes:
        reason: the reason, by which failures are counted.
        detail: one line for people.
    """

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = " ".join(detail.split())
