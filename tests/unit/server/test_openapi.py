"""The OpenAPI document describes exactly the operations that there are."""

import json
import re

import pytest

from headrace.config import Config
from headrace.server import Headrace
from headrace.server.caller import PERMISSIONS
from headrace.server.openapi import document
from headrace.server.reference import page

OPERATIONS = Headrace(Config()).operations()


@pytest.fixture(scope="module")
def described():
    """The document of a service with a token."""
    return document(OPERATIONS, title="headrace", version="1", has_token=True)


def test_every_operation_is_there_once(described):
    """By path and method, each under a name of its own."""
    found = {
        (path, method.upper()): operation["operationId"]
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    }
    assert found == {(each.path, each.method): each.name for each in OPERATIONS}
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.name)
def test_an_operation_names_its_parameters_permission_and_answers(described, operation):
    """Each parameter of the path, each status, and what a key needs."""
    found = described["paths"][operation.path][operation.method.lower()]
    in_path = {each["name"] for each in found["parameters"] if each["in"] == "path"}
    assert in_path == set(re.findall(r"{(\w+)}", operation.path))
    assert len({(each["in"], each["name"]) for each in found["parameters"]}) == len(found["parameters"])
    refusals = () if operation.is_public else (401, 403)
    assert set(found["responses"]) == {str(each) for each in (*operation.answers, *operation.failures, *refusals)}
    assert all(response["description"] for response in found["responses"].values())
    if operation.is_public:
        assert found["security"] == []
    else:
        assert found["x-permission"] in PERMISSIONS
    if operation.method in {"POST", "PUT"} and operation.request is not None:
        assert "application/json" in found["requestBody"]["content"]


@pytest.mark.parametrize("has_token", [True, False])
def test_the_document_is_what_openapi_says_it_is(has_token):
    """By the specification's own schema, and what that cannot say: parameters, references and names."""
    validator = pytest.importorskip("openapi_spec_validator")
    found = json.loads(json.dumps(document(OPERATIONS, title="headrace", version="1", has_token=has_token)))
    assert [error.message for error in validator.OpenAPIV31SpecValidator(found).iter_errors()] == []


def test_every_reference_leads_somewhere(described):
    """And every schema has a type, a choice or a reference."""
    references = set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(described)))
    assert references <= set(described["components"]["schemas"])
    for name, schema in described["components"]["schemas"].items():
        assert {"type", "anyOf", "enum", "$ref"} & set(schema), name


def test_the_page_shows_every_operation_and_its_permission(described):
    """Made of the document, and escaped."""
    html = page(described)
    for operation in OPERATIONS:
        assert f"id={operation.name}" in html
    assert "agent:execute" in html
    assert "Last-Event-ID" in html
