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
│   │   └── AgentUnhealthy
│   ├── AgentQuarantined
│   ├── IsolationUnavailable
│   ├── IsolationRequired
│   ├── AgentNotFound
│   ├── VersionNotFound
│   ├── VersionConflict
│   ├── TrialNotFound
│   ├── ExecutionNotFound
│   ├── ExecutionConflict
│   ├── StatementFailed
│   ├── StatementRefused
│   ├── ResultTooLarge
│   ├── PortTaken
│   ├── DirectoryInUse
│   ├── DirectoryUnusable
│   ├── CountersUnusable
│   ├── DeploymentNotFound
│   ├── DeploymentUnsupported
│   ├── KeyNotFound
│   ├── NeedsDatabase
│   ├── Forbidden
│   └── Unauthorized
├── BackendError               something that we depend on failed; repeating it later may help
│   ├── CacheUnavailable
│   │   └── CacheRefused
│   ├── LoadTimeout
│   ├── DatabaseUnavailable
│   │   └── OutcomeUnknown
│   ├── StatementTimeout
│   ├── ShardMapOutdated
│   ├── IdsUnavailable
│   ├── IndexBuildFailed
│   ├── ResultNotRecorded
│   ├── AgentFailed
│   ├── WorkerFailed
│   ├── EmbeddedServerFailed
│   ├── Overloaded
│   │   └── RateLimited
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


class IsolationUnavailable(CallerError):
    """This machine cannot give the level of isolation that a deployment declares."""

    code = "isolation-unavailable"
    fix = "Allow the named part (`headrace doctor` lists them), or deploy as `trusted` code that you do trust."


class IsolationRequired(CallerError):
    """A version is to run in the host, where this service lets no code run that is deployed."""

    code = "isolation-required"
    fix = "Deploy it with isolation `process`, or set agents.trusted_allowed where whoever may deploy is trusted."


class AgentUnhealthy(AgentInvalid):
    """An agent loads, but its `start` or `check` fails, so this version does not serve."""

    code = "agent-unhealthy"
    fix = "Make start() and check() succeed where the agent is to run; the version in service is unchanged."


class AgentQuarantined(CallerError):
    """A version of an agent held the event loop again and again, and is not executed any more."""

    code = "agent-quarantined"
    fix = "Deploy a version that awaits between parts of long work, or whose `execute` is a plain function."


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


class TrialNotFound(CallerError):
    """The agent has no version on trial."""

    code = "trial-not-found"
    fix = "Deploy a version with a canary share first; an earlier trial may have been aborted by itself."


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


class StatementRefused(CallerError):
    """A statement over several shards that cannot be done right; nothing was sent."""

    code = "statement-refused"
    fix = "Pass key=... to run it on one shard, or change it as the message says."


class ResultTooLarge(CallerError):
    """A result, or the rows that had to be gathered for it, is larger than the configuration allows."""

    code = "result-too-large"
    fix = "Narrow the statement, read it with stream(), or raise the limit that the message names."


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


class DeploymentNotFound(CallerError):
    """The agent has no deployment of this id."""

    code = "deployment-not-found"
    fix = "Use a deployment_id that deploy returned; of each agent the newest deployments are kept."


class DeploymentUnsupported(CallerError):
    """A deployment asks for something that is not done here, so it is refused rather than ignored."""

    code = "deployment-unsupported"
    fix = "Leave the named field out, or do what the message says."


class KeyNotFound(CallerError):
    """There is no API key of this id."""

    code = "key-not-found"
    fix = "List the keys with GET /api/v1/keys."


class NeedsDatabase(CallerError):
    """Something that only a service with a database can do."""

    code = "needs-database"
    fix = "Configure `database.shards`, or run `headrace up`, which starts some."


class Forbidden(CallerError):
    """The API key is valid, but may not do this."""

    code = "forbidden"
    fix = "Use a key with the permission that the message names."


class Unauthorized(CallerError):
    """The request carries no valid token or API key."""

    code = "unauthorized"
    fix = "Send `Authorization: Bearer <token>` with an API key, or with the token of `server.token`."


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


class ShardMapOutdated(BackendError):
    """A transaction, or a change of the shard map, came by a map that is no longer in force; nothing was changed."""

    code = "shard-map-outdated"
    fix = "Plan the change again, from the map that is in force now."


class IdsUnavailable(BackendError):
    """No unique id can be made now: there is no lease on a node number, or time would have to run ahead of itself."""

    code = "ids-unavailable"
    fix = "Try again when the home shard answers; ids that were handed out stay unique."


class IndexBuildFailed(BackendError):
    """An index could not be made or dropped while the table is in use; what is left of the attempt is taken away."""

    code = "index-build-failed"
    fix = "Read Postgres' words: often a long transaction holds the table; try again when it has ended."


class ResultNotRecorded(BackendError):
    """An execution ran to its end, but its result could not be stored."""

    code = "result-not-recorded"
    fix = "It may have had its effects: repeat it only if the agent may run twice."


class AgentFailed(BackendError):
    """A hosted framework's agent ended without an answer and raised nothing: it reports a failure, or waits."""

    code = "agent-failed"
    fix = "Read the framework's words: often its model cannot be reached or refused the request."


class WorkerFailed(BackendError):
    """An isolated worker could not be started."""

    code = "worker-failed"
    fix = "Try again; if it lasts, look at the machine's limits on processes, memory and user namespaces."


class EmbeddedServerFailed(BackendError):
    """An embedded Redis or Postgres did not start or did not become ready."""

    code = "embedded-server-failed"
    fix = "Read the end of its log, quoted in the message."


class Overloaded(BackendError):
    """A bounded queue is full."""

    code = "overloaded"
    fix = "Send fewer requests at once, and honour Retry-After."

    def __init__(self, message: str, *, retry_after_s: float = 1.0, fix: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    """A tenant asks for more than its tier allows: too often, too much at once, or more than a day's share."""

    code = "rate-limited"
    fix = "Wait for `retry_after_s`, or move the tenant to a larger tier (agents.tenants, agents.tiers)."


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
