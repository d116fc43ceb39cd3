/**
 * What a snapshot says once it is added up: the figures that tiles, charts and the health sentence share.
 */

/**
 * The share of cache questions that some tier answered, 0 to 1, and their number per second.
 * The memory tier is asked first; the remote tier only sees its misses, so the questions are the first tier's.
 * @returns {{rate: number|null, lookups_per_s: number}}
 */
export function hitRate(tiers) {
  const first = tiers.find((tier) => tier.tier === "memory") ?? tiers[0];
  if (first === undefined) return { rate: null, lookups_per_s: 0 };
  const lookups = first.hits_per_s + first.misses_per_s;
  if (lookups === 0) return { rate: null, lookups_per_s: 0 };
  const hits = tiers.reduce((sum, tier) => sum + tier.hits_per_s, 0);
  return { rate: Math.min(1, hits / lookups), lookups_per_s: lookups };
}

/** Memory in use as a share of what we may use, or null when either is not known. */
export function memoryShare(host) {
  if (host.memory_bytes === null || host.memory_bytes_max === null || host.memory_bytes_max === 0) return null;
  return host.memory_bytes / host.memory_bytes_max;
}

/** The snapshot as one more point of the history. */
export function pointOf(snapshot) {
  return {
    at: snapshot.at,
    requests_per_s: snapshot.requests_per_s,
    errors_per_s: snapshot.errors_per_s,
    p50_ms: snapshot.latency.p50_ms,
    p95_ms: snapshot.latency.p95_ms,
    p99_ms: snapshot.latency.p99_ms,
    hit_rate: hitRate(snapshot.tiers).rate,
    cpu_percent: snapshot.host.cpu_percent,
    memory_bytes: snapshot.host.memory_bytes,
    executions_per_s: snapshot.agents.started_per_s,
  };
}
