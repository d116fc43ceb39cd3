"""The statements on executions in Postgres. Whole batches travel as one JSON array, so each is one round trip.

Two rules make several nodes safe on one table. An unfinished row has an owner, the node that may write it, and counts
its attempts; every write of a node names both, so that a node which was frozen, given up and thawed changes nothing.
And rows are locked in the order of their keys, so that two batches cannot wait for each other.
"""

import re

EXECUTION = """
SELECT execution_id, agent_id, version, CASE WHEN status = 'running' AND cancel_at IS NOT NULL THEN 'cancelling'
       ELSE status END AS status, tenant, output::text AS output, error, progress::text AS progress,
       queue_ms, run_ms, cpu_ms, memory_bytes, extract(epoch FROM started_at)::float8 AS started_at,
       extract(epoch FROM finished_at)::float8 AS finished_at, input_sha256, attempt,
       lease_until IS NOT NULL AND lease_until < now() AS is_expired
FROM headrace_executions WHERE tenant = $1 AND execution_id = $2"""

SUBMIT = """
INSERT INTO headrace_executions AS e
    (tenant, execution_id, agent_id, version, status, input_sha256, started_at, claim, owner, attempt, attempts_max,
     input, submitted_at, available_at, head_start_s, rank, threaded, timeout_s, asked_version, instance, callback_url)
SELECT tenant, execution_id, agent_id, version, status, input_sha256, to_timestamp(started_at), claim, owner, attempt,
       attempts_max, input::json, now(), now(), head_start_s, extract(epoch FROM now()) - head_start_s, threaded,
       timeout_s, asked_version, instance, callback_url
FROM json_to_recordset($1::json) AS r (
    tenant text, execution_id text, agent_id text, version text, status text, input_sha256 text, started_at float8,
    claim text, owner text, attempt int, attempts_max int, input text, head_start_s float8, threaded boolean,
    timeout_s float8, asked_version text, instance text, callback_url text)
ORDER BY tenant, execution_id
ON CONFLICT (tenant, execution_id) DO UPDATE SET claim = excluded.claim WHERE e.claim = excluded.claim
RETURNING tenant, execution_id, true"""

WITHDRAW = """
DELETE FROM headrace_executions
WHERE tenant = $1 AND execution_id = $2 AND claim = $3 AND owner = $4 AND status = 'running' AND cancel_at IS NULL"""

# Which tenants wait is found by jumping from one to the next in the index, whatever the length of their queues. Each
# then offers the head of its queue: with T tenants a T-th of what is wanted, at least one. So nobody's backlog keeps
# another tenant waiting, and a tenant that is alone gets everything. What others have locked is passed over. A node
# whose lease is over, as all are after an outage, gets nothing before it has renewed it: others may count it as dead
# already, and would interrupt what it begins.
TAKE = """
WITH RECURSIVE waiting AS (
    (SELECT tenant FROM headrace_executions WHERE status = 'queued' AND owner IS NULL AND threaded = $2
     ORDER BY tenant LIMIT 1)
    UNION ALL
    SELECT (SELECT e.tenant FROM headrace_executions e
            WHERE e.status = 'queued' AND e.owner IS NULL AND e.threaded = $2 AND e.tenant > w.tenant
            ORDER BY e.tenant LIMIT 1)
    FROM waiting w WHERE w.tenant IS NOT NULL
), free AS (
    SELECT w.tenant, coalesce(f.places, $5::int) AS places, count(*) OVER () AS tenants
    FROM waiting w LEFT JOIN json_to_recordset($4::json) AS f (tenant text, places int) USING (tenant)
    WHERE w.tenant IS NOT NULL AND coalesce(f.places, $5::int) > 0
      AND EXISTS (SELECT 1 FROM headrace_nodes n WHERE n.node = $1 AND n.lease_until >= now())
), head AS (
    SELECT h.tenant, h.execution_id, h.rank
    FROM free CROSS JOIN LATERAL (
        SELECT e.tenant, e.execution_id, e.rank FROM headrace_executions e
        WHERE e.tenant = free.tenant AND e.threaded = $2 AND e.status = 'queued' AND e.owner IS NULL
          AND e.available_at <= now()
        ORDER BY e.rank
        LIMIT least(free.places, ($3::int + free.tenants - 1) / free.tenants)
        FOR UPDATE SKIP LOCKED
    ) h
    ORDER BY h.rank LIMIT $3::int
)
UPDATE headrace_executions e SET owner = $1 FROM head h
WHERE e.tenant = h.tenant AND e.execution_id = h.execution_id
RETURNING e.tenant, e.execution_id, e.agent_id, e.version, e.input_sha256, e.attempt, e.attempts_max,
          e.input::text AS input, e.head_start_s, e.threaded, e.timeout_s, e.asked_version, e.instance,
          e.callback_url, e.claim, e.rank,
          (extract(epoch FROM now() - e.available_at) * 1000)::float8 AS waited_ms"""

