"""`headrace keys`: the API keys of a running service."""

from typing import Any
from urllib.parse import quote, urlencode

import click

from headrace.cli.client import Client
from headrace.cli.display import at, console, show_json, show_rows

_KEYS = "/api/v1/keys"


@click.group()
@click.option("--url", envvar="HEADRACE_URL", default="http://127.0.0.1:8000", show_default=True, show_envvar=True)
@click.option("--token", envvar="HEADRACE_SERVER_TOKEN", show_envvar=True, help="The server's token; no key will do.")
@click.pass_context
def keys(context: click.Context, *, url: str, token: str | None) -> None:
    """Make, list and revoke API keys of a running service."""
    context.obj = Client(url, token=token)


@keys.command()
@click.argument("tenant")
@click.option("--tier", help="One of agents.tiers.")
@click.option(
    "--permission",
    "permissions",
    multiple=True,
    metavar="NAME",
    help="agent:deploy, agent:update, agent:delete, agent:execute, agent:monitor or system:health; may be repeated."
    "  [default: all]",
)
@click.option("--name", default="", help="What the key is for.")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="How long it is valid.  [default: for ever]")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@click.pass_obj
def create(
    client: Client,
    *,
    tenant: str,
    tier: str | None,
    permissions: tuple[str, ...],
    name: str,
    days: float | None,
    as_json: bool,
) -> None:
    """Make a key for a TENANT and print it, this once."""
    request: dict[str, Any] = {"tenant": tenant, "name": name}
    if permissions:
        request["permissions"] = permissions
    if tier is not None:
        request["tier"] = tier
    if days is not None:
        request["expires_in"] = days * 86_400
    made = client.post(_KEYS, request)
    if as_json:
        show_json(made)
    else:
        # The key alone on standard output, for `key=$(headrace keys create ...)`.
        click.echo(f"key {made['key_id']} for {made['tenant']}; it is not shown again", err=True)
        click.echo(made["key"])


@keys.command(name="list")
@click.option("--tenant", help="Only this one's.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@click.pass_obj
def list_keys(client: Client, *, tenant: str | None, as_json: bool) -> None:
    """List the keys, without their secrets."""
    found: list[dict[str, Any]] = []
    after: str | None = ""
    while after is not None:
        query = {"limit": 200, "after": after} | ({"tenant": tenant} if tenant else {})
        page = client.get(f"{_KEYS}?{urlencode(query)}")
        found += page["keys"]
        after = page["next_after"]
    if as_json:
        show_json({"keys": found})
        return
    show_rows(
        ("key", "tenant", "tier", "permissions", "name", "created", "expires", "revoked"),
        [
            (
                *(key[field] for field in ("key_id", "tenant", "tier")),
                " ".join(key["permissions"]),
                key["name"],
                *(at(key[field]) for field in ("created_at", "expires_at", "revoked_at")),
            )
            for key in found
        ],
        title=f"{len(found)} keys",
    )


@keys.command()
@click.argument("key_id")
@click.pass_obj
def revoke(client: Client, *, key_id: str) -> None:
    """End a key, named by its id or its whole text."""
    ended = client.delete(f"{_KEYS}/{quote(key_id.removeprefix('hr_').partition('_')[0], safe='')}")
    console.print(f"[green]revoked[/] {ended['key_id']} of {ended['tenant']}")
