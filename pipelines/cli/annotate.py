"""`sluice annotate`: judge a data set, and write a curated set of the images that pass a filter."""

import json
from typing import Annotated

import typer

from pipelines.annotation.filters import parse_filter
from pipelines.annotation.options import AnnotateOptions, CuratedFormat, SourceKind
from pipelines.cli.output import print_json, print_lines, print_progress
from services.core import settings as settings_module
from services.core.errors import ConfigurationError
from services.core.values import DEFAULT_POLICY


def annotate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder, a file or an s3:// prefix with images, reference lists, tars or parquet."
        ),
    ],
    out: Annotated[str, typer.Option(metavar="DEST", help="Write the annotations to this folder or s3:// prefix.")],
    policy: Annotated[
        str, typer.Option(metavar="NAME[@V]", help="NAME is the version that is active at the start of the run.")
    ] = DEFAULT_POLICY,
    source_kind: Annotated[
        SourceKind | None, typer.Option("--format", help="The format of the source. Default: detected from file names.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column with the references or the images.")
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help=("Allow references and links to local files below this folder. Default: the folder of the source."),
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Start N guard replicas instead of sharing those of the service."),
    ] = None,
    share_guard: Annotated[
        bool, typer.Option("--share-guard", help="Judge on the guard of the running service. Fails if none runs.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes that read and decode images. Default: one per guard replica."),
    ] = None,
    chunk_rows: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Images per chunk. A worker that is killed loses one chunk of work."),
    ] = None,
    row_filter: Annotated[
        str | None,
        typer.Option(
            "--filter", metavar="CONDITIONS", help="Conditions of the curated set, such as rating=Safe,score<0.2"
        ),
    ] = None,
    curated: Annotated[
        str | None,
        typer.Option(metavar="DEST", help="Write the images that pass the filter to this folder or s3:// prefix."),
    ] = None,
    curated_format: Annotated[
        CuratedFormat, typer.Option("--as", help="Write references to the images, or tars that contain them.")
    ] = "references",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Judge every image of a data set and write one row for each. The same command resumes a killed run."""
    from pipelines.annotation.run import annotate as annotate_data_set  # noqa: PLC0415 - it loads Ray
    from pipelines.annotation.summary import add_curated, format_summary  # noqa: PLC0415

    if (row_filter is None) != (curated is None):
        raise ConfigurationError("--filter and --curated need each other; give both or none")
    if share_guard and replicas:
        raise ConfigurationError("--share-guard and --replicas exclude each other; give only one of them")
    options = AnnotateOptions(
        source=source,
        out=out,
        policy=policy,
        source_kind=source_kind,
        column=column,
        root=root,
        replicas=replicas,
        share_guard=share_guard,
        workers=workers,
        chunk_rows=chunk_rows,
        row_filter=parse_filter(row_filter) if row_filter is not None else None,
        curated=curated,
        curated_format=curated_format,
    )
    settings = settings_module.load("model")
    try:
        summary, curated_set = annotate_data_set(options, settings, print_progress)
    except KeyboardInterrupt:
        print_progress("stopped; the same command resumes the run")
        raise typer.Exit(130) from None
    if as_json:
        print_json(json.dumps(add_curated(summary, curated_set)))
        return
    print_lines(format_summary(summary, curated_set))
    if curated_set and curated_set.unreadable:
        print_progress(f"{curated_set.unreadable} images could not be read any more and are not in the curated set")
