"""The OpenAPI 3.1 document, made of the same table of operations that the router is made of."""

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from headrace.server.exchange import Operation
from headrace.server.problems import Problem

_REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"{(\w+)}")


def document(operations: Sequence[Operation], *, title: str, version: str, has_token: bool) -> dict[str, Any]:
    """The whole document as plain data."""
    kinds = [Problem]
    for operation in operations:
        kinds += [kind for kind in (operation.request, operation.query, *operation.answers.values()) if kind]
    (*schemas,), components = msgspec.json.schema_components(kinds, ref_template=_REF)
    schema_of = {id(kind): schema for kind, schema in zip(kinds, schemas, strict=True)}
    paths: dict[str, Any] = {}
    for operation in operations:
        path = paths.setdefault(operation.path, {})
        path[operation.method.lower()] = _described(operation, schema_of, components)
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": components},
    }
    if has_token:
        described = "An API key, which needs the permission that an operation names, or the server's token."
        found["components"]["securitySchemes"] = {
            "token": {"type": "http", "scheme": "bearer", "description": described}
        }
        found["security"] = [{"token": []}]
    return found


def _described(operation: Operation, schema_of: dict[int, Any], components: dict[str, Any]) -> dict[str, Any]:
    # The gate answers these before an operation does.
    failures = sorted({*operation.failures, *(() if operation.is_public else (401, 403))})
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in _PARAMETER.findall(operation.path)
        ],
        "responses": {
            **{
                str(status): _content(status, operation.media_type, schema_of.get(id(kind), {}))
                for status, kind in operation.answers.items()
            },
            **{
                str(status): _content(status, "application/problem+json", schema_of[id(Problem)])
                for status in failures
            },
        },
    }
    if operation.is_public:
        described["security"] = []
    else:
        described["x-permission"] = operation.permission
    described["parameters"] += [
        {"name": name, "in": "header", "required": False, "description": meaning, "schema": {"type": "string"}}
        for name, meaning in operation.headers.items()
    ]
    if operation.query is not None:
        schema = components[operation.query.__name__]
        described["parameters"] += [
            {"name": name, "in": "query", "required": name in schema.get("required", ()), "schema": of}
            for name, of in schema["properties"].items()
        ]
    if operation.request is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema_of[id(operation.request)]}},
        }
    return described


def _content(status: int, media_type: str, schema: Any) -> dict[str, Any]:
    return {"description": HTTPStatus(status).phrase, "content": {media_type: {"schema": schema}}}
