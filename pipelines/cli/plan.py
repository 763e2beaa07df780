"""`sluice plan`: compute the replicas and nodes that a load needs."""

import json
from typing import Annotated, Literal

import typer

from pipelines.cli.output import print_json, print_lines, print_progress
from pipelines.cli.times import parse_duration, parse_rate


def plan(
    rate: Annotated[str, typer.Option(help="Submissions per time, such as 400/s, 24000/min or 1000000/h.")],
    checkpoint: Annotated[str, typer.Option(help="The checkpoint, as in SLUICE_MODEL.")],
    gpu: Annotated[str, typer.Option(help="The GPU model: l4, a10g, l40s, a100-80gb, h100, h200, ...")],
    objective: Annotated[str, typer.Option(help="Time from submission to verdict, such as 30s or 5m.")] = "5m",
    image: Annotated[
        Literal["small", "medium", "large"], typer.Option(help="Images up to 384 px, 1024 x 768, or 1920 x 1080.")
    ] = "medium",
    replica_rate: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Measured submissions per second of one replica. Default: computed."),
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Default: the GPUs of one replica.")] = None,
    day: Annotated[
        bool, typer.Option("--day", help="Also simulate a day with this mean rate and with spikes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object.")] = False,
) -> None:
    """Compute the replicas, nodes, partitions and GPU-hours that a load needs."""
    from pipelines.autoscaling.capacity import plan_capacity  # noqa: PLC0415 - other commands need not wait for it

    computed = plan_capacity(
        rate=parse_rate(rate),
        objective_s=parse_duration(objective),
        checkpoint=checkpoint,
        gpu=gpu,
        image=image,
        replica_rate=replica_rate,
        gpus_per_node=gpus_per_node,
        day=day,
    )
    if as_json:
        print_json(json.dumps(computed.as_dict()))
        return
    print_lines(computed.lines())
    print_progress(f"The rate of a replica is {computed.source}.")
    for note in computed.notes:
        print_progress(f"note: {note}")