# A beginning may be written again when its answer was lost; one with another time of start is another taking of the
# same execution, and of two takings one begins. What its node took before its lease ended does not begin after that.
# The lease is asked for in a subquery of its own: joined, it would let the planner come from the nodes to all that
# they own.
BEGIN = """
UPDATE headrace_executions e
SET status = 'running', attempt = r.attempt, version = r.version, started_at = to_timestamp(r.started_at)
FROM json_to_recordset($1::json)
     AS r (tenant text, execution_id text, owner text, attempt int, version text, started_at float8)
WHERE e.tenant = r.tenant AND e.execution_id = r.execution_id AND e.owner = r.owner
  AND (e.status = 'queued' AND e.attempt = r.attempt - 1
         AND (SELECT n.lease_until >= now() FROM headrace_nodes n WHERE n.node = r.owner)
       OR e.status = 'running' AND e.attempt = r.attempt AND e.started_at = to_timestamp(r.started_at))
RETURNING e.tenant, e.execution_id, true"""

GIVE_BACK = """
UPDATE headrace_executions SET owner = NULL, available_at = now() + $4 * interval '1 second',
       rank = rank + $4
WHERE tenant = $1 AND execution_id = $2 AND owner = $3 AND status = 'queued'"""

GIVE_BACK_UNKNOWN = """
UPDATE headrace_executions SET owner = NULL
WHERE owner = $1 AND status = 'queued' AND threaded = $3 AND NOT (tenant || ' ' || execution_id = ANY ($2::text[]))"""

DISOWN = """
UPDATE headrace_executions SET owner = owner || ' unknown'
WHERE owner = $1 AND status = 'running' AND started_at < now() - $3 * interval '1 second'
  AND NOT (tenant || ' ' || execution_id = ANY ($2::text[]))"""

RETRY = """
UPDATE headrace_executions
SET status = 'queued', owner = NULL, error = $5, available_at = now() + $6 * interval '1 second',
    rank = extract(epoch FROM now()) + $6 - head_start_s
WHERE tenant = $1 AND execution_id = $2 AND owner = $3 AND attempt = $4 AND status = 'running' AND cancel_at IS NULL"""

REPORT = """
UPDATE headrace_executions e SET progress = r.progress::json
FROM json_to_recordset($1::json) AS r (tenant text, execution_id text, owner text, attempt int, progress text)
WHERE e.tenant = r.tenant AND e.execution_id = r.execution_id AND e.status = 'running'
  AND e.owner IS NOT DISTINCT FROM r.owner AND e.attempt = r.attempt"""

# Every statement that ends executions counts them in itself, in the same transaction: `ended` has the ended ones.
_COUNT = """
INSERT INTO headrace_agent_totals AS t (tenant, agent_id, writer, completed, failed, timeouts)
SELECT tenant, agent_id, {writer}::text, count(*) FILTER (WHERE status = 'completed'),
       count(*) FILTER (WHERE status IN ('failed', 'cancelled', 'interrupted')),
       count(*) FILTER (WHERE status = 'timeout')
FROM ended WHERE status <> 'queued' GROUP BY tenant, agent_id ORDER BY tenant, agent_id
ON CONFLICT (tenant, agent_id, writer) DO UPDATE SET
    completed = t.completed + excluded.completed, failed = t.failed + excluded.failed,
    timeouts = t.timeouts + excluded.timeouts"""


