"""Every error of headrace: whose fault it is, a stable code, and the fix.

HeadraceError
├── CallerError                the request, the call or the configuration is wrong; repeating it will not help
│   ├── ConfigError
│   ├── NotOpen
│   ├── InvalidRequest
│   │   ├── BodyTooLarge
│   │   ├── PathNotFound
│   │   ├── MethodNotAllowed
│   │   ├── NotJson
│   │   ├── ForeignOrigin
│   │   └── ForeignHost
│   ├── InvalidKey
│   ├── UnencodableValue
│   ├── RecursiveLoad
│   ├── AgentInvalid
│   ├── AgentNotFound
│   ├── VersionNotFound
│   ├── VersionConflict
│   ├── ExecutionNotFound
│   ├── ExecutionConflict
│   ├── StatementFailed
│   ├── PortTaken
│   ├── DirectoryInUse
│   ├── DirectoryUnusable
│   ├── CountersUnusable
│   └── Unauthorized
├── BackendError               something that we depend on failed; repeating it later may help
│   ├── CacheUnavailable
│   │   └── CacheRefused
│   ├── LoadTimeout
│   ├── DatabaseUnavailable
│   │   └── OutcomeUnknown
│   ├── StatementTimeout
│   ├── ResultNotRecorded
│   ├── EmbeddedServerFailed
│   ├── Overloaded
│   ├── RequestTimeout
│   └── BenchFailed
└── BugError                   headrace broke a promise to itself; please report it
"""

from typing import ClassVar


class HeadraceError(Exception):
    """The root of all errors that headrace raises on purpose.

    `code` is stable across releases and is what programs should compare. `fix` says what to do; a raise site may give
    a more exact one than the class.
    """

    code: ClassVar[str] = "headrace-error"
    fix: str = "Read the message; if it does not help, please report it."

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if fix is not None:
            self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} Fix: {self.fix}"


class CallerError(HeadraceError):
    """The request, the call or the configuration is wrong."""

    code = "caller-error"
    fix = "Correct the call; repeating it unchanged will fail again."


class ConfigError(CallerError):
    """A configuration value breaks a rule, or a key does not exist."""

    code = "config-invalid"
    fix = "Correct the value; `headrace doctor` prints what is in force."


class NotOpen(CallerError):
    """Something was used before it was opened or after it was closed."""

    code = "not-open"
    fix = "Use it inside `async with`."


class InvalidRequest(CallerError):
    """A request does not have the shape that the API documents."""

    code = "request-invalid"
    fix = "Compare the request with the API's openapi.json."


class BodyTooLarge(InvalidRequest):
    """A request body is larger than the limit."""

    code = "body-too-large"
    fix = "Send less, or raise `server.body_bytes_max`."


class InvalidKey(CallerError):
    """A cache key, or a part of a key template, that cannot name an entry."""

    code = "cache-key-invalid"
    fix = "Use a string of 1 to 1024 bytes; build it from strings, numbers, UUIDs, dates and enums."


class PathNotFound(InvalidRequest):
    """Nothing is served at this path."""

    code = "path-not-found"
    fix = "Compare the path with the API's openapi.json."


class MethodNotAllowed(InvalidRequest):
    """The path does not take this method."""

    code = "method-not-allowed"
    fix = "Use a method of the Allow header."


class NotJson(InvalidRequest):
    """A request body does not say that it is JSON."""

    code = "not-json"
    fix = "Send the header `Content-Type: application/json`."


class ForeignOrigin(InvalidRequest):
    """A page of another origin asked for a change through somebody's browser."""

    code = "foreign-origin"
    fix = "Send it from a page of this server, or from a program: only browsers name an origin."


class ForeignHost(InvalidRequest):
    """A service without a token was asked under a name that is not this machine's own."""

    code = "foreign-host"
    fix = "Ask for it as localhost or 127.0.0.1, or set `server.token` to serve it under other names."


class UnencodableValue(CallerError):
    """A value cannot be written to the shared cache in its policy's format."""

    code = "value-unencodable"
    fix = "Cache msgspec Structs, dataclasses or plain containers, or choose another serializer in the CachePolicy."


class RecursiveLoad(CallerError):
    """A loader asked the cache for the key that it is itself loading."""

    code = "recursive-load"
    fix = "Load the key without asking the cache for it again."


class AgentInvalid(CallerError):
    """Agent source that cannot be deployed: it does not compile, has no entrypoint or is too large."""

    code = "agent-invalid"
    fix = "Correct the source and deploy it again; the version in service is unchanged."


class AgentNotFound(CallerError):
    """No agent of this id is deployed."""

    code = "agent-not-found"
    fix = "List the agents with GET /api/v1/agents, or deploy this one first."


