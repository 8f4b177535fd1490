/** One worker: its device, what it does, its memory. */

import { element, setAttribute, setText } from "./elements.js";
import { stateText } from "./states.js";
import { bytes, seconds, t } from "./text.js";

const SIZES = ["weights", "activations", "free"];
const ENDED = ["dead", "stopped"];
const PARTS = ["weights", "activations", "others"];

export class RankView {
  constructor() {
    this._title = element("span", "sp-rank-title");
    this._state = element("span", "sp-state");
    this._bar = element("div", "sp-bar");
    this._bar.setAttribute("role", "img");
    this._parts = PARTS.map((part) => element("span", `sp-bar-${part}`));
    this._bar.append(...this._parts);
    this._sizes = SIZES.map((part) => [element("span", `sp-key sp-bar-${part}`), element("span")]);
    this._memory = element(
      "div",
      "sp-legend sp-muted",
      ...this._sizes.map((parts) => element("span", "sp-legend-entry", ...parts)),
    );
    this._memory.setAttribute("aria-hidden", "true"); // the bar's label says the same in words
    const title = element("div", "sp-line", this._title, this._state);
    this.element = element("li", "sp-rank", title, this._bar, this._memory);
    this.showsMemory = false;
  }

  /** @param {object} rank one of `ranks` of a group in the server's state */
  update(rank) {
    const named = rank.title && rank.title !== "CPU";
    const name = named ? `${rank.device} · ${rank.title}` : rank.device;
    const short = name.replace(/NVIDIA (GeForce )?/, "");
    setText(this._title, `${t("Rank {rank}", { rank: rank.rank })} · ${short}`);
    setAttribute(this._title, "title", `${name}, ${t("process {pid}", { pid: rank.pid })}`);
    setText(this._state, rankState(rank));
    setAttribute(this._state, "data-state", rank.state);

    const activations = Math.max(0, rank.memory - rank.weights);
    const used = rank.weights + activations;
    const free = Math.min(rank.free ?? rank.total - used, rank.total - used);
    const sizes = [rank.weights, activations, Math.max(0, rank.total - used - free)];
    this._parts.forEach((part, i) => {
      part.style.width = rank.total ? `${(100 * sizes[i]) / rank.total}%` : "0";
    });
    this.showsMemory = rank.memory > 0 && !ENDED.includes(rank.state); // else it has not said anything yet, or is gone
    this._bar.hidden = this._memory.hidden = !this.showsMemory;
    const values = { weights: bytes(rank.weights), activations: bytes(activations), free: bytes(Math.max(0, free)) };
    SIZES.forEach((part, i) => setText(this._sizes[i][1], values[part]));
    const text = t("{weights} weights, {activations} activations, {free} free of {total}", {
      ...values,
      total: bytes(rank.total),
    });
    setAttribute(this._bar, "aria-label", text);
    setAttribute(this._bar, "title", text);
  }
}

function rankState(rank) {
  const text = stateText(rank.state);
  if (rank.progress) {
    const [done, total] = rank.progress;
    return `${text} ${Math.floor((100 * done) / Math.max(1, total))} %`;
  }
  return rank.seconds === null || ENDED.includes(rank.state) ? text : `${text} · ${seconds(rank.seconds)}`;
}