def _counting(statement: str) -> str:
    """The statement with `<count $n>` written out; parameter n is the writer whose totals are counted up."""
    return re.sub(r"<count (\$\d)>", lambda found: _COUNT.replace("{writer}", found[1]), statement)


# What is finished already is left alone and not counted again, so that a batch whose commit was in doubt can be
# written once more. A change of a state goes with its result: it is made only for rows that are still ours, which are
# locked first, or that do not exist yet, and without it the row does not end either. Such a row is answered `false`.
FINISH = _counting("""
WITH record AS (
    SELECT * FROM json_to_recordset($1::json) AS r (
        tenant text, execution_id text, agent_id text, version text, status text, input_sha256 text, output text,
        error text, progress text, queue_ms float8, run_ms float8, cpu_ms float8, memory_bytes bigint,
        started_at float8, finished_at float8, attempt int, owner text,
        instance text, state_version bigint, state text)
    ORDER BY tenant, execution_id
), ours AS (
    SELECT e.tenant, e.execution_id FROM record r JOIN headrace_executions e USING (tenant, execution_id)
    WHERE r.state IS NOT NULL AND e.status IN ('queued', 'running') AND e.owner IS NOT DISTINCT FROM r.owner
      AND e.attempt = r.attempt
    ORDER BY e.tenant, e.execution_id FOR UPDATE OF e
), turn AS (
    SELECT r.* FROM record r
    WHERE r.state IS NOT NULL AND ((r.tenant, r.execution_id) IN (SELECT tenant, execution_id FROM ours)
       OR NOT EXISTS (SELECT 1 FROM headrace_executions e
                      WHERE e.tenant = r.tenant AND e.execution_id = r.execution_id))
), kept AS (
    INSERT INTO headrace_agent_states AS s (tenant, agent_id, instance, version, value)
    SELECT tenant, agent_id, instance, state_version, state::json FROM turn t
    WHERE state_version = 1 OR EXISTS (
        SELECT 1 FROM headrace_agent_states k
        WHERE k.tenant = t.tenant AND k.agent_id = t.agent_id AND k.instance = t.instance)
    ORDER BY tenant, agent_id, instance
    ON CONFLICT (tenant, agent_id, instance) DO UPDATE
    SET version = excluded.version, value = excluded.value, updated_at = now()
    WHERE s.version = excluded.version - 1
    RETURNING tenant, agent_id, instance
), ended AS (
    INSERT INTO headrace_executions AS e
        (tenant, execution_id, agent_id, version, status, input_sha256, output, error, progress,
         queue_ms, run_ms, cpu_ms, memory_bytes, started_at, finished_at, attempt, owner)
    SELECT tenant, execution_id, agent_id, version, status, input_sha256, output::json, error, progress::json,
           queue_ms, run_ms, cpu_ms, memory_bytes, to_timestamp(started_at), to_timestamp(finished_at), attempt, owner
    FROM record
    WHERE state IS NULL OR (tenant, agent_id, instance) IN (SELECT tenant, agent_id, instance FROM kept)
    ON CONFLICT (tenant, execution_id) DO UPDATE SET
        status = excluded.status, version = excluded.version, output = excluded.output, error = excluded.error,
        progress = excluded.progress, queue_ms = excluded.queue_ms, run_ms = excluded.run_ms,
        cpu_ms = excluded.cpu_ms, memory_bytes = excluded.memory_bytes, started_at = excluded.started_at,
        finished_at = excluded.finished_at, lease_until = NULL, owner = NULL, input = NULL,
        callback_due_at = CASE WHEN e.callback_url IS NOT NULL THEN now() END
    WHERE e.status IN ('queued', 'running') AND e.owner IS NOT DISTINCT FROM excluded.owner
      AND e.attempt = excluded.attempt
    RETURNING tenant, execution_id, agent_id, status
), used AS (
    INSERT INTO headrace_usage AS u (tenant, day, writer, executions)
    SELECT tenant, (now() AT TIME ZONE 'UTC')::date, $2::text, count(*) FROM ended GROUP BY tenant ORDER BY tenant
    ON CONFLICT (tenant, day, writer) DO UPDATE SET executions = u.executions + excluded.executions
), counted AS (<count $2>)
SELECT tenant, execution_id, true FROM ended
UNION ALL
SELECT tenant, execution_id, false FROM turn
WHERE (tenant, agent_id, instance) NOT IN (SELECT tenant, agent_id, instance FROM kept)""")

