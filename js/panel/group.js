/** One group of workers: what it samples, how the work is split, and each of its workers. */

import { element, setAttribute, setChildren, setText } from "./elements.js";
import { RankView } from "./rank.js";
import { stateText } from "./states.js";
import { bytes, seconds, t } from "./text.js";

function legend() {
  const entry = (part, text) => element("span", "sp-legend-entry", element("span", `sp-key sp-bar-${part}`), text);
  const made = element(
    "div",
    "sp-legend sp-muted",
    entry("weights", t("weights")),
    entry("activations", t("activations")),
    entry("others", t("others")),
    entry("free", t("free")),
  );
  made.title = t("Memory of each device. Activations: all that the worker holds besides its weights.");
  return made;
}

function exposedTooltip({ ranks, step }) {
  const said = ranks.filter((rank) => rank.exposed_s !== null);
  const waits = said.map((rank) => `${t("Rank {rank}", rank)} ${seconds(rank.exposed_s)}`).join(", ");
  return [
    t("How long the worker that waits most could not compute, because something from the others had not arrived."),
    t("All workers: {waits}.", { waits }),
    t("Copying to and from the exchanges, which is not part of it: {time}.", { time: seconds(step.copying_s) }),
  ].join("\n");
}

/** Phases with their seconds as texts, and their `total`. */
function durations(phases) {
  const total = Object.values(phases).reduce((sum, value) => sum + value, 0);
  return Object.fromEntries(Object.entries({ ...phases, total }).map(([name, value]) => [name, seconds(value)]));
}

export class GroupView {
  constructor() {
    this._title = element("h3", "sp-group-title");
    this._state = element("span", "sp-state");
    this._failure = element("p", "sp-failure");
    this._progress = element("progress", "sp-progress");
    this._steps = element("div", "sp-muted");
    this._figures = element("dl", "sp-figures");
    this._ranks = element("ul", "sp-ranks");
    this._legend = legend();
    this._rankViews = [];
    this._figureViews = new Map();
    this.element = element(
      "section",
      "sp-group",
      element("div", "sp-line", this._title, this._state),
      this._failure,
      this._progress,
      this._steps,
      this._figures,
      this._ranks,
      this._legend,
    );
  }

  /** @param {object} group one of `groups` of the server's state */
  update(group) {
    const title = group.models.join(" + ") || t("Workers on {devices}", { devices: group.devices });
    setText(this._title, title);
    setAttribute(this._title, "title", `${title} (${group.devices})`);
    setAttribute(this.element, "aria-label", title);
    const sampling = group.sampling;
    const between = ["idle", "step", "sample"].includes(group.state); // these two alternate while steps are computed
    const state = between && sampling?.running ? "sampling" : group.state;
    setText(this._state, stateText(state));
    setAttribute(this._state, "data-state", state);
    setText(this._failure, group.failure ?? "");
    this._failure.hidden = !group.failure;
    this._updateSteps(sampling);
    this._updateFigures(group);
    while (this._rankViews.length < group.ranks.length) this._rankViews.push(new RankView());
    this._rankViews.length = group.ranks.length;
    this._rankViews.forEach((view, i) => view.update(group.ranks[i]));
    setChildren(this._ranks, this._rankViews.map((view) => view.element));
    this._legend.hidden = this._rankViews.every((view) => !view.showsMemory);
  }

  _updateSteps(sampling) {
    this._progress.hidden = this._steps.hidden = !sampling;
    if (!sampling) return;
    this._progress.max = Math.max(1, sampling.steps);
    this._progress.value = sampling.step;
    const steps = t("Step {step} of {steps}", sampling);
    setAttribute(this._progress, "aria-label", steps);
    const time = sampling.seconds_per_step;
    setText(this._steps, time === null ? steps : `${steps} · ${t("{time} per step", { time: seconds(time) })}`);
  }

  _updateFigures(group) {
    const rows = [];
    if (group.plan) {
      const { ulysses, ring, cfg, dp, reason } = group.plan;
      rows.push(["Plan", `ulysses ${ulysses} × ring ${ring} × cfg ${cfg} × dp ${dp}`, group.devices]);
      rows.push(["Why", reason, group.chosen]);
    }
    if (group.step) {
      const values = { bytes: bytes(group.step.bytes_sent), count: group.step.collectives };
      rows.push([
        "Sent per step",
        t("{bytes} in {count} exchanges", values),
        t("By the worker that sends most; hidden behind computation or not."),
      ]);
      const waited = group.step.exposed_s;
      const percent = group.step.seconds > 0 ? Math.round((100 * waited) / group.step.seconds) : 0;
      rows.push([
        "Exposed communication",
        t("{time} per step ({percent} %)", { time: seconds(waited), percent }),
        exposedTooltip(group),
      ]);
    }
    if (group.cache) {
      const { name, hits, passes, seconds_saved } = group.cache;
      const values = { hits, passes, time: seconds(seconds_saved) };
      rows.push(["Cache", t("{hits} of {passes} passes skipped, about {time} saved", values), name]);
    }
    if (group.speedup !== null) {
      rows.push([
        "Speed-up",
        t("{times}× one device", { times: group.speedup.toFixed(2) }),
        t("The last step against the last one of the same size on one device."),
      ]);
    }
    if (group.start.torch !== undefined) {
      rows.push([
        "Start",
        t("{total} (Python {python}, torch {torch}, device {device}, meeting {meeting})", durations(group.start)),
        t("Of the worker that the others waited for. Meeting: until all workers are connected."),
      ]);
    }
    if (group.load.weights !== undefined) {
      const { libraries, weights } = group.load;
      rows.push([
        "Load",
        t("{total} (libraries {libraries}, weights {weights})", durations({ libraries, weights })),
        t("The last model, on the worker that took longest. Libraries: what of importing ComfyUI's code the start did not hide."),
      ]);
    }
    const elements = [];
    for (const [name, text, tooltip] of rows) {
      if (!this._figureViews.has(name)) {
        this._figureViews.set(name, [element("dt", "", t(name)), element("dd")]);
      }
      const [term, value] = this._figureViews.get(name);
      setText(value, text);
      setAttribute(value, "title", tooltip);
      elements.push(term, value);
    }
    setChildren(this._figures, elements);
  }
}
