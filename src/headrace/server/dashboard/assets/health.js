/**
 * One sentence on how things stand, and why. Pure: a snapshot in, words out.
 */
import { count, durationText, percent, rate } from "./format.js";
import { LIMITS, levelAbove } from "./limits.js";
import { hitRate, memoryShare } from "./measures.js";

const WORDS = { critical: "Critical", warning: "Needs attention", good: "Healthy", idle: "Idle" };
const FINDINGS_MAX = 3;

/**
 * @param {object} snapshot
 * @returns {{level: "good"|"idle"|"warning"|"critical", word: string, detail: string}}
 */
export function health(snapshot) {
  const found = findings(snapshot);
  if (found.length > 0) {
    const level = found.some((finding) => finding.level === "critical") ? "critical" : "warning";
    const worstFirst = [...found].sort((a, b) => Number(b.level === "critical") - Number(a.level === "critical"));
    const shown = worstFirst.slice(0, FINDINGS_MAX).map((finding) => finding.text);
    if (found.length > FINDINGS_MAX) shown.push(`${found.length - FINDINGS_MAX} more`);
    return { level, word: WORDS[level], detail: `${shown.join("; ")}.` };
  }
  if (snapshot.requests_per_s === 0) {
    return { level: "idle", word: WORDS.idle, detail: `No requests in the last ${count(snapshot.interval_s)} s.` };
  }
  return { level: "good", word: WORDS.good, detail: `${praise(snapshot)}.` };
}

function praise(snapshot) {
  const { p50_ms: p50, p95_ms: p95, p99_ms: p99 } = snapshot.latency;
  const known = [["99 %", p99], ["95 %", p95], ["half", p50]].find(([, value]) => value !== null);
  const speed = known === undefined ? "" : `, ${known[0]} answered within ${durationText(known[1])}`;
  const errors = snapshot.errors_per_s === 0 ? "no errors" : `${percent(snapshot.error_rate * 100)} % errors`;
  return `${rate(snapshot.requests_per_s)} requests/s${speed}, ${errors}`;
}

function findings(snapshot) {
  return [...errorFindings(snapshot), ...latencyFindings(snapshot.latency), ...hostFindings(snapshot.host),
    ...cacheFindings(snapshot)];
}

function errorFindings(snapshot) {
  const level = levelAbove(snapshot.error_rate, LIMITS.error_rate);
  if (level !== "warning" && level !== "critical") return [];
  return [{ level, text: `${percent(snapshot.error_rate * 100)} % of requests fail` }];
}

/** The outermost quantile that is over its limit speaks for the others. */
function latencyFindings(latency) {
  for (const name of ["p99", "p95", "p50"]) {
    const limit = LIMITS[`${name}_ms`];
    const level = levelAbove(latency[`${name}_ms`], limit);
    if (level === "warning" || level === "critical") {
      const value = durationText(latency[`${name}_ms`]);
      return [{ level, text: `${name} is ${value}, over its limit of ${limit.warning} ms` }];
    }
  }
  return [];
}

function hostFindings(host) {
  const found = [];
  const cpu = levelAbove(host.cpu_percent, LIMITS.cpu_percent);
  if (cpu === "warning" || cpu === "critical") {
    found.push({ level: cpu, text: `CPU is at ${percent(host.cpu_percent)} %` });
  }
  const share = memoryShare(host);
  const memory = levelAbove(share, LIMITS.memory_share);
  if (memory === "warning" || memory === "critical") {
    found.push({ level: memory, text: `memory is at ${percent(share * 100)} %` });
  }
  return found;
}

function cacheFindings(snapshot) {
  const found = snapshot.tiers
    .filter((tier) => !tier.available)
    .map((tier) => ({ level: "warning", text: `the ${tier.tier} cache is unavailable` }));
  const { rate: hits, lookups_per_s: lookups } = hitRate(snapshot.tiers);
  const enough = lookups * snapshot.interval_s >= LIMITS.hit_rate.lookups;
  if (enough && hits !== null && hits < LIMITS.hit_rate.warning) {
    found.push({ level: "warning", text: `only ${percent(hits * 100)} % of cache lookups hit` });
  }
  return found;
}
