"""`vidx models`."""

import contextlib

import click

from pipeline.cli_options import archive_option, archive_uri, json_option


@click.command()
@archive_option
@json_option
def models(archive_dir: str, as_json: bool) -> None:
    """List the models at hand: built in, and published ones in the local hub cache.

    The model that an existing archive was made with is marked.

    \b
    vidx models
    vidx models --json
    """
    from pipeline.cli_print import print_json, print_table
    from storage.archive import archive_exists, open_archive
    from storage.errors import ArchiveError
    from workers.bundle import list_bundles

    uri = archive_uri(archive_dir)
    used = None
    with contextlib.suppress(ArchiveError):  # a damaged archive has nothing to say of models; others have
        used = open_archive(uri).model_id if archive_exists(uri) else None
    bundles = list_bundles()
    if as_json:
        print_json(
            [
                {
                    "name": bundle.name,
                    "model_id": bundle.model_id,
                    "licence": bundle.card.licence,
                    "knows": bundle.card.knows,
                    "does_not_know": bundle.card.does_not_know,
                    "used_by_archive": bundle.model_id == used,
                }
                for bundle in bundles
            ]
        )
        return
    rows = [
        (
            bundle.name + (" *" if bundle.model_id == used else ""),
            bundle.model_id,
            bundle.card.licence,
            bundle.card.knows,
        )
        for bundle in bundles
    ]
    print_table(("name", "id", "licence", "knows"), rows)
    if used is not None:
        click.echo(f"* made the archive {archive_dir}")
