/**
 * Server-sent events out of text that arrives in any pieces (HTML Living Standard, 9.2.6).
 */
export class EventParser {
  #rest = "";
  #event = "message";
  #data = [];
  #id = null;

  /** What the server last asked for with `retry:`, in milliseconds, or null. */
  retry_ms = null;

  /**
   * Takes the next piece of the stream.
   * @returns {{event: string, id: string|null, data: string}[]} the events that it completed
   */
  push(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop();
    const complete = [];
    for (const raw of lines) {
      const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
      if (line !== "") this.#field(line);
      else if (this.#data.length > 0) complete.push(this.#finish());
      else this.#event = "message";
    }
    return complete;
  }

  #field(line) {
    const colon = line.indexOf(":");
    const name = colon === -1 ? line : line.slice(0, colon);
    const value = colon === -1 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") this.#data.push(value);
    else if (name === "event") this.#event = value;
    else if (name === "id") this.#id = value;
    else if (name === "retry" && /^\d+$/.test(value)) this.retry_ms = Number(value);
  }

  #finish() {
    const done = { event: this.#event, id: this.#id, data: this.#data.join("\n") };
    this.#event = "message";
    this.#data = [];
    return done;
  }
}
