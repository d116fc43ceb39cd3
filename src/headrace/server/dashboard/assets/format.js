/**
 * Numbers as people read them. Every function takes null for "not enough data to say" and answers with a dash, never
 * with 0.
 */

/** What stands where a number is not known. */
export const MISSING = "–";

const GROUP = "\u202f";
const KIBI = 1024;
const BYTE_UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** A number with `digits` decimals and narrow spaces between thousands. */
function grouped(value, digits) {
  const parts = new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })
    .formatToParts(value);
  return parts.map((part) => (part.type === "group" ? GROUP : part.value)).join("");
}

/** Whole things: `count(1240)` is `1 240`. */
export function count(value) {
  return value === null ? MISSING : grouped(Math.round(value), 0);
}

/** Things per second: two decimals below 1, one below 100, none above, so that the width stays calm. */
export function rate(value) {
  if (value === null) return MISSING;
  if (value === 0) return "0";
  if (value < 1) return grouped(value, 2);
  return grouped(value, value < 100 ? 1 : 0);
}

/** A duration split for display, in ms below a second and in s from there: `{text, unit}`. */
export function duration(milliseconds) {
  if (milliseconds === null) return { text: MISSING, unit: "" };
  if (milliseconds >= 999.5) return { text: grouped(milliseconds / 1000, milliseconds < 10_000 ? 2 : 1), unit: "s" };
  if (milliseconds < 1) return { text: grouped(milliseconds, 2), unit: "ms" };
  return { text: grouped(milliseconds, milliseconds < 9.95 ? 1 : 0), unit: "ms" };
}

/** A duration in one piece: `84 ms`. */
export function durationText(milliseconds) {
  const { text, unit } = duration(milliseconds);
  return unit === "" ? text : `${text} ${unit}`;
}

/** A number of per cent without its sign: one decimal, two below 0.1, where a calm system lives. */
export function percent(value) {
  if (value === null) return MISSING;
  if (value === 0) return "0";
  if (value < 0.005) return "<0.01";
  if (value < 0.1) return grouped(value, 2);
  return grouped(value, value >= 99.95 ? 0 : 1);
}

/** Bytes split for display, in powers of 1024: `{text, unit}`. */
export function bytes(value) {
  if (value === null) return { text: MISSING, unit: "" };
  let size = value;
  let unit = 0;
  while (size >= 999.5 && unit < BYTE_UNITS.length - 1) {
    size /= KIBI;
    unit += 1;
  }
  return { text: grouped(size, unit === 0 || size >= 99.5 ? 0 : size < 9.95 ? 2 : 1), unit: BYTE_UNITS[unit] };
}

/** Bytes in one piece: `1.42 GiB`. */
export function bytesText(value) {
  const { text, unit } = bytes(value);
  return unit === "" ? text : `${text} ${unit}`;
}

/** The same number without zeros at the end of its decimals, for an axis: `20.0` is `20`, `0.50 s` is `0.5 s`. */
export function short(text) {
  return text.replace(/\.(\d*?)0+(?=\s|$)/, (_zeros, kept) => (kept === "" ? "" : `.${kept}`));
}

/** How long ago, in the unit that a person would choose: `12 s`, `3 min`, `2 h`. */
export function age(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 120) return `${whole} s`;
  if (whole < 7200) return `${Math.floor(whole / 60)} min`;
  return `${Math.floor(whole / 3600)} h`;
}

/** The time of day of a wall-clock second, with seconds only where they are not zero. */
export function timeOfDay(wallSeconds, { seconds = "auto" } = {}) {
  const at = new Date(wallSeconds * 1000);
  const pad = (number) => String(number).padStart(2, "0");
  const short = `${pad(at.getHours())}:${pad(at.getMinutes())}`;
  return seconds === "auto" && at.getSeconds() === 0 ? short : `${short}:${pad(at.getSeconds())}`;
}