class VersionNotFound(CallerError):
    """The agent has no such version."""

    code = "version-not-found"
    fix = "Deploy that version first."


class VersionConflict(CallerError):
    """This version of the agent exists already with another source."""

    code = "version-conflict"
    fix = "Deploy the changed source under a new version."


class ExecutionNotFound(CallerError):
    """The agent has no execution of this id."""

    code = "execution-not-found"
    fix = "Use the execution_id that execute returned."


class ExecutionConflict(CallerError):
    """This execution id was used before with another input or agent."""

    code = "execution-conflict"
    fix = "Use a fresh execution_id for a different input."


class StatementFailed(CallerError):
    """Postgres refused a statement: a constraint, a type or the syntax. Nothing of it was kept."""

    code = "statement-failed"
    fix = "Correct the statement or its parameters."

    def __init__(
        self, message: str, *, sqlstate: str = "", constraint: str | None = None, fix: str | None = None
    ) -> None:
        super().__init__(message, fix=fix)
        self.sqlstate = sqlstate
        self.constraint = constraint


class PortTaken(CallerError):
    """Another process listens on the port."""

    code = "port-taken"
    fix = "Stop it, or choose another port with `--port`."


class DirectoryInUse(CallerError):
    """Another `headrace up` runs in this data directory."""

    code = "directory-in-use"
    fix = "Stop it, or choose another directory with `--directory`."


class DirectoryUnusable(CallerError):
    """The data directory cannot hold the embedded servers: read-only, full, unreachable, or of another version."""

    code = "directory-unusable"
    fix = "Choose another directory with `--directory`."


class CountersUnusable(CallerError):
    """The file that processes count in is not ours, of another shape and in use, or cannot be reached."""

    code = "counters-unusable"
    fix = "Delete the file if nothing uses it, or choose another path."


class Unauthorized(CallerError):
    """The request carries no valid token."""

    code = "unauthorized"
    fix = "Send `Authorization: Bearer <token>` with the token of `server.token`."


class BackendError(HeadraceError):
    """Something that headrace depends on failed."""

    code = "backend-error"
    fix = "Try again later; look at /api/v1/system/health for what is down."


class CacheUnavailable(BackendError):
    """The shared cache cannot be reached and the call may not be answered without it."""

    code = "cache-unavailable"
    fix = "Check that the Redis at `cache.remote.url` is up; reads degrade to the loader meanwhile."


class CacheRefused(CacheUnavailable):
    """The shared cache answered a call with an error."""

    code = "cache-refused"
    fix = "Read the server's words: it may be read-only, out of memory, or deny the user this command."


class LoadTimeout(BackendError):
    """A loader took longer than its policy's `load_timeout`."""

    code = "load-timeout"
    fix = "Raise `load_timeout` in the CachePolicy, or set `stale_max` so that an older value can answer."


class DatabaseUnavailable(BackendError):
    """A shard cannot be reached; nothing was written."""

    code = "database-unavailable"
    fix = "Check that the shard is up; the call can be repeated safely."


class OutcomeUnknown(DatabaseUnavailable):
    """The connection broke after a write was sent: it may or may not be committed."""

    code = "outcome-unknown"
    fix = "Read the row before writing again; do not repeat the write blindly."


class StatementTimeout(BackendError):
    """A statement or its wait for a lock took longer than the limit; nothing of it was kept."""

    code = "statement-timeout"
    fix = "Make it cheaper or raise database.statement_timeout_s or lock_timeout_s."


class ResultNotRecorded(BackendError):
    """An execution ran to its end, but its result could not be stored."""

    code = "result-not-recorded"
    fix = "It may have had its effects: repeat it only if the agent may run twice."


class EmbeddedServerFailed(BackendError):
    """An embedded Redis or Postgres did not start or did not become ready."""

    code = "embedded-server-failed"
    fix = "Read the end of its log, quoted in the message."


class Overloaded(BackendError):
    """A bounded queue is full."""

    code = "overloaded"
    fix = "Send fewer requests at once, and honour Retry-After."


class RequestTimeout(BackendError):
    """A request took longer than `server.request_timeout_s`."""

    code = "request-timeout"
    fix = "Submit long work with `async: true` and poll its status_url."


class BenchFailed(BackendError):
    """A benchmark could not measure: the server did not start, went away, or answered something else than asked."""

    code = "bench-failed"
    fix = "Read what the server said; `headrace bench --url` measures a server that you start yourself."


class BugError(HeadraceError):
    """headrace broke a promise to itself."""

    code = "bug"
    fix = "This should never happen: please report it with the traceback."
