"""The API's reference as one HTML page, made of its OpenAPI document: no script, nothing from elsewhere."""

import json
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d8dde3, #333b45); --soft: light-dark(#f4f6f8, #1b2026); }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.05rem; margin: 0; font-weight: 600; }
section { border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.25rem; margin: 1rem 0; }
code, pre { font: 0.875rem/1.5 ui-monospace, monospace; } pre { background: var(--soft); padding: .75rem 1rem;
border-radius: 8px; overflow: auto; } .method { display: inline-block; min-width: 3.6rem; font-weight: 700; }
details { margin-top: .5rem; } summary { cursor: pointer; } p { margin: .4rem 0; } nav a { margin-right: 1rem; }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
"""The page's Content-Security-Policy: its one inline style, and nothing that runs."""


def page(document: dict[str, Any], *, up: str = "") -> str:
    """The whole page, which lies beside its `openapi.json`; `up` leads from there to where everything else begins."""
    sections = [
        _section(method, path, operation, document["components"]["schemas"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
        f"<nav><a href=openapi.json>openapi.json</a><a href={up}dashboard>dashboard</a>"
        f"<a href={up}metrics>metrics</a></nav>"
        f"<p>Errors are <code>application/problem+json</code> with a stable <code>code</code> and a <code>fix</code>."
        f"{''.join(sections)}</html>"
    )


def _section(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    parts = [
        f"<section id={operation['operationId']}><h2><span class=method>{method.upper()}</span>"
        f"<code>{escape(path)}</code></h2><p>{escape(operation['summary'])}</p>"
    ]
    if "x-permission" in operation:
        parts.append(f"<p>Permission: <code>{escape(operation['x-permission'])}</code></p>")
    queries = [each for each in operation["parameters"] if each["in"] == "query"]
    if queries:
        names = ", ".join(f"<code>{escape(each['name'])}</code>" for each in queries)
        parts.append(f"<p>Query: {names}</p>")
    headers = [each for each in operation["parameters"] if each["in"] == "header"]
    parts += [f"<p><code>{escape(each['name'])}</code> {escape(each['description'])}</p>" for each in headers]
    body = operation.get("requestBody")
    if body:
        schema = body["content"]["application/json"]["schema"]
        parts.append(_example("Body", schema, schemas))
    for status, reply in operation["responses"].items():
        (media_type, content), *_ = reply["content"].items()
        title = f"{status} {reply['description']} <code>{media_type}</code>"
        parts.append(_example(title, content["schema"], schemas) if status < "300" else f"<p>{title}</p>")
    return "".join([*parts, "</section>"])


def _example(title: str, schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    shape = json.dumps(_shape(schema, schemas), indent=2)
    return f"<details><summary>{title}</summary><pre>{escape(shape)}</pre></details>"


def _shape(schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """A schema as the value that it describes, with each leaf's type in its place."""
    if "$ref" in schema:
        return _shape(schemas[schema["$ref"].rsplit("/", 1)[-1]], schemas)
    if "anyOf" in schema:
        kinds = [each for each in schema["anyOf"] if each.get("type") != "null"]
        return _shape(kinds[0], schemas)
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "object":
        return {name: _shape(each, schemas) for name, each in schema.get("properties", {}).items()}
    if schema.get("type") == "array":
        items = schema.get("items")
        return [_shape(items, schemas)] if isinstance(items, dict) else []
    return schema.get("type", "any")
