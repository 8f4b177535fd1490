/** Commands that move the open workflow to this pack's loaders and back, with one Undo step each. */

import { changeWorkflow, nodeDefinitions, nodeTitle, setting, toast } from "./comfy.js";
import { hasNative, hasPackLoader, toNative, toPack } from "./convert.js";
import { t } from "./panel/text.js";

const ALL_GPUS = "SequenceParallel.UseAllGPUs";
const ONE_GPU = "SequenceParallel.UseOneGPU";

/** For `registerExtension`; translated in locales/…/commands.json, and for the menu in main.json. */
export const commands = [
  {
    id: ALL_GPUS,
    label: "Use all GPUs in this workflow",
    tooltip: "Replaces ComfyUI's loaders by this pack's, in subgraphs too. One Undo takes it back.",
    icon: "pi pi-server",
    function: () => useAllGPUs(),
  },
  {
    id: ONE_GPU,
    label: "Use one GPU again in this workflow",
    tooltip: "Replaces this pack's loaders by ComfyUI's, in subgraphs too. One Undo takes it back.",
    icon: "pi pi-desktop",
    function: () => useOneGPU(),
  },
];

export const menuCommands = [{ path: ["Edit"], commands: [ALL_GPUS, ONE_GPU] }];

/** Entries for a loader's menu, and for that of a subgraph with one in it. */
export function nodeMenuItems(node) {
  const types = [...typesIn(node)];
  const items = [];
  if (types.some(hasPackLoader)) {
    items.push({ content: t("Use all GPUs in this workflow"), callback: () => reported(useAllGPUs) });
  }
  if (types.some(hasNative)) {
    items.push({ content: t("Use one GPU again in this workflow"), callback: () => reported(useOneGPU) });
  }
  return items.length ? [null, ...items] : []; // null is a line between entries
}

function* typesIn(node) {
  yield node.type;
  for (const inner of node.subgraph?.nodes ?? []) yield* typesIn(inner);
}

async function reported(command) {
  try {
    await command();
  } catch (error) {
    toast("error", "Sequence Parallel", error.message, 15);
  }
}

export async function useAllGPUs() {
  const decode = setting("SequenceParallel.Workflow.ReplaceVAEDecode") === true;
  await convert(t("Use all GPUs in this workflow"), (saved, definitions) => toPack(saved, { definitions, decode }));
}

export async function useOneGPU() {
  await convert(t("Use one GPU again in this workflow"), (saved, definitions) => toNative(saved, { definitions }));
}

async function convert(title, conversion) {
  let report;
  const known = await changeWorkflow((saved) => {
    const result = conversion(saved, nodeDefinitions());
    report = result.report;
    return report.converted.length ? result.workflow : null;
  });
  if (!known) throw new Error(t("This front end could not undo it, so nothing was changed. Update this pack."));
  const texts = summary(report);
  const severity = report.left.length ? "warn" : report.converted.length ? "success" : "info";
  toast(severity, title, texts.join(" "), report.left.length ? 15 : 6);
}

/** @param {import("./convert.js").Report} report @returns {string[]} sentences for people */
function summary({ converted, left, added, removed }) {
  const made = counted(converted, ({ type, to }) =>
    t("{node} → {replacement}", { node: nodeTitle(type), replacement: nodeTitle(to) }),
  );
  const stays = counted(left, (entry) =>
    t("{node} ({reason})", { node: nodeTitle(entry.type), reason: whyLeft(entry) }),
  );
  const texts = [
    made.length ? t("Replaced: {list}.", { list: made.join(", ") }) : t("There is nothing to replace in this workflow."),
  ];
  const config = nodeTitle("SPConfig");
  if (added.length) texts.push(t("Added: {list}.", { list: counted(added, () => config).join(", ") }));
  if (removed.length) texts.push(t("Removed: {list}.", { list: counted(removed, () => config).join(", ") }));
  if (stays.length) texts.push(t("Left as it is: {list}.", { list: stays.join(", ") }));
  return texts;
}

/** Equal texts once, with their number. */
function counted(entries, text) {
  const counts = new Map();
  for (const entry of entries) counts.set(text(entry), (counts.get(text(entry)) ?? 0) + 1);
  return [...counts].map(([each, count]) => (count === 1 ? each : `${count} × ${each}`));
}

function whyLeft({ reason, name, value, node }) {
  switch (reason) {
    case "unregistered":
      return t("{node} is not installed", { node: nodeTitle(node) });
    case "value":
      return t("{name} is {value}, which {node} does not take", { name, value, node: nodeTitle(node) });
    case "weights":
      return t("{node} needs its weights in ComfyUI", { node: nodeTitle(node) });
    case "group node":
      return t("a group node with a loader in it; convert it to nodes first");
    case "in use":
      return t("its widgets are connected or shown outside");
    default:
      return t("no node does the same");
  }
}
