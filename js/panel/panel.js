/** The sidebar panel: all groups of workers, and buttons for them and for the open workflow. */

import { confirmed, request, toast } from "../comfy.js";
import { useAllGPUs, useOneGPU } from "../workflow.js";
import { element, setChildren, setText } from "./elements.js";
import { GroupView } from "./group.js";
import { t } from "./text.js";

export class Panel {
  constructor() {
    this._views = new Map();
    this._note = element("p", "sp-note");
    this._note.setAttribute("role", "status");
    this._groups = element("div", "sp-groups");
    this.element = element(
      "div",
      "sp-panel comfy-vue-side-bar-container",
      element("h2", "sp-heading", t("Sequence Parallel")),
      this._note,
      this._groups,
      element("div", "sp-buttons", ...this._workerButtons()),
      element("h3", "sp-group-title", t("This workflow")),
      element("div", "sp-buttons", ...this._workflowButtons()),
    );
    this.update({ groups: [] });
  }

  _workerButtons() {
    const unload = t("ComfyUI unloads all models between prompts; the workers stay.");
    const again = t("Ends the workers, whatever they do, and starts them again.");
    const contents = t("Versions, devices, settings, state, the last errors and the ends of the log files, for a bug report.");
    return [
      button("pi pi-eraser", t("Free memory"), unload, free),
      button("pi pi-refresh", t("Restart workers"), again, restart),
      button("pi pi-copy", t("Copy report"), contents, copyReport),
    ];
  }

  _workflowButtons() {
    const all = t("Replaces ComfyUI's loaders by this pack's, in subgraphs too. One Undo takes it back.");
    const one = t("Replaces this pack's loaders by ComfyUI's, in subgraphs too. One Undo takes it back.");
    return [
      button("pi pi-server", t("Use all GPUs"), all, useAllGPUs),
      button("pi pi-desktop", t("Use one GPU again"), one, useOneGPU),
    ];
  }

  /** @param {{groups: object[]}} state as the server sends it */
  update(state) {
    const shown = new Set(state.groups.map((group) => group.id));
    for (const id of this._views.keys()) if (!shown.has(id)) this._views.delete(id);
    for (const group of state.groups) {
      if (!this._views.has(group.id)) this._views.set(group.id, new GroupView());
      this._views.get(group.id).update(group);
    }
    setChildren(this._groups, state.groups.map((group) => this._views.get(group.id).element));
    const none = t("No workers are running. They start with the first prompt that needs them.");
    this._say(state.groups.length ? "" : none);
  }

  /** The server cannot be asked. */
  fail(error) {
    this._say(t("ComfyUI does not answer: {reason}", { reason: error.message }));
  }

  _say(text) {
    setText(this._note, text);
    this._note.hidden = !text;
  }
}

function button(icon, label, tooltip, action) {
  const symbol = element("i", icon);
  symbol.setAttribute("aria-hidden", "true");
  const made = element("button", "sp-button", symbol, label);
  made.type = "button";
  made.title = tooltip;
  made.addEventListener("click", async () => {
    made.disabled = true;
    try {
      await action();
    } catch (error) {
      toast("error", label, error.message, 15);
    } finally {
      made.disabled = false;
    }
  });
  return made;
}

async function free() {
  await request("/sequence_parallel/free", {});
  toast("info", t("Free memory"), t("ComfyUI unloads all models when no prompt runs."), 4);
}

async function restart() {
  const { groups } = await request("/sequence_parallel/status"); // what is shown may be a second old
  // Between two steps a group is idle, and while it reads weights or computes tiles no sampling runs.
  const idle = (group) => ["idle", "dead", "stopped"].includes(group.state) && !group.sampling?.running;
  const running = !groups.every(idle);
  const question = t("A prompt is running; it will fail. Restart the workers?");
  if (running && !(await confirmed(t("Restart workers"), question))) return;
  const { groups: started } = await request("/sequence_parallel/restart", {});
  if (!started) toast("info", t("Restart workers"), t("No workers were running; the next prompt starts them."), 4);
}

async function copyReport() {
  const { text } = await request("/sequence_parallel/report");
  await copy(text);
  toast("success", t("Copy report"), t("The report is in the clipboard."), 4);
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea"); // pages that do not come over https or from this machine have no clipboard
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error(t("The browser does not allow copying."));
}
