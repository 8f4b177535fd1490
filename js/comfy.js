/** All that this pack takes from ComfyUI's front end, in one place. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

export { app };

/** Calls `handler(data)` for every event of this name that the server sends. */
export function onEvent(name, handler) {
  api.addEventListener(name, ({ detail }) => handler(detail));
}

/** What the server knows this page's WebSocket by. */
export function clientId() {
  return api.clientId ?? window.name;
}

/**
 * Asks a route of this pack, or of ComfyUI.
 * @param {string} path e.g. "/sequence_parallel/status"
 * @param {object} [body] sent as JSON with POST; without it the request is a GET
 * @returns {Promise<object>} the answer
 * @throws {Error} with the server's reason
 */
export async function request(path, body) {
  const post = {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  const response = await api.fetchApi(path, body === undefined ? {} : post);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? `${response.status} ${response.statusText}`);
  return answer;
}

/** Shows a message for `seconds`. @param {"success"|"info"|"warn"|"error"} severity */
export function toast(severity, summary, detail, seconds) {
  app.extensionManager.toast.add({ severity, summary, detail, life: seconds * 1000 });
}

/** Shows a text on a node, as the server does with `send_progress_text`. */
export function showNodeText(nodeId, text) {
  api.dispatchCustomEvent("progress_text", { nodeId, text });
}

export function setting(id) {
  return app.extensionManager.setting.get(id);
}

/** @returns {Promise<boolean>} whether the user agrees */
export async function confirmed(title, message) {
  return (await app.extensionManager.dialog.confirm({ title, message })) === true;
}

/** The nodes that exist here, as /object_info describes them. @returns {Record<string, object>} */
export function nodeDefinitions() {
  const types = Object.entries(window.LiteGraph.registered_node_types);
  return Object.fromEntries(types.filter(([, { nodeData }]) => nodeData).map(([type, { nodeData }]) => [type, nodeData]));
}

/** A node type's name in ComfyUI's language. */
export function nodeTitle(type) {
  return window.LiteGraph.registered_node_types[type]?.title ?? type;
}

/** What *Save* would write now. */
export function savedWorkflow() {
  return JSON.parse(JSON.stringify((app.rootGraph ?? app.graph).serialize()));
}

/**
 * Changes the open workflow, as one step for Undo.
 * @param {(saved: object) => object | null} change gets what *Save* would write, and gives what is to be shown instead;
 *   null changes nothing
 * @returns {Promise<boolean>} false: this front end keeps its history in another way, and nothing was done
 */
export async function changeWorkflow(change) {
  const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker;
  if (!tracker?.updateState || !tracker.undoQueue) return false;
  const capture = tracker.captureCanvasState ?? tracker.checkState; // the latter before 1.43
  capture.call(tracker); // a change that is not noted yet stays a step of its own
  const before = savedWorkflow();
  const after = change(before);
  if (after === null) return true;
  tracker.activeState = before; // the same, with what the history does not compare: the view, the order of the nodes
  await tracker.updateState([after], tracker.undoQueue);
  tracker.redoQueue.length = 0;
  // What the front end completes as it loads and first draws (types that follow from links, sizes) is no further step.
  tracker.beforeChange();
  try {
    for (let i = 0; i < 3; i++) await nextFrame();
    tracker.activeState = savedWorkflow();
  } finally {
    tracker.afterChange();
  }
  return true;
}

/** Resolves after the next frame, or soon if this page is hidden and draws none. */
function nextFrame() {
  return new Promise((resolve) => {
    requestAnimationFrame(() => setTimeout(resolve));
    setTimeout(resolve, 200);
  });
}
