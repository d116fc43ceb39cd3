"""Errors as RFC 9457 problem details: which status an error has, and its JSON."""

import msgspec

from headrace import errors

MEDIA_TYPE = b"application/problem+json"

# By class; the nearest ancestor wins. What is not here falls to CallerError, BackendError or BugError.
_STATUS: dict[type[errors.HeadraceError], int] = {
    errors.CallerError: 400,
    errors.NotOpen: 503,  # whatever the service is made of is open until it stops
    errors.InvalidRequest: 422,
    errors.BodyTooLarge: 413,
    errors.PathNotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.NotJson: 415,
    errors.ForeignOrigin: 403,
    errors.ForeignHost: 421,
    errors.AgentInvalid: 422,
    errors.AgentNotFound: 404,
    errors.VersionNotFound: 404,
    errors.ExecutionNotFound: 404,
    errors.VersionConflict: 409,
    errors.ExecutionConflict: 409,
    errors.TrialNotFound: 404,
    errors.DeploymentNotFound: 404,
    errors.KeyNotFound: 404,
    errors.AgentQuarantined: 409,
    errors.IsolationUnavailable: 422,
    errors.IsolationRequired: 403,
    errors.DeploymentUnsupported: 422,
    errors.NeedsDatabase: 409,
    errors.Forbidden: 403,
    errors.Unauthorized: 401,
    errors.RateLimited: 429,
    errors.BackendError: 503,
    errors.OutcomeUnknown: 500,
    errors.RequestTimeout: 504,
    errors.HeadraceError: 500,
    errors.BugError: 500,
}

RETRY_AFTER_S = 1
"""What a 503 asks the client to wait: an embedded server is back within seconds."""


class Problem(msgspec.Struct, frozen=True):
    """RFC 9457 members, and two of ours: the stable `code` and what to do, `fix`."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    fix: str


def status_of(error: errors.HeadraceError) -> int:
    """The HTTP status of an error."""
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def problem(error: errors.HeadraceError) -> Problem:
    """An error as the client sees it."""
    title = (type(error).__doc__ or error.code).split("\n")[0].rstrip(".")
    return Problem(f"urn:headrace:problem:{error.code}", title, status_of(error), error.message, error.code, error.fix)
