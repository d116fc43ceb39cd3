"""Results of queries, kept in the cache and never older than promised."""
