/**
 * Where good ends. The response times are the service's promise; the others are where its alerts begin.
 * A p-quantile means something from 10 / (1 - p) samples on; below that the server says null.
 */
export const LIMITS = Object.freeze({
  p50_ms: { warning: 100, samples: 20 },
  p95_ms: { warning: 200, critical: 1000, samples: 200 },
  p99_ms: { warning: 500, samples: 1000 },
  error_rate: { warning: 0.05, critical: 0.1 },
  hit_rate: { warning: 0.8, lookups: 100 },
  cpu_percent: { warning: 80, critical: 90 },
  memory_share: { warning: 0.85, critical: 0.95 },
  loop_lag_ms: { warning: 100 },
});

/** How a value that should stay low stands: `critical`, `warning`, `good` or, for null, `unknown`. */
export function levelAbove(value, limit) {
  if (value === null) return "unknown";
  if (limit.critical !== undefined && value >= limit.critical) return "critical";
  return value > limit.warning ? "warning" : "good";
}
