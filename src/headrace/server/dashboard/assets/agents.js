/**
 * The agents table. It is asked for every five seconds while the page is looked at; it is no part of the stream,
 * because deployments change rarely and the list can be long.
 */
import { Lost, Refused, Unauthorized } from "./api.js";
import { count } from "./format.js";
import { LIMITS, levelAbove } from "./limits.js";
import { element, mark, part, write } from "./markup.js";
import { flag, numberCell, Rows } from "./tables.js";

const EVERY_MS = 5_000;
const UNREADABLE = "The agents cannot be read";
const AGAIN = `Asking again in ${EVERY_MS / 1_000} s.`;
const OFTEN = `more than ${LIMITS.error_rate.warning * 100} % of its executions`;
const FAILING = /fail|error|invalid|broken/i;

export class Agents {
  #api;
  #onUnauthorized;
  #rows = new Rows(part("agents").tBodies[0], agentRow);
  #timer = null;

  /** @param {{api: import("./api.js").Api, onUnauthorized: () => void}} options */
  constructor({ api, onUnauthorized }) {
    this.#api = api;
    this.#onUnauthorized = onUnauthorized;
  }

  /** Asks now and then every five seconds, never twice at once. */
  start() {
    if (this.#timer !== null) return;
    const ask = async () => {
      const timer = this.#timer;
      await this.#ask();
      if (this.#timer === timer) this.#timer = setTimeout(ask, EVERY_MS);
    };
    this.#timer = setTimeout(ask, 0);
  }

  stop() {
    clearTimeout(this.#timer);
    this.#timer = null;
  }

  async #ask() {
    try {
      this.#show(await this.#api.read("agents"));
    } catch (error) {
      if (error instanceof Unauthorized) this.#onUnauthorized();
      else if (error instanceof Refused && error.status === 404) this.#excuse("This server hosts no agents.");
      else if (error instanceof Refused) this.#excuse(`${UNREADABLE}: ${error.message}. ${AGAIN}`);
      else if (error instanceof Lost) this.#excuse(`${UNREADABLE}: ${error.message}. ${AGAIN}`);
      else {
        this.#excuse(`${UNREADABLE}: the answer is not what it should be. ${AGAIN}`);
        reportError(error);
      }
    }
  }

  #show({ agents, total }) {
    this.#rows.show(agents, (agent) => agent.agent_id);
    part("agents").hidden = agents.length === 0;
    part("agents-none").hidden = agents.length > 0;
    part("agents-empty").hidden = true;
    mark(part("agents"), "data-old", null);
    write(part("agents-note"), note(agents.length, total));
  }

  /** Says why there is nothing new; what was known stays, marked as old. */
  #excuse(reason) {
    part("agents-none").hidden = true;
    part("agents-empty").hidden = false;
    write(part("agents-empty"), reason);
    mark(part("agents"), "data-old", "");
  }
}

function note(shown, total) {
  if (total === 0) return "";
  return shown < total ? `first ${count(shown)} of ${count(total)}` : `${count(total)} deployed`;
}

function agentRow() {
  const name = element("span", { class: "agent-name" });
  const detail = element("span", { class: "agent-detail" });
  const status = element("span", { class: "status" });
  const [completed, failed, timedOut] = ["Completed", "Failed", "Timed out"].map(numberCell);
  return {
    root: element("tr", {}, element("th", { scope: "row" }, name, " ", detail),
      element("td", { "data-label": "Status" }, status), completed, failed, timedOut),
    show(agent) {
      write(name, agent.name || agent.agent_id);
      const isNamed = agent.name && agent.name !== agent.agent_id;
      write(detail, isNamed ? `${agent.agent_id} · ${agent.version}` : agent.version);
      write(status, agent.status);
      mark(status, "data-level", FAILING.test(agent.status) ? "warning" : "good");
      const { executions } = agent;
      const ended = executions.completed + executions.failed + executions.timeout;
      write(completed, count(executions.completed));
      for (const [cell, number] of [[failed, executions.failed], [timedOut, executions.timeout]]) {
        write(cell, count(number));
        flag(cell, levelAbove(ended === 0 ? null : number / ended, LIMITS.error_rate), OFTEN);
      }
    },
  };
}
