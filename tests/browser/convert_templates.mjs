/**
 * Converts saved workflows to this pack's loaders and back, and prints a report as JSON:
 *
 *   node tests/browser/convert_templates.mjs FOLDER OBJECT_INFO [--decode] [--write FOLDER] [--undo]
 *
 * FOLDER holds workflows (*.json; what is none is passed over). OBJECT_INFO says which nodes exist: the address of a
 * running ComfyUI, or a file with what its /object_info answers. --decode replaces VAE Decode, too. --undo goes back
 * from this pack's nodes instead. --write puts the converted workflows there.
 *
 * The report: {"files": {name: report, …}, "converted": how many nodes, "left": {reason: {type: how many}},
 * "unchanged": names of files without a node to convert}.
 */

import { mkdir, readdir, readFile, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { parseArgs } from "node:util";

// As text: to Node, a .js file without a package.json is no module.
const source = await readFile(new URL("../../js/convert.js", import.meta.url));
const { toNative, toPack } = await import(`data:text/javascript;base64,${source.toString("base64")}`);

async function definitionsFrom(place) {
  if (!/^https?:/.test(place)) return JSON.parse(await readFile(place, "utf-8"));
  const response = await fetch(`${place.replace(/\/$/, "")}/object_info`);
  if (!response.ok) throw new Error(`${place} answers ${response.status}`);
  return response.json();
}

async function workflowsIn(folder) {
  const names = (await readdir(folder)).filter((name) => name.endsWith(".json")).sort();
  const read = names.map(async (name) => [name, JSON.parse(await readFile(join(folder, name), "utf-8"))]);
  return (await Promise.all(read)).filter(([, workflow]) => Array.isArray(workflow?.nodes));
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { decode: { type: "boolean" }, undo: { type: "boolean" }, write: { type: "string" } },
});
if (positionals.length !== 2) {
  console.error(`usage: node ${basename(process.argv[1])} FOLDER OBJECT_INFO [--decode] [--undo] [--write FOLDER]`);
  process.exit(2);
}
const [folder, objectInfo] = positionals;
const definitions = await definitionsFrom(objectInfo);
const result = { files: {}, converted: 0, left: {}, unchanged: [] };
if (values.write) await mkdir(values.write, { recursive: true });
for (const [name, saved] of await workflowsIn(folder)) {
  const before = JSON.stringify(saved);
  const { workflow, report } = values.undo
    ? toNative(saved, { definitions })
    : toPack(saved, { definitions, decode: values.decode });
  if (JSON.stringify(saved) !== before) throw new Error(`${name}: the conversion has changed what it was given`);
  result.files[name] = report;
  result.converted += report.converted.length;
  if (!report.converted.length) result.unchanged.push(name);
  for (const { reason, type } of report.left) {
    const types = (result.left[reason] ??= {});
    types[type] = (types[type] ?? 0) + 1;
  }
  if (values.write) await writeFile(join(values.write, name), `${JSON.stringify(workflow)}\n`);
}
console.log(JSON.stringify(result, null, 1));
