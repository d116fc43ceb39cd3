-- Due callbacks are looked for by tenant, so that nobody's backlog hides another's.

CREATE INDEX headrace_executions_callbacks ON headrace_executions (tenant, callback_due_at)
    WHERE callback_due_at IS NOT NULL;
DROP INDEX headrace_executions_callback;
