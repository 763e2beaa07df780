"""`sluice keys`: who may ask the gateway for what."""

import json
from typing import Annotated

import typer

from pipelines.reporting.text import user
from services.core import settings as settings_module
from services.core.errors import ConfigurationError
from services.gateway.api_keys import ROLES, ApiKey, ApiKeyRegistry, Role

app = typer.Typer(help="Create, list and revoke API keys of the gateway.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
_FIELDS = {"id", "name", "role", "tenant", "rate_per_s", "concurrency", "created_at", "created_by"}


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is; it stands in the history of what is done with it.")],
    role: Annotated[str, typer.Option(help="moderate: judge; review: read policies, too; admin: change them.")],
    tenant: Annotated[str, typer.Option(help="Whose images are judged with it.")] = "default",
    rate: Annotated[float | None, typer.Option(metavar="N", help="Requests a second.")] = None,
    concurrency: Annotated[int | None, typer.Option(metavar="N", help="Requests at a time, per gateway.")] = None,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it. It is shown this once: only its digest is kept."""
    key, token = _registry().create(
        name, _role(role), tenant=tenant, rate_per_s=rate, concurrency=concurrency, who=user()
    )
    typer.echo(f"key {key.id} for {key.name}: role {key.role}, tenant {key.tenant}", err=True)
    typer.echo(json.dumps({"id": key.id, "key": token}) if as_json else token)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List all keys, revoked ones too, oldest first."""
    registry = _registry()
    index = registry.read_index()
    for key in sorted(registry.get_each(list(index)), key=lambda key: key.created_at):
        revoked = index[key.id]
        shown = key.model_dump(mode="json", include=_FIELDS) | {"revoked": revoked}
        typer.echo(json.dumps(shown) if as_json else _line(key, revoked))


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Revoke a key for ever. Every gateway refuses it within SLUICE_GATEWAY_KEYS_REFRESH_S."""
    _registry().revoke(key_id, who=user())
    typer.echo(f"key {key_id} is revoked", err=True)


def _registry() -> ApiKeyRegistry:
    return ApiKeyRegistry.from_settings(settings_module.load("policy_bucket"))


def _role(role: str) -> Role:
    for known in ROLES:
        if role == known:
            return known
    raise ConfigurationError(f"{role!r} is not a role; --role is one of {', '.join(ROLES)}")


def _line(key: ApiKey, revoked: bool) -> str:
    limits = [
        f"{key.rate_per_s:g}/s" if key.rate_per_s else "",
        f"{key.concurrency} at a time" if key.concurrency else "",
    ]
    parts = [key.role, f"tenant {key.tenant}", *filter(None, limits), "revoked" if revoked else ""]
    return f"{key.id} {key.created_at:%Y-%m-%d} {key.name:<24} {', '.join(filter(None, parts))}"
