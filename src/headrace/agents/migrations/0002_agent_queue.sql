-- Several nodes on one shard: who lives, what waits, who owns what runs; canaries and aliases; events, state, quotas.

ALTER TABLE headrace_agents
    ADD COLUMN canary       text,              -- the version on trial
    ADD COLUMN canary_share double precision,
    ADD COLUMN canary_trial text,              -- the deployment that began the trial
    ADD COLUMN aliases      jsonb NOT NULL DEFAULT '{}';

ALTER TABLE headrace_agent_versions
    ADD COLUMN is_idempotent boolean NOT NULL DEFAULT false,
    ADD COLUMN attempts_max  integer NOT NULL DEFAULT 1,
    ADD COLUMN capabilities  json,
    ADD COLUMN dependencies  text[] NOT NULL DEFAULT '{}',
    ADD COLUMN isolation     text NOT NULL DEFAULT 'trusted' CHECK (isolation IN ('trusted', 'process')),
    ADD COLUMN limits        json;  -- of its workers; null: what the service gives

ALTER TABLE headrace_executions
    ADD COLUMN owner            text,                       -- the node that has it, until it ends
    ADD COLUMN attempt          integer NOT NULL DEFAULT 1, -- that began last; with the owner it is a fence
    ADD COLUMN attempts_max     integer NOT NULL DEFAULT 1,
    ADD COLUMN input            json,                       -- kept until it ends
    ADD COLUMN submitted_at     timestamptz,
    ADD COLUMN available_at     timestamptz,
    ADD COLUMN rank             double precision,           -- when it would have come had it normal priority
    ADD COLUMN head_start_s     double precision NOT NULL DEFAULT 0,
    ADD COLUMN threaded         boolean NOT NULL DEFAULT false,
    ADD COLUMN timeout_s        double precision,
    ADD COLUMN asked_version    text,
    ADD COLUMN instance         text,
    ADD COLUMN cancel_at        timestamptz,
    ADD COLUMN callback_url     text,
    ADD COLUMN callback_due_at  timestamptz,                -- null: nothing to send (any more)
    ADD COLUMN callback_attempt integer NOT NULL DEFAULT 0;

CREATE INDEX headrace_executions_queue ON headrace_executions (threaded, tenant, rank)
    WHERE status = 'queued' AND owner IS NULL;
CREATE INDEX headrace_executions_owner ON headrace_executions (owner) WHERE owner IS NOT NULL;
CREATE INDEX headrace_executions_callback ON headrace_executions (callback_due_at) WHERE callback_due_at IS NOT NULL;
-- A row that ended never moves again, so blocks are in the order of their ends, which is all that BRIN needs.
CREATE INDEX headrace_executions_finished ON headrace_executions USING brin (finished_at);

CREATE TABLE headrace_nodes (
    node        text PRIMARY KEY,  -- one life of one process; a process that lost its lease comes back under another
    lease_until timestamptz NOT NULL
);

-- One row a writer and version, written whole, so that a repeated write changes nothing.
CREATE TABLE headrace_canary_tallies (
    tenant   text NOT NULL,
    agent_id text NOT NULL,
    trial    text NOT NULL,
    version  text NOT NULL,
    writer   text NOT NULL,
    tally    json NOT NULL,
    PRIMARY KEY (tenant, agent_id, trial, version, writer)
);

CREATE TABLE headrace_usage (
    tenant     text NOT NULL,
    day        date NOT NULL,  -- UTC
    writer     text NOT NULL,
    executions bigint NOT NULL,
    PRIMARY KEY (tenant, day, writer)
);

CREATE TABLE headrace_execution_events (
    tenant       text NOT NULL,
    execution_id text NOT NULL,
    id           bigint NOT NULL,
    data         json NOT NULL,
    PRIMARY KEY (tenant, execution_id, id)
);

CREATE TABLE headrace_agent_states (
    tenant     text NOT NULL,
    agent_id   text NOT NULL,
    instance   text NOT NULL,
    version    bigint NOT NULL,
    value      json NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, agent_id, instance)
);