CANCEL = _counting("""
WITH ended AS (
    UPDATE headrace_executions SET
        cancel_at = coalesce(cancel_at, now()),
        status = CASE status WHEN 'queued' THEN 'cancelled' ELSE status END,
        error = CASE status WHEN 'queued' THEN $4 ELSE error END,
        finished_at = CASE status WHEN 'queued' THEN now() END,
        owner = CASE status WHEN 'queued' THEN NULL ELSE owner END,
        input = CASE status WHEN 'queued' THEN NULL ELSE input END,
        callback_due_at = CASE WHEN status = 'queued' AND callback_url IS NOT NULL THEN now() END
    WHERE tenant = $1 AND execution_id = $2 AND ($3::text IS NULL OR agent_id = $3)
      AND status IN ('queued', 'running')
    RETURNING tenant, agent_id, CASE status WHEN 'running' THEN 'queued' ELSE status END AS status
) <count $5>""")

CANCEL_QUEUED = _counting("""
WITH ended AS (
    UPDATE headrace_executions SET status = 'cancelled', error = $3, cancel_at = now(), finished_at = now(),
        owner = NULL, input = NULL, callback_due_at = CASE WHEN callback_url IS NOT NULL THEN now() END
    WHERE tenant = $1 AND agent_id = $2 AND status = 'queued'
    RETURNING tenant, agent_id, status
), counted AS (<count $4>)
SELECT count(*) FROM ended""")

CANCELLED = """
SELECT tenant, execution_id FROM headrace_executions
WHERE owner = $1 AND cancel_at IS NOT NULL AND status = 'running'"""

# An execution is lost when its owner is no node any more. That is asked of every owned row, not of the nodes that
# have just died, so that a node which dies while it gives up another's executions leaves nothing behind. The owners
# are found first and joined: when a row was changed by another meanwhile, Postgres asks of the new one whether it
# still has the owner that it was joined with. A NOT EXISTS it does not ask again, and would take from a living node
# what that has just taken itself. Most of the time nobody is gone, and then nothing more is looked at.
REAP = _counting("""
WITH gone AS MATERIALIZED (
    SELECT DISTINCT e.owner FROM headrace_executions e
    WHERE e.owner IS NOT NULL AND e.status IN ('queued', 'running')
      AND NOT EXISTS (SELECT 1 FROM headrace_nodes n WHERE n.node = e.owner)
), lost AS (
    SELECT e.tenant, e.execution_id,
           e.status = 'queued' OR e.attempt < e.attempts_max AND e.cancel_at IS NULL AND e.input IS NOT NULL AS again
    FROM headrace_executions e JOIN gone g ON e.owner = g.owner
    WHERE e.status IN ('queued', 'running') AND EXISTS (SELECT 1 FROM gone)
    ORDER BY e.tenant, e.execution_id LIMIT 5000 FOR UPDATE OF e SKIP LOCKED
), ended AS (
    UPDATE headrace_executions e SET
        owner = NULL,
        status = CASE WHEN l.again THEN 'queued' WHEN e.cancel_at IS NOT NULL THEN 'cancelled' ELSE 'interrupted' END,
        error = CASE WHEN e.status = 'running' THEN $1 ELSE e.error END,
        available_at = CASE WHEN l.again AND e.status = 'running'
            THEN now() + random() * least($3::float8, $2::float8 * 2 ^ (e.attempt - 1)) * interval '1 second'
            ELSE e.available_at END,
        finished_at = CASE WHEN l.again THEN NULL ELSE now() END,
        input = CASE WHEN l.again THEN e.input END,
        callback_due_at = CASE WHEN NOT l.again AND e.callback_url IS NOT NULL THEN now() END
    FROM lost l WHERE e.tenant = l.tenant AND e.execution_id = l.execution_id
    RETURNING e.tenant, e.agent_id, e.status
), counted AS (<count $4>)
SELECT count(*) FILTER (WHERE status = 'queued'), count(*) FILTER (WHERE status <> 'queued') FROM ended""")

