"""`headrace agents`: deploy, run and look at agents of a running service."""

import base64
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from headrace.cli.client import Client
from headrace.cli.display import (
    at,
    colour_of,
    console,
    plain,
    show_execution,
    show_json,
    show_pairs,
    show_rows,
    visible,
)
from headrace.errors import CallerError

_AGENTS = "/api/v1/agents"
_POLL_S = 0.1
_FINISHED = {"completed", "failed", "timeout", "cancelled", "interrupted"}

Command = Callable[..., Any]
_as_json = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")


@click.group()
@click.option("--url", envvar="HEADRACE_URL", default="http://127.0.0.1:8000", show_default=True, show_envvar=True)
@click.option("--token", envvar="HEADRACE_SERVER_TOKEN", show_envvar=True, help="An API key, or the server's token.")
@click.pass_context
def agents(context: click.Context, *, url: str, token: str | None) -> None:
    """Deploy, run and look at agents of a running service."""
    context.obj = Client(url, token=token)


# -- versions --------------------------------------------------------------------------------------------------------


@agents.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--id", "agent_id", help="The agent's id.  [default: the file's name]")
@click.option("--version", help="A semantic version.  [default: 1.0.0, or one patch above when the source changed]")
@click.option("--entrypoint", default="Agent", show_default=True, help="The class or async function to execute.")
@click.option("--tag", "tags", multiple=True, help="May be repeated.")
@click.option("--environment", help="Kept as a tag; `list --environment` finds it.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds that an execution may take.")
@click.option("--idempotent", is_flag=True, help="Running it twice does no harm: failed executions are tried again.")
@click.option("--canary", type=click.FloatRange(0, 100, min_open=True, max_open=True), help="Percent, for a trial.")
@_as_json
@click.pass_obj
def deploy(
    client: Client,
    *,
    file: Path,
    agent_id: str | None,
    version: str | None,
    entrypoint: str,
    tags: tuple[str, ...],
    environment: str | None,
    timeout: float | None,
    idempotent: bool,
    canary: float | None,
    as_json: bool,
) -> None:
    """Put a Python FILE into service as an agent."""
    source = file.read_bytes()
    agent_id = agent_id or file.stem
    configuration: dict[str, Any] = {"idempotent": idempotent}
    if timeout is not None:
        configuration["timeout"] = timeout
    deployment: dict[str, Any] = {}
    if environment is not None:
        deployment["environment"] = environment
    if canary is not None:
        deployment |= {"strategy": "canary", "traffic_percentage": canary}
    request = {
        "agent_metadata": {
            "agent_id": agent_id,
            "version": version or _next_version(client, agent_id, source),
            "tags": tags,
        },
        "agent_code": {
            "source_code": base64.b64encode(source).decode(),
            "entrypoint": entrypoint,
            "configuration": configuration,
        },
        "deployment_config": deployment,
    }
    _say_deployed(client.post(f"{_AGENTS}/deploy", request), as_json=as_json)


@agents.command()
@click.argument("agent_id")
@click.argument("version", required=False)
@click.option("--share", type=click.FloatRange(0, 100, min_open=True, max_open=True), default=10.0, show_default=True)
@click.option("--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A source for the version.")
@click.option("--promote", is_flag=True, help="Put the version on trial into service.")
@click.option("--abort", is_flag=True, help="End the trial.")
@_as_json
@click.pass_obj
def canary(
    client: Client,
    *,
    agent_id: str,
    version: str | None,
    share: float,
    file: Path | None,
    promote: bool,
    abort: bool,
    as_json: bool,
) -> None:
    """Try a VERSION beside the one in service, with SHARE percent of the executions."""
    if promote and abort:
        raise CallerError("A trial is promoted or aborted, not both.", fix="Leave --promote or --abort out.")
    if abort:
        _say_in_service(client.post(_path(agent_id, "rollback"), {"reason": "by hand"}), as_json=as_json)
        return
    if promote:
        trial = client.get(_path(agent_id))["canary"]
        if trial is None:
            raise CallerError(f"The agent {agent_id!r} has no version on trial.", fix="Name a version to try first.")
        _say_deployed(client.put(_path(agent_id, "versions", trial["version"]), {}), as_json=as_json)
        return
    if version is None:
        raise CallerError("There is no version to try.", fix="Write `headrace agents canary AGENT VERSION`.")
    request: dict[str, Any] = {"strategy": "canary", "traffic_percentage": share}
    if file is not None:
        request["agent_code"] = {"source_code": base64.b64encode(file.read_bytes()).decode()}
    _say_deployed(client.put(_path(agent_id, "versions", version), request), as_json=as_json)


@agents.command()
@click.argument("agent_id")
@click.argument("version", required=False)
@_as_json
@click.pass_obj
def rollback(client: Client, *, agent_id: str, version: str | None, as_json: bool) -> None:
    """Back to a VERSION; without one, a trial ends, or what served before serves again."""
    _say_in_service(
        client.post(_path(agent_id, "rollback"), {} if version is None else {"version": version}), as_json=as_json
    )


