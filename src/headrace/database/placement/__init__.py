"""Pure rules for which slot a key has and which shard a slot gets."""
