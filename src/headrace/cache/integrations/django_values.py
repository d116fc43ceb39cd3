"""Django's own values that are cached in practice: responses, safe strings, and model instances.

A response comes back as a plain HttpResponse with the same status, headers, cookies and content; one that streams is
refused. An instance comes back as from the database, with what was loaded and annotated, and without related objects:
those are fetched when they are asked for. If its model has lost a field since, the entry is unreadable, which is a
miss.
"""

# Django has no types of its own.
# mypy: disable-error-code="import-not-found,import-untyped,misc"

import http.cookies
from typing import Any

from django.apps import apps
from django.db.models import Model
from django.db.models.fields.files import FieldFile
from django.http import HttpResponse
from django.utils.safestring import SafeString

from headrace.cache.integrations.packing import Kind, Packer

_NOT_KEPT = ("_state", "_prefetched_objects_cache")


def _fold_response(response: HttpResponse) -> list[Any]:
    cookies = [[key, jar.value, jar.coded_value, dict(jar)] for key, jar in response.cookies.items()]
    headers = [list(item) for item in response.items()]
    # Not the properties, which make up what was not given.
    reason, charset = response._reason_phrase, response._charset
    return [response.status_code, reason, charset, headers, cookies, bytes(response.content)]


def _unfold_response(folded: list[Any]) -> HttpResponse:
    status, reason, charset, headers, cookies, content = folded
    response = HttpResponse(content, status=status, reason=reason, charset=charset)
    del response["Content-Type"]
    for name, value in headers:
        response[name] = value
    for key, value, coded_value, attributes in cookies:
        cookie: http.cookies.Morsel[str] = http.cookies.Morsel()
        cookie.set(key, value, coded_value)
        cookie.update(attributes)
        dict.__setitem__(response.cookies, key, cookie)
    return response


def _fold_instance(instance: Model) -> list[Any]:
    given = {name: value for name, value in instance.__dict__.items() if name not in _NOT_KEPT}
    names = [field.attname for field in instance._meta.concrete_fields if field.attname in given]
    fields = {name: given.pop(name) for name in names}
    for name, value in fields.items():
        if isinstance(value, FieldFile):
            fields[name] = value.name
    return [instance._meta.label, instance._state.db, instance._state.adding, fields, given]


def _unfold_instance(folded: list[Any]) -> Model:
    label, database, is_new, fields, annotations = folded
    model: type[Model] = apps.get_model(label)
    names = [field.attname for field in model._meta.concrete_fields if field.attname in fields]
    if len(names) != len(fields):
        raise LookupError(f"{label} has other fields now.")
    instance = model.from_db(database, names, [fields[name] for name in names])
    instance._state.adding = is_new
    instance.__dict__.update(annotations)
    return instance


PACKER = Packer(
    [
        Kind(64, SafeString, str.__str__, SafeString),
        Kind(65, HttpResponse, _fold_response, _unfold_response, is_family=True),
        Kind(66, Model, _fold_instance, _unfold_instance, is_family=True),
    ]
)