@agents.command()
@click.argument("agent_id")
@_as_json
@click.pass_obj
def versions(client: Client, *, agent_id: str, as_json: bool) -> None:
    """List how an agent's versions came into service, newest first."""
    page = client.get(_path(agent_id, "deployments?limit=200"))
    if as_json:
        show_json(page)
        return
    show_rows(
        ("version", "status", "strategy", "percent", "replaced", "deployed", "deployment", "error"),
        [
            (
                *(each[name] for name in ("version", "status", "strategy", "traffic_percentage", "replaced")),
                at(each["created_at"]),
                each["deployment_id"],
                each["error"],
            )
            for each in page["deployments"]
        ],
        title=f"{page['total']} deployments of {agent_id}",
    )


@agents.command()
@click.argument("agent_id")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def undeploy(client: Client, *, agent_id: str, yes: bool) -> None:
    """Take an agent out of service; deploying one of its versions again puts it back."""
    if not yes:
        click.confirm(f"Take {agent_id} out of service, and cancel what it has queued?", abort=True)
    gone = client.delete(_path(agent_id))
    console.print(f"[green]out of service[/] {gone['agent_id']}; {gone['cancelled']} queued executions cancelled")


# -- looking ---------------------------------------------------------------------------------------------------------


@agents.command(name="list")
@click.option("--tag", help="Only with this tag.")
@click.option("--environment", help="Only of this environment.")
@click.option("--page", type=click.IntRange(min=1), default=1, show_default=True, help="200 agents each.")
@_as_json
@click.pass_obj
def list_agents(client: Client, *, tag: str | None, environment: str | None, page: int, as_json: bool) -> None:
    """List the agents in service."""
    filters = "".join(
        f"&{name}={quote(value, safe='')}" for name, value in (("tag", tag), ("environment", environment)) if value
    )
    found = client.get(f"{_AGENTS}?limit=200&page={page}{filters}")
    if as_json:
        show_json(found)
        return
    show_rows(
        ("agent", "version", "status", "tags", "completed", "failed", "timeout"),
        [
            (
                *(agent[name] for name in ("agent_id", "version", "status")),
                " ".join(agent["tags"]),
                *(agent["executions"][name] for name in ("completed", "failed", "timeout")),
            )
            for agent in found["agents"]
        ],
        title=f"{found['total']} agents",
    )


@agents.command()
@click.argument("agent_id")
@_as_json
@click.pass_obj
def show(client: Client, *, agent_id: str, as_json: bool) -> None:
    """Show an agent: its version in service, its trial, its aliases, what it can do."""
    agent = client.get(_path(agent_id))
    if as_json:
        show_json(agent)
    else:
        show_pairs({name: value for name, value in agent.items() if value not in (None, [], {})})


@agents.command()
@click.argument("agent_id")
@click.argument("execution_id", required=False)
@_as_json
@click.pass_obj
def status(client: Client, *, agent_id: str, execution_id: str | None, as_json: bool) -> None:
    """Show the version in service and its totals, or one execution."""
    if execution_id is None:
        found = client.get(_path(agent_id, "status"))
        (show_json if as_json else show_pairs)(found)
        return
    execution = client.get(_path(agent_id, "executions", execution_id))
    (show_json if as_json else show_execution)(execution)


@agents.command()
@click.argument("agent_id")
@click.argument("execution_id")
@_as_json
@click.pass_obj
def logs(client: Client, *, agent_id: str, execution_id: str, as_json: bool) -> None:
    """Print what an execution has emitted until now."""
    found = client.get(_path(agent_id, "executions", execution_id, "logs"))
    if as_json:
        show_json(found)
        return
    if found["dropped"]:
        click.echo(f"{found['dropped']} older lines are gone", err=True)
    for line in found["lines"]:
        _say_line(line["data"])


@agents.command()
@click.argument("agent_id")
@click.argument("execution_id")
@click.option("--after", default="", help="Go on after the event with this id.")
@_as_json
@click.pass_obj
def events(client: Client, *, agent_id: str, execution_id: str, after: str, as_json: bool) -> None:
    """Follow what an execution emits until its end, over broken connections too."""
    for frame in client.events(_path(agent_id, "executions", execution_id, "events"), after=after):
        if as_json:
            click.echo(json.dumps({"id": frame.id, "event": frame.event, "data": frame.data}))
        elif frame.event == "end":
            show_execution(frame.data)
        elif frame.event == "dropped":
            click.echo(f"{frame.data['count']} events are gone", err=True)
        elif frame.event == "problem":
            raise CallerError(frame.data["detail"], fix=frame.data["fix"])
        else:
            _say_line(frame.data)


# -- executions ------------------------------------------------------------------------------------------------------


def _with_input(command: Command) -> Command:
    """The options that an input is made of."""
    for option in (
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A JSON value as a key of the input."
        ),
        click.option(
            "--file", "files", multiple=True, metavar="KEY=PATH", help="Text of a file as a key of the input."
        ),
        click.option("--input", "text", metavar="JSON", help="The whole input."),
        click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds."),
        click.option("--priority", type=click.Choice(("low", "normal", "high")), default="normal", show_default=True),
        click.option("--execution-id", help="Idempotency key: the same one runs once."),
        click.option("--version", help="A version or an alias.  [default: the one in service]"),
    ):
        command = option(command)
    return command


