"""One call, several shards: plans are carried out and the answers put together."""
