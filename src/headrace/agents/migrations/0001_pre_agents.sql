-- Agents, their versions and their executions. Everything is keyed by tenant first, which is also the sharding key.

CREATE TABLE headrace_agents (
    tenant     text NOT NULL,
    agent_id   text NOT NULL,
    name       text NOT NULL,
    tags       text[] NOT NULL DEFAULT '{}',
    version    text NOT NULL,  -- the one in service
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, agent_id)
);

CREATE TABLE headrace_agent_versions (
    tenant        text NOT NULL,
    agent_id      text NOT NULL,
    version       text NOT NULL,
    deployment_id text NOT NULL,
    source        text NOT NULL,
    source_sha256 text NOT NULL,
    entrypoint    text NOT NULL,
    timeout_s     double precision,
    compile_ms    double precision NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, agent_id, version)
);

CREATE TABLE headrace_executions (
    tenant       text NOT NULL,
    execution_id text NOT NULL,
    agent_id     text NOT NULL,
    version      text NOT NULL,
    status       text NOT NULL
        CHECK (status IN ('queued', 'running', 'completed', 'failed', 'timeout', 'cancelled', 'interrupted')),
    input_sha256 text NOT NULL,
    output       json,  -- json, not jsonb: an output may hold \u0000, which jsonb refuses
    error        text,
    progress     json,
    queue_ms     double precision NOT NULL DEFAULT 0,
    run_ms       double precision NOT NULL DEFAULT 0,
    cpu_ms       double precision NOT NULL DEFAULT 0,
    memory_bytes bigint,
    started_at   timestamptz,
    finished_at  timestamptz,
    claim        text,         -- the token of whoever claimed the id
    lease_until  timestamptz,  -- an unfinished row past it belongs to a process that died
    PRIMARY KEY (tenant, execution_id)
);

-- One row a writing process, so that two of them never wait for each other; readers add the rows up.
CREATE TABLE headrace_agent_totals (
    tenant    text NOT NULL,
    agent_id  text NOT NULL,
    writer    text NOT NULL,
    completed bigint NOT NULL DEFAULT 0,
    failed    bigint NOT NULL DEFAULT 0,
    timeouts  bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant, agent_id, writer)
);
