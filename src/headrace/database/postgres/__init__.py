"""One shard's servers: connections, leaders, replicas, transactions. What is known of psycopg is known here."""
