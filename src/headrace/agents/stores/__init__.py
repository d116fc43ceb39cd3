"""Where agents and executions are kept: in memory, or in Postgres. What both promise stands in `store`."""
