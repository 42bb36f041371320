"""The process that pipeline.api.job_process starts for a job: job_child CONNECTION LIFELINE."""

import sys
import traceback
from multiprocessing.connection import Connection

from pipeline.api.job_process import Broken
from pipeline.cluster.supervise import continue_in_own_process, ignore_interrupts, interrupt_on_sigterm
from pipeline.index.job import IndexResult, plan_index, run_index
from pipeline.index.scan import Scan
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
        plan = plan_index(Scan(job.sources).videos(), archive, bundle, job.sampling, job.config)
        return run_index(plan, archive, bundle, job.config, connection.send)
    except KeyboardInterrupt:  # there was nothing to commit yet
        return IndexResult(interrupted=True)
    except VidxError as error:
        return error
    except Exception:
        return Broken(traceback.format_exc())


if __name__ == "__main__":
    main()
