/**
 * The four charts: what they draw is in `CHARTS`; how, in `Chart`. They share one cursor and one time axis.
 * Missing values are gaps. Colours come from the style sheet, so that dark and light are decided in one place.
 */
import { bytesText, count, durationText, MISSING, percent, rate, short, timeOfDay } from "./format.js";
import { LIMITS } from "./limits.js";
import { element, mark, write } from "./markup.js";

const HEIGHT = 216;
const SYNC = "headrace";
const LABEL_FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const COLLECTING = "Collecting… the first points take a few seconds.";
const HITS_LEAST = LIMITS.hit_rate.warning * 100;
const CPU_MOST = LIMITS.cpu_percent.warning;
const PERCENT_AXIS = [0, 100];

/**
 * @typedef {object} ChartSpec
 * @property {string} name
 * @property {string} title
 * @property {string} unit
 * @property {{field: string, label: string, colour: string, text: (value: number|null) => string, times?: number,
 *   fill?: number, scale?: string}[]} series `times` converts the stored unit to the drawn one
 * @property {object} scale
 * @property {{at: number, text: string, colour: string}[]} limits lines across the chart
 * @property {string} nothing what stands in a chart without any value
 */

/** @type {ChartSpec[]} */
const CHARTS = [
  {
    name: "requests",
    title: "Requests and errors",
    unit: "per second",
    series: [
      { field: "requests_per_s", label: "requests", colour: "--blue", text: rate, fill: 0.12 },
      { field: "errors_per_s", label: "errors", colour: "--vermilion", text: rate, fill: 0.5 },
    ],
    scale: { range: fromZero },
    axis: (value) => short(rate(value)),
    limits: [],
    nothing: COLLECTING,
  },
  {
    name: "latency",
    title: "Response time",
    unit: "logarithmic",
    series: [
      { field: "p50_ms", label: "p50", colour: "--sky", text: durationText },
      { field: "p95_ms", label: "p95", colour: "--blue", text: durationText },
      { field: "p99_ms", label: "p99", colour: "--orange", text: durationText },
    ],
    scale: { distr: 3, range: decades },
    axis: (value) => short(durationText(value)),
    splits: (_plot, _axis, low, high) => powersOfTen(low, high),
    limits: ["p50", "p95", "p99"].map((name, index) => ({
      at: LIMITS[`${name}_ms`].warning,
      text: `${name} limit`,
      colour: ["--sky", "--blue", "--orange"][index],
    })),
    band: [3, 1],
    nothing: "Collecting… response times appear with the first 20 requests.",
  },
  {
    name: "hits",
    title: "Cache hit rate",
    unit: "% of lookups",
    series: [{ field: "hit_rate", label: "hits", colour: "--green", text: withPercent, times: 100, fill: 0.09 }],
    scale: { range: PERCENT_AXIS },
    axis: (value) => count(value),
    limits: [{ at: HITS_LEAST, text: `warns below ${HITS_LEAST} %`, colour: "--ink-3" }],
    nothing: "No cache lookups in this range.",
  },
  {
    name: "host",
    title: "CPU and memory",
    unit: "%, GiB",
    series: [
      { field: "cpu_percent", label: "CPU", colour: "--purple", text: withPercent, fill: 0.09 },
      { field: "memory_bytes", label: "memory", colour: "--teal", text: bytesText, scale: "bytes" },
    ],
    scale: { range: PERCENT_AXIS },
    axis: (value) => count(value),
    second: { scale: "bytes", axis: (value) => short(bytesText(value)) },
    limits: [{ at: CPU_MOST, text: `CPU warns above ${CPU_MOST} %`, colour: "--ink-3" }],
    nothing: "The host reports neither CPU nor memory.",
  },
];

function withPercent(value) {
  return value === null ? MISSING : `${percent(value)} %`;
}

/** Rates start at 0 and leave some air above; an idle chart is a flat line on a scale of 1. */
function fromZero(_chart, _least, most) {
  return [0, Math.max(1, (most ?? 0) * 1.15)];
}

/** Whole decades around the data and the limits, so that the limit lines are always in the picture. */
function decades(_chart, least, most) {
  const low = Math.min(10, least ?? 10);
  const high = Math.max(1000, most ?? 1000);
  return [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high))];
}

function powersOfTen(low, high) {
  const first = Math.round(Math.log10(low));
  return Array.from({ length: Math.round(Math.log10(high)) - first + 1 }, (_, step) => 10 ** (first + step));
}

