"""The process of a job, `python -m pipeline.api.job_child CONNECTION LIFELINE`, of pipeline.api.job_process."""

import signal
import sys
import traceback
from multiprocessing.connection import Connection

from pipeline.api.job_process import Broken
from pipeline.cluster.supervise import continue_in_own_process
from pipeline.index.job import IndexResult, run_index
from storage.archive.archive import open_archive
from storage.errors import VidxError
from workers.models.bundle import find_bundle
from workers.sandbox import die_with_owner


def main() -> None:
    """Runs one job, and says how it ended."""
    connection, lifeline = Connection(int(sys.argv[1])), int(sys.argv[2])
    die_with_owner(lifeline)
    continue_in_own_process()
    signal.signal(signal.SIGTERM, _interrupt)
    outcome = _outcome(connection)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray ends its processes now
        signal.signal(number, signal.SIG_IGN)
    connection.send(outcome)


def _outcome(connection: Connection) -> IndexResult | VidxError | Broken:
    try:
        job = connection.recv()
        bundle = find_bundle(job.config.model, job.config.tower)
        archive = open_archive(job.archive_uri, write=True)
        return run_index(job.assets, archive, bundle, job.sampling, job.config, connection.send)
    except KeyboardInterrupt:  # before there was anything to commit
        return IndexResult(interrupted=True)
    except VidxError as error:
        return error
    except Exception:
        return Broken(traceback.format_exc())


def _interrupt(*_: object) -> None:
    """A scheduler's SIGTERM stops a job as cleanly as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