LEDGERS = """
SELECT t.tenant,
       (SELECT coalesce(sum(u.executions), 0)::bigint FROM headrace_usage u
        WHERE u.tenant = t.tenant AND u.day = (now() AT TIME ZONE 'UTC')::date) AS used,
       (SELECT count(*) FROM (
            SELECT 1 FROM headrace_executions e WHERE e.tenant = t.tenant AND e.status = 'queued' AND e.owner IS NULL
              AND e.threaded IN (false, true) LIMIT $2) q) AS queued
FROM unnest($1::text[]) AS t (tenant)"""

FORGET = """
WITH old AS (
    SELECT tenant, execution_id FROM headrace_executions
    WHERE finished_at < now() - $1 * interval '1 second' AND callback_due_at IS NULL
    LIMIT $2 FOR UPDATE SKIP LOCKED
), events AS (
    DELETE FROM headrace_execution_events v USING old o WHERE v.tenant = o.tenant AND v.execution_id = o.execution_id
), days AS (
    DELETE FROM headrace_usage WHERE day < current_date - 62
), gone AS (
    DELETE FROM headrace_executions e USING old o WHERE e.tenant = o.tenant AND e.execution_id = o.execution_id
    RETURNING 1
)
SELECT count(*) FROM gone"""

KEEP_EVENTS = """
WITH record AS (
    SELECT * FROM json_to_recordset($1::json) AS r (tenant text, execution_id text, id bigint, data text)
), kept AS (
    INSERT INTO headrace_execution_events (tenant, execution_id, id, data)
    SELECT tenant, execution_id, id, data::json FROM record ON CONFLICT DO NOTHING
), newest AS (
    SELECT tenant, execution_id, max(id) AS id FROM record GROUP BY tenant, execution_id
)
DELETE FROM headrace_execution_events v USING newest n
WHERE v.tenant = n.tenant AND v.execution_id = n.execution_id AND v.id <= n.id - $2::bigint"""

# As `TAKE` does, it jumps from tenant to tenant, so that what is due to one of them hides nothing of another's.
DUE_CALLBACKS = """
WITH RECURSIVE waiting AS (
    (SELECT tenant FROM headrace_executions WHERE callback_due_at IS NOT NULL ORDER BY tenant LIMIT 1)
    UNION ALL
    SELECT (SELECT e.tenant FROM headrace_executions e
            WHERE e.callback_due_at IS NOT NULL AND e.tenant > w.tenant ORDER BY e.tenant LIMIT 1)
    FROM waiting w WHERE w.tenant IS NOT NULL
), due AS (
    SELECT h.tenant, h.execution_id
    FROM waiting w LEFT JOIN json_to_recordset($3::json) AS f (tenant text, places int) USING (tenant)
    CROSS JOIN LATERAL (
        SELECT e.tenant, e.execution_id, e.callback_due_at FROM headrace_executions e
        WHERE e.tenant = w.tenant AND e.callback_due_at <= now()
        ORDER BY e.callback_due_at LIMIT greatest(0, coalesce(f.places, $4::int)) FOR UPDATE SKIP LOCKED
    ) h
    ORDER BY h.callback_due_at LIMIT $1
)
UPDATE headrace_executions e
SET callback_due_at = now() + $2 * interval '1 second', callback_attempt = callback_attempt + 1
FROM due d WHERE e.tenant = d.tenant AND e.execution_id = d.execution_id
RETURNING e.tenant, e.execution_id, e.callback_url, e.callback_attempt"""
