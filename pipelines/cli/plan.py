"""`sluice plan`: how large a fleet a load needs."""

import json
from typing import Annotated, Literal

import typer

from pipelines.cli.times import parse_duration


def plan(
    rate: Annotated[str, typer.Option(help="Submissions: 400/s, 24000/min, 1000000/h.")],
    checkpoint: Annotated[str, typer.Option(help="As SLUICE_MODEL.")],
    gpu: Annotated[str, typer.Option(help="A card: l4, a10g, l40s, a100-80gb, h100, h200, ...")],
    objective: Annotated[str, typer.Option(help="From submission to verdict: 30s, 5m.")] = "5m",
    image: Annotated[
        Literal["small", "medium", "large"], typer.Option(help="Up to 384 px, 1024 x 768, 1920 x 1080.")
    ] = "medium",
    replica_rate: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Measured submissions a second of one replica, instead of a computed one."),
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Default: as many as a replica has.")] = None,
    day: Annotated[bool, typer.Option("--day", help="Also simulate a day of that mean rate, with spikes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as one JSON object.")] = False,
) -> None:
    """Compute the replicas, nodes, partitions and GPU-hours that a load needs."""
    from pipelines.autoscaling import capacity  # noqa: PLC0415 - the others need not wait for it

    found = capacity.plan_capacity(
        rate=capacity.parse_rate(rate),
        objective_s=parse_duration(objective),
        checkpoint=checkpoint,
        gpu=gpu,
        image=image,
        replica_rate=replica_rate,
        gpus_per_node=gpus_per_node,
        day=day,
    )
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    rows = {
        "replicas": f"{found.replicas} of {found.gpus_per_replica} {found.gpu}, {found.replica_rate:.2f}/s each",
        "nodes": found.nodes,
        "intake members": found.intake_members,
        "partitions": f"{found.partitions} at least",
        "GPU-hours a million": f"{found.gpu_hours_per_million:.1f}",
    }
    if found.day:
        rows["a day with spikes"] = (
            f"p50 {found.day['p50_s']:.0f} s, p95 {found.day['p95_s']:.0f} s, p99 {found.day['p99_s']:.0f} s; "
            f"{found.day['fewest_replicas']:.0f} to {found.day['most_replicas']:.0f} replicas, "
            f"{found.day['gpu_hours_per_million']:.1f} GPU-hours a million (simulated)"
        )
    for name, value in rows.items():
        typer.echo(f"{name:<20} {value}")
    typer.echo(f"The rate of a replica is {found.source}.", err=True)
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
