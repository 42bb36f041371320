"""Indexing from Python: `vidx index` as a function."""

import os
from collections.abc import Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Literal

from pipeline.api.parameters import check, naming_parameters, place_of

if TYPE_CHECKING:
    from pipeline.index.job import IndexResult
    from pipeline.index.progress import Report

Path = str | PathLike[str]


@naming_parameters
def index(
    sources: Path | Sequence[Path],
    archive: Path = "./vidx-archive",
    *,
    model: str | None = None,
    tower: str | None = None,
    sample: Literal["rate", "keyframes", "scenes"] | None = None,
    fps: float | str | None = None,
    patches: int | None = None,
    thumbnails: bool | None = None,
    config: str | None = None,
    rehash: bool = False,
    retry_failed: bool = False,
    restore_deleted: bool = False,
    address: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    wait_for_resources: float | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    batch: int | None = None,
    max_pixels: int | None = None,
    decoder: Literal["pyav", "decord"] | None = None,
    strict_sandbox: bool = False,
    progress: "Report | None" = None,
) -> "IndexResult":
    """Indexes videos into an archive, as `vidx index` does.

    The job and Ray run in a separate process, which ends with the job. The function can be called from any thread, and
    from a script without `if __name__ == "__main__"`.

    Args:
        sources: videos, folders (recursive), globs and manifests, one or several.
        archive: the folder; it is created if there is none and a video to index.
        model, tower, sample, fps, patches, thumbnails, config, rehash, retry_failed, restore_deleted, address, workers,
            gpus_per_worker, wait_for_resources, device, dtype, batch, max_pixels, decoder, strict_sandbox: as the
            options of `vidx index`; None for their defaults.
        progress: gets the state of the job a few times per second.
    Returns:
        Counts, and the videos that are partial or failed; these do not raise an error.
    Raises:
        UsageError: there is no such source, a value is wrong, or the archive has another model.
        ArchiveError: the archive cannot be written.
        ClusterError: Ray's processes died; call the function again to continue.
        KeyboardInterrupt: the job was interrupted; finished work is committed.
    """
    from pipeline.api.job_process import IndexJob, run_job
    from pipeline.index.config import load_config
    from pipeline.index.job import IndexResult, check_machine, sampling_of
    from pipeline.index.scan import Scan
    from storage.archive.archive import archive_exists, create_archive
    from workers.models.bundle import find_bundle

    paths = [sources] if isinstance(sources, str | PathLike) else list(sources)
    check("sources", sources, bool(paths), "must name at least one video, folder, glob or manifest")
    given = {
        "model": model,
        "tower": tower,
        "sample": sample,
        "fps": fps,
        "patches": patches,
        "thumbnails": thumbnails,
        "rehash": rehash or None,
        "retry_failed": retry_failed or None,
        "restore_deleted": restore_deleted or None,
        "address": address,
        "workers": workers,
        "gpus_per_worker": gpus_per_worker,
        "wait_for_resources": wait_for_resources,
        "device": device,
        "dtype": dtype,
        "batch": batch,
        "max_pixels": max_pixels,
        "decoder": decoder,
        "strict_sandbox": strict_sandbox or None,
    }
    settings = load_config(config, given)
    if settings.address is None:
        check_machine(settings)
    places = [os.path.expanduser(fspath(path)) for path in paths]
    is_empty = Scan(places).is_empty
    bundle = find_bundle(settings.model, settings.tower)
    sampling = sampling_of(settings, bundle)
    if settings.address is not None and not is_empty:
        from pipeline.cluster.address import check_address

        check_address(settings.address)
    place = place_of(archive)
    if is_empty and not archive_exists(place):
        return IndexResult()  # for nothing, no archive is made
    names = {"model_name": bundle.name, "model_tower": bundle.tower_name}
    stored = create_archive(place, model_id=bundle.model_id, **names)
    job = IndexJob(places, stored.uri, sampling, settings)
    result = run_job(job, progress or (lambda state: None))
    if result.interrupted:
        raise KeyboardInterrupt
    return result