function colour(name, alpha = 1) {
  const value = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return alpha === 1 ? value : `color-mix(in srgb, ${value} ${alpha * 100}%, transparent)`;
}

/** Every chart of the page, drawn from the same columns. */
export class Charts {
  #charts;
  #memoryMax = null;

  /** @param {HTMLElement} section */
  constructor(section) {
    this.#charts = CHARTS.map((spec) => new Chart(spec, () => this.#memoryMax));
    section.replaceChildren(...this.#charts.map((chart) => chart.root));
    const repaint = () => this.#charts.forEach((chart) => chart.repaint());
    for (const query of ["(prefers-color-scheme: dark)", "(forced-colors: active)"]) {
      window.matchMedia(query).addEventListener("change", repaint);
    }
  }

  /**
   * @param {{at: number[]}} columns of the history
   * @param {{from: number, to: number}} span wall-clock seconds at the edges
   * @param {number|null} memoryMax bytes that we may use: the top of the memory axis
   */
  show(columns, span, memoryMax) {
    this.#memoryMax = memoryMax;
    for (const chart of this.#charts) chart.show(columns, span);
  }
}

class Chart {
  #spec;
  #plot = null;
  #place = element("div", { class: "plot", tabindex: "0", role: "img" });
  #nothing = element("p", { class: "plot-nothing" });
  #values;
  #note = element("p", { class: "card-note" });
  #span = { from: 0, to: 1 };
  #memoryMax;
  #data = [[]];

  constructor(spec, memoryMax) {
    this.#spec = spec;
    this.#memoryMax = memoryMax;
    this.#values = spec.series.map(() => element("span", { class: "legend-value" }, MISSING));
    const legend = spec.series.map((series, index) => {
      const swatch = element("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.setProperty("--swatch", `var(${series.colour})`);
      return element("li", {}, swatch, element("span", {}, series.label), " ", this.#values[index]);
    });
    this.root = element("figure", { class: "card chart", "data-chart": spec.name },
      element("figcaption", { class: "card-head" },
        element("h2", {}, spec.title), this.#note, element("ul", { class: "legend" }, ...legend)),
      element("div", { class: "plot-frame" }, this.#place, this.#nothing));
    this.#place.addEventListener("keydown", (event) => this.#key(event));
    this.#place.addEventListener("blur", () => this.#moveTo(null));
    new ResizeObserver(() => this.#resize()).observe(this.#place);
  }

  show(columns, span) {
    this.#span = span;
    this.#data = [columns.at, ...this.#spec.series.map((series) => scaled(columns[series.field], series.times ?? 1))];
    const known = this.#data.slice(1).some((values) => values.some((value) => value !== null));
    this.#nothing.hidden = known;
    write(this.#nothing, columns.at.length === 0 ? COLLECTING : this.#spec.nothing);
    mark(this.root, "data-empty", known ? null : "");
    if (this.#plot === null) this.#create();
    else this.#plot.setData(this.#data);
    this.#legend();
  }

  /** Draws again with the colours of now. */
  repaint() {
    this.#plot?.redraw(false);
  }

  #create() {
    const width = this.#place.clientWidth;
    if (width === 0) return;
    this.#plot = new globalThis.uPlot(this.#options(width), this.#data, this.#place);
  }

  #resize() {
    if (this.#plot === null) this.#create();
    else if (this.#place.clientWidth > 0) this.#plot.setSize({ width: this.#place.clientWidth, height: HEIGHT });
  }

  #options(width) {
    const spec = this.#spec;
    const scales = { x: { time: true, range: () => [this.#span.from, this.#span.to] }, y: { ...spec.scale } };
    if (spec.second) scales[spec.second.scale] = { range: (_plot, _least, most) => this.#byteRange(most) };
    return {
      width,
      height: HEIGHT,
      padding: [10, spec.second ? 0 : 10, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: false, y: false },
        sync: { key: SYNC, setSeries: false },
        points: { size: 8, width: 2 },
      },
      scales,
      axes: this.#axes(),
      series: [{}, ...spec.series.map(drawn)],
      bands: spec.band && [{ series: spec.band, fill: () => colour("--blue", 0.1) }],
      hooks: { drawAxes: [(plot) => drawLimits(plot, spec.limits)], setCursor: [() => this.#legend()] },
    };
  }

  /** The axis ends at what we may use; where that is not known, a little above what is used. */
  #byteRange(most) {
    return [0, this.#memoryMax() ?? (most ?? 1) * 1.15];
  }

  #axes() {
    const { axis, second, splits } = this.#spec;
    const common = { font: LABEL_FONT, stroke: () => colour("--ink-3"), ticks: { show: false } };
    const grid = { stroke: () => colour("--line"), width: 1 };
    const times = (_plot, seconds) => seconds.map((at) => timeOfDay(at));
    const axes = [
      { ...common, grid: { show: false }, size: 28, space: 52, values: times },
      { ...common, grid, size: 52, space: 36, splits, values: (_plot, values) => values.map((value) => axis(value)) },
    ];
    if (second) {
      const values = (_plot, sizes) => sizes.map((value) => second.axis(value));
      const place = { side: 1, scale: second.scale, size: 62, space: 36, incrs: BYTE_STEPS };
      axes.push({ ...common, ...place, grid: { show: false }, values });
    }
    return axes;
  }

  /** The values and the time under the cursor, or the newest values and their unit. */
  #legend() {
    const pointed = this.#plot?.cursor.idx ?? null;
    const index = pointed ?? this.#data[0].length - 1;
    const at = this.#data[0][index];
    write(this.#note, pointed === null || at === undefined ? this.#spec.unit : timeOfDay(at, { seconds: "always" }));
    const said = this.#spec.series.map((series, position) => {
      const text = series.text(this.#data[position + 1]?.[index] ?? null);
      write(this.#values[position], text);
      return `${series.label} ${text}`;
    });
    const { title, unit } = this.#spec;
    mark(this.#place, "aria-label", `${title}, ${unit}: ${said.join(", ")}. Arrow keys move the cursor.`);
  }

  #key(event) {
    const times = this.#data[0];
    const last = times.length - 1;
    const first = times.findIndex((at) => at >= this.#span.from);
    const here = this.#plot?.cursor.idx ?? last;
    const moves = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: first, End: last, Escape: null };
    if (!(event.key in moves) || first < 0) return;
    event.preventDefault();
    const target = moves[event.key];
    this.#moveTo(target === null ? null : Math.min(last, Math.max(first, target)));
  }

  #moveTo(index) {
    if (this.#plot === null) return;
    const left = index === null ? -10 : this.#plot.valToPos(this.#data[0][index], "x");
    this.#plot.setCursor({ left, top: index === null ? -10 : 10 }, true, true);
  }
}

/** Steps of a byte axis: powers of two, so that the labels are round. */
const BYTE_STEPS = Array.from({ length: 44 }, (_, exponent) => 2 ** exponent);

function scaled(values, times) {
  return times === 1 ? values : values.map((value) => (value === null ? null : value * times));
}

function drawn(series) {
  return {
    scale: series.scale ?? "y",
    width: 1.75,
    stroke: () => colour(series.colour),
    fill: series.fill === undefined ? undefined : () => colour(series.colour, series.fill),
    points: { size: 4, filter: lonely, stroke: () => colour(series.colour), fill: () => colour(series.colour) },
  };
}

/** A value with a gap on either side has no line, so it is shown as a dot. */
function lonely(plot, series, _shown, _gaps) {
  const values = plot.data[series];
  return values.flatMap((value, index) => {
    const alone = value !== null && (values[index - 1] ?? null) === null && (values[index + 1] ?? null) === null;
    return alone ? [index] : [];
  });
}

function drawLimits(plot, limits) {
  const { ctx, bbox } = plot;
  const ratio = devicePixelRatio;
  ctx.save();
  ctx.font = LABEL_FONT.replace("11px", `${11 * ratio}px`);
  ctx.textAlign = "left";
  ctx.textBaseline = "bottom";
  ctx.lineWidth = ratio;
  ctx.setLineDash([3 * ratio, 4 * ratio]);
  for (const limit of limits) {
    const y = Math.round(plot.valToPos(limit.at, "y", true));
    ctx.strokeStyle = colour(limit.colour, 0.8);
    ctx.beginPath();
    ctx.moveTo(bbox.left, y);
    ctx.lineTo(bbox.left + bbox.width, y);
    ctx.stroke();
    label(ctx, limit.text, bbox.left + 4 * ratio, y - 2 * ratio);
  }
  ctx.restore();
}

/** Text with a halo of the card's colour, legible on top of any line. */
function label(ctx, text, x, y) {
  ctx.save();
  ctx.setLineDash([]);
  ctx.lineWidth = 4 * devicePixelRatio;
  ctx.lineJoin = "round";
  ctx.strokeStyle = colour("--card", 0.85);
  ctx.strokeText(text, x, y);
  ctx.fillStyle = colour("--ink-3");
  ctx.fillText(text, x, y);
  ctx.restore();
}
