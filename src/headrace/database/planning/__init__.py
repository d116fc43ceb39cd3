"""From a statement to a plan: what it says, which shards hold its rows, what each is asked. Pure throughout."""
