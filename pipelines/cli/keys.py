"""`sluice keys`: create, list and revoke API keys of the gateway."""

import json
from typing import Annotated

import typer

from pipelines.cli.output import print_json, print_line, print_progress
from pipelines.cli.user import find_user_name
from services.core import settings as settings_module
from services.core.errors import ConfigurationError
from services.gateway.api_keys import ROLES, ApiKeyRegistry, Role

app = typer.Typer(help="Create, list and revoke API keys of the gateway.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The owner of the key. Histories and logs show this name.")],
    role: Annotated[
        str, typer.Option(help="moderate: judge images; review: also read policies; admin: also change them.")
    ],
    tenant: Annotated[str, typer.Option(help="The tenant of the images that are judged with this key.")] = "default",
    rate: Annotated[float | None, typer.Option(metavar="N", help="Limit of images per second in all gateways.")] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Limit of concurrent requests, per gateway replica. More images at a time count as more requests.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it. It cannot be shown again, because only its digest is stored."""
    key, token = _open_registry().create(
        name, _parse_role(role), tenant=tenant, rate_per_s=rate, concurrency=concurrency, who=find_user_name()
    )
    print_progress(f"key {key.id} for {key.name}: role {key.role}, tenant {key.tenant}")
    if as_json:
        print_json(json.dumps({"id": key.id, "key": token}))
    else:
        print_line(token)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List all keys, including revoked ones, oldest first."""
    registry = _open_registry()
    index = registry.read_index()
    for key in sorted(registry.get_each(list(index)), key=lambda key: key.created_at):
        revoked = index[key.id]
        if as_json:
            print_json(key.listing_json(revoked=revoked))
        else:
            print_line(key.listing_line(revoked=revoked))


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Revoke a key permanently.

    Every gateway refuses it within SLUICE_GATEWAY_KEYS_REFRESH_S, or within 5 minutes if the policy bucket does not
    answer.
    """
    _open_registry().revoke(key_id, who=find_user_name())
    print_progress(f"key {key_id} is revoked")


def _open_registry() -> ApiKeyRegistry:
    return ApiKeyRegistry.from_settings(settings_module.load("policy_bucket"))


def _parse_role(role: str) -> Role:
    for known in ROLES:
        if role == known:
            return known
    raise ConfigurationError(f"{role!r} is not a role; --role is one of {', '.join(ROLES)}")
