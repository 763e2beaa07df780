"""`sluice keys`: create, list and revoke API keys of the gateway."""

import json
from typing import Annotated

import typer

from pipelines.cli.output import print_json, print_line, print_progress
from pipelines.cli.user import find_user_name
from services.core import settings as settings_module
from services.core.errors import ConfigurationError
from services.core.tenancy import DEFAULT_TENANT, Tenancy
from services.gateway.api_keys import ROLES, ApiKeyRegistry, Role

app = typer.Typer(help="Create, list and revoke API keys of the gateway.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The owner of the key. Histories and logs show this name.")],
    role: Annotated[
        str, typer.Option(help="moderate: judge images; review: also read policies; admin: also change them.")
    ],
    tenant: Annotated[
        str,
        typer.Option(
            help="The tenant of the images that are judged with this key. If tenants are separated "
            "(SLUICE_TENANT_PREFIXES), the key may use only the objects and policies of this tenant."
        ),
    ] = DEFAULT_TENANT,
    prefix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="S3-URI",
            help="Only objects below this prefix, of those of the tenant: s3://uploads/shop/, or s3://uploads for a "
            "bucket. Can be repeated.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this policy, of those of the tenant. Can be repeated."),
    ] = None,
    all_tenants: Annotated[
        bool, typer.Option("--all-tenants", help="The objects and policies of every tenant.")
    ] = False,
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
    settings = settings_module.load("policy_bucket")
    key, token = ApiKeyRegistry.from_settings(settings).create(
        name,
        _parse_role(role),
        tenant=tenant,
        all_tenants=all_tenants,
        prefixes=prefix or None,
        policies=policy or None,
        rate_per_s=rate,
        concurrency=concurrency,
        who=find_user_name(),
    )
    print_progress(f"key {key.id} for {key.name}: role {key.role}, tenant {key.tenant}")
    tenancy = Tenancy(settings.tenant_prefixes, settings.tenant_policies)
    if tenancy.is_separated and not all_tenants and not tenancy.list_prefixes(tenant):
        print_progress(
            f"the tenant {tenant} has no prefix in SLUICE_TENANT_PREFIXES, so the key can judge uploads only; for "
            "objects in S3, revoke the key and create one with another --tenant"
        )
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