@agents.command()
@click.argument("agent_id")
@_with_input
@click.option("--json", "as_json", is_flag=True, help="Print the execution as JSON.")
@click.pass_obj
def run(client: Client, /, *, agent_id: str, as_json: bool, **asked: Any) -> None:
    """Execute an agent, watch its progress and print what it found."""
    execution = _watched(client, client.post(_path(agent_id, "execute"), _request(**asked)))
    (show_json if as_json else show_execution)(execution)
    if execution["status"] != "completed":
        sys.exit(1)


@agents.command()
@click.argument("agent_id")
@_with_input
@click.option("--callback", metavar="URL", help="Gets a signed POST when it has ended.")
@_as_json
@click.pass_obj
def submit(client: Client, /, *, agent_id: str, callback: str | None, as_json: bool, **asked: Any) -> None:
    """Queue an execution and print its id."""
    request = _request(**asked)
    if callback is not None:
        request["callback_url"] = callback
    execution = client.post(_path(agent_id, "execute"), request)
    if as_json:
        show_json(execution)
    else:
        click.echo(execution["execution_id"])


@agents.command()
@click.argument("agent_id")
@click.argument("execution_id")
@_as_json
@click.pass_obj
def cancel(client: Client, *, agent_id: str, execution_id: str, as_json: bool) -> None:
    """Cancel an execution."""
    execution = client.delete(_path(agent_id, "executions", execution_id))
    if as_json:
        show_json(execution)
    else:
        console.print(f"[{colour_of(execution['status'])}]{execution['status']}[/] {execution['execution_id']}")


# -- inside ----------------------------------------------------------------------------------------------------------


def _path(agent_id: str, *below: str) -> str:
    return "/".join((_AGENTS, quote(agent_id, safe=""), *below))


def _say_deployed(deployed: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        show_json(deployed)
        return
    word = "deployed" if deployed["status"] == "deployed" else "on trial"
    console.print(f"[green]{word}[/] {deployed['agent_id']} {deployed['version']} in {deployed['compile_ms']:.1f} ms")


def _say_in_service(agent: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        show_json(agent)
    else:
        console.print(f"[green]in service[/] {agent['agent_id']} {agent['version']}")


def _say_line(data: Any) -> None:
    console.print(plain(data))


def _next_version(client: Client, agent_id: str, source: bytes) -> str:
    try:
        agent = client.get(_path(agent_id))
    except CallerError:
        return "1.0.0"
    if agent["source_sha256"] == hashlib.sha256(source).hexdigest():
        return str(agent["version"])
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", agent["version"])
    if match is None:
        raise CallerError(f"{agent['version']!r} is no semantic version.", fix="Name the new one with --version.")
    return f"{match[1]}.{match[2]}.{int(match[3]) + 1}"


def _request(
    *,
    text: str | None,
    files: tuple[str, ...],
    settings: tuple[str, ...],
    timeout: float | None,
    priority: str,
    execution_id: str | None,
    version: str | None,
) -> dict[str, Any]:
    request: dict[str, Any] = {"input": _input(text, files, settings), "async": True, "priority": priority}
    named = {"timeout": timeout, "execution_id": execution_id, "version": version}
    return request | {name: value for name, value in named.items() if value is not None}


def _input(text: str | None, files: tuple[str, ...], settings: tuple[str, ...]) -> Any:
    if text is not None and not (files or settings):
        return _json(text, "--input")
    found = _json(text, "--input") if text is not None else {}
    if not isinstance(found, dict):
        raise CallerError(
            f"--input is {json.dumps(found)[:40]}, which has no keys for --file and --set.",
            fix="Write an object, --input '{...}', or leave --file and --set out.",
        )
    for option, pairs in (("--file", files), ("--set", settings)):
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals or not key:
                raise CallerError(f"{option} {pair!r} has no key.", fix=f"Write {option} key=value.")
            found[key] = _text_of(value) if option == "--file" else _json(value, f"--set {key}")
    return found


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise CallerError(f"{path} cannot be read: {error.strerror}.", fix="Correct the path.") from error
    except UnicodeDecodeError as error:
        raise CallerError(f"{path} is no UTF-8 text: {error.reason}.", fix="Convert it to UTF-8 first.") from error


def _json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CallerError(f"{option} is no JSON: {error}.", fix="Quote strings: --set name='\"value\"'.") from error


def _watched(client: Client, execution: dict[str, Any]) -> dict[str, Any]:
    """Poll an execution to its end, drawing its progress on a terminal."""
    note = TextColumn("{task.fields[note]}", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), note, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(execution["agent_id"], total=None, note=execution["status"])
        while execution["status"] not in _FINISHED:
            time.sleep(_POLL_S)  # noqa: TID251 - a command line waits in its own time
            execution = client.get(execution["status_url"])
            reported = execution["progress"]
            if reported:
                progress.update(
                    task, total=reported["total"], completed=reported["done"], note=visible(reported["note"])
                )
    return execution
