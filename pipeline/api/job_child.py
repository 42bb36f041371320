"""The process that pipeline.api.job_process starts for a job: job_child CONNECTION LIFELINE."""

import sys
import traceback
from multiprocessing.connection import Connection

from pipeline.api.job_process import Broken
from pipeline.cluster.supervise import continue_in_own_process, ignore_interrupts, interrupt_on_sigterm
from pipeline.index.job import IndexResult, run_index
from storage.archive.archive import open_archive
from storage.errors import VidxError
from workers.models.bundle import find_bundle
from workers.sandbox import die_with_owner


def main() -> None:
    """Runs one job, and sends its result."""
    connection, lifeline = Connection(int(sys.argv[1])), int(sys.argv[2])
    die_with_owner(lifeline)
    continue_in_own_process()
    interrupt_on_sigterm()
    outcome = _outcome(connection)
    ignore_interrupts()
    connection.send(outcome)


def _outcome(connection: Connection) -> IndexResult | VidxError | Broken:
    try:
        job = connection.recv()
        bundle = find_bundle(job.config.model, job.config.tower)
        archive = open_archive(job.archive_uri, write=True)
        return run_index(job.assets, archive, bundle, job.sampling, job.config, connection.send)
    except KeyboardInterrupt:  # there was nothing to commit yet
        return IndexResult(interrupted=True)
    except VidxError as error:
        return error
    except Exception:
        return Broken(traceback.format_exc())


if __name__ == "__main__":
    main()
