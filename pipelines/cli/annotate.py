"""`sluice annotate`: judge a data set, and pick from it what is wanted."""

import json
from typing import Annotated

import typer

from pipelines.annotation import filters as filtering
from pipelines.annotation.options import AnnotateOptions, CuratedFormat, SourceKind
from services.core import settings as settings_module
from services.core.errors import ConfigurationError
from services.core.values import DEFAULT_POLICY


def annotate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder, a file or an s3:// prefix: images, lists of references, tars, parquet."
        ),
    ],
    out: Annotated[str, typer.Option(metavar="DEST", help="A folder or an s3:// prefix for the annotations.")],
    policy: Annotated[
        str, typer.Option(metavar="NAME[@V]", help="NAME for the version that is active at the beginning.")
    ] = DEFAULT_POLICY,
    kind: Annotated[
        SourceKind | None, typer.Option("--format", help="What the source is, where its names do not tell.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column with the references or the images.")
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A list may name files below this folder; its own folder unless given."),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Start so many guards, instead of sharing the service's.")
    ] = None,
    share_guard: Annotated[
        bool, typer.Option("--share-guard", help="Judge on the running service's guard, or not at all.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes that read and prepare; one a guard unless given.")
    ] = None,
    chunk_rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Images that are kept as one: what a kill costs a worker.")
    ] = None,
    wanted: Annotated[
        str | None, typer.Option("--filter", metavar="CONDITIONS", help="Such as rating=Safe,score<0.2")
    ] = None,
    curated: Annotated[
        str | None, typer.Option(metavar="DEST", help="Where what the filter keeps is written to.")
    ] = None,
    form: Annotated[
        CuratedFormat, typer.Option("--as", help="References to the images, or tars with them.")
    ] = "references",
    as_json: Annotated[bool, typer.Option("--json", help="The summary as one JSON object.")] = False,
) -> None:
    """Judge every image of a data set and write a row for each; killed, the same command goes on where it was."""
    from pipelines.annotation import run as annotating  # noqa: PLC0415 - it takes Ray

    if (wanted is None) != (curated is None):
        raise ConfigurationError("--filter says what to keep and --curated where to write it; give both")
    if share_guard and replicas:
        raise ConfigurationError("--share-guard and --replicas exclude each other; give one of them")
    options = AnnotateOptions(
        source=source,
        out=out,
        policy=policy,
        kind=kind,
        column=column,
        root=root,
        replicas=replicas,
        share_guard=share_guard,
        workers=workers,
        chunk_rows=chunk_rows,
        wanted=filtering.parse(wanted) if wanted is not None else None,
        curated=curated,
        curated_format=form,
    )
    settings = settings_module.load("model")
    try:
        summary, kept = annotating.annotate(options, settings, lambda line: typer.echo(line, err=True))
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    if as_json:
        if kept:
            summary = summary | {"curated": {"images": kept.images, "files": kept.files, "lost": kept.lost}}
        typer.echo(json.dumps(summary))
        return
    for name in ("outcome", "rating", "category", "action"):
        for value, rows in summary[name].items():
            typer.echo(f"{name:<9} {value:<42} {rows:>12,}")
    for reason, found in summary["errors"].items():
        typer.echo(f"{'error':<9} {reason:<42} {found['rows']:>12,}")
    if kept:
        typer.echo(f"{'curated':<9} {f'in {kept.files} files':<42} {kept.images:>12,}")
        if kept.lost:
            typer.echo(f"{kept.lost} images could not be read any more and are not among them", err=True)
