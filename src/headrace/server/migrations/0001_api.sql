-- What the HTTP API keeps for itself: its keys, and what was deployed through it.

CREATE TABLE headrace_api_keys (
    key_id      text COLLATE "C" PRIMARY KEY,  -- which is also the sharding key: who asks does not know the tenant yet
    sha256      bytea NOT NULL,                -- of the key's text, which is kept nowhere
    tenant      text NOT NULL,
    tier        text,
    permissions text[] NOT NULL,
    name        text NOT NULL DEFAULT '',
    created_at  timestamptz NOT NULL,
    expires_at  timestamptz,
    revoked_at  timestamptz
);

CREATE TABLE headrace_deployments (
    tenant        text NOT NULL,
    agent_id      text NOT NULL,
    deployment_id text COLLATE "C" NOT NULL,
    record        json NOT NULL,
    PRIMARY KEY (tenant, agent_id, deployment_id)
);
