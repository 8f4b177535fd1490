/**
 * Replaces ComfyUI's loaders by this pack's in a saved workflow, and back. A pure function of JSON: it imports nothing,
 * so scripts run it without a front end (`tests/browser/convert_templates.mjs`).
 *
 * Nodes keep their ids, so that what names them stays valid: links, and the widgets that a subgraph shows outside.
 */

const CONFIG = "SPConfig";
const CONFIG_TYPE = "SP_CONFIG";
/** A property of a replaced node: what it was, for the way back. */
const REPLACED = "sp_replaced";
/** Properties that say which pack, of which version, a node is from. */
const ORIGIN = ["cnr_id", "aux_id", "ver"];

const GGUF = "UnetLoaderGGUF"; // of the pack ComfyUI-GGUF
const LOADERS = {
  UNETLoader: "SPLoadDiffusionModel",
  [GGUF]: "SPLoadDiffusionModel",
  CheckpointLoaderSimple: "SPLoadCheckpoint",
};
const DECODERS = { VAEDecode: "SPVAEDecode", VAEDecodeTiled: "SPVAEDecode" };
/** Pack nodes that no conversion has made; VAE Decode (Tiled) gives the same pixels with the same settings. */
const NATIVE = {
  SPLoadDiffusionModel: "UNETLoader",
  SPLoadCheckpoint: "CheckpointLoaderSimple",
  SPVAEDecode: "VAEDecodeTiled",
  SPVAEEncode: "VAEEncodeTiled",
};
const OTHER_FILES = /\.(bin|ckpt|pkl|pt|pt2|pth)$/i; // workers map safetensors and GGUF files, and read no others
const OTHER_CHECKPOINTS = /\.(bin|ckpt|gguf|pkl|pt|pt2|pth)$/i;
const NO_FILES = /^(?!.*\.(safetensors|sft|bin|ckpt|pkl|pt|pt2|pth)$)/i; // of ComfyUI's: diffusers folders, and GGUF's
/** Values that a node refuses when it runs. */
const REFUSED = {
  UNETLoader: { unet_name: NO_FILES },
  [GGUF]: { unet_name: /^(?!.*\.gguf$)/i },
  SPLoadDiffusionModel: { unet_name: OTHER_FILES, weight_dtype: /^fp8_e4m3fn_fast$/ },
  SPLoadCheckpoint: { ckpt_name: OTHER_CHECKPOINTS },
};

/** Nodes that read or call a model's network themselves; the pack's is in its workers. */
const NEEDS_WEIGHTS =
  /^(ModelMerge|SAM3_|RTDETR_|SDPose|TrainLora|(LoraSave|ModelSave|CheckpointSave|ImageOnlyCheckpointSave)$)/;

const NEVER_RUN = [2, 4]; // modes of muted and bypassed nodes
const WIDGET_TYPES = ["INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"];
const OPTIONAL = 7; // the shape of an optional input's slot
const SUBGRAPH_INPUTS = -10; // the id that stands for the inputs of a subgraph
const TITLE_HEIGHT = 30;
const GAP = 40;

/**
 * One node, in a report.
 * @typedef {object} Place
 * @property {number|string} id of the node
 * @property {string} type of the node, before the conversion
 * @property {string} where name of the subgraph, "" outside of all
 */

/**
 * What a conversion did.
 * @typedef {object} Report
 * @property {(Place & {to: string})[]} converted
 * @property {(Place & {reason: string, name?: string, value?: any, node?: string})[]} left nodes that stay as they were.
 *   reason: "no counterpart", "unregistered" (`node` does not exist here), "value" (`node` refuses `value` of input
 *   `name`), "weights" (`node` needs them in ComfyUI), "group node", or "in use" (an SP Config that something else needs)
 * @property {Place[]} added SP Configs
 * @property {Place[]} removed SP Configs
 */

/**
 * Replaces ComfyUI's loaders, in the graph and in all its subgraphs.
 * @param {object} workflow as the front end saves it; it is left as it is
 * @param {object} options
 * @param {Record<string, object>} options.definitions the nodes that exist, as /object_info describes them
 * @param {boolean} [options.decode] whether VAE Decode and VAE Decode (Tiled) are replaced, too
 * @returns {{workflow: object, report: Report}}
 */
export function toPack(workflow, { definitions, decode = false }) {
  const counterparts = decode ? { ...LOADERS, ...DECODERS } : LOADERS;
  const conversion = new Conversion(workflow, definitions);
  const groups = Object.entries(conversion.workflow.extra?.groupNodes ?? {});
  for (const level of conversion.levels) {
    const loaders = [];
    for (const node of [...level.nodes]) {
      const { type } = node;
      const to = counterparts[type];
      if (to === undefined) {
        const group = groups.find(([name]) => [`workflow>${name}`, `workflow/${name}`].includes(type));
        const hidden = group?.[1].nodes?.some((inner) => inner.type in counterparts);
        if (hidden) conversion.leave(level, node, "group node");
        else if (!group && loadsModel(node, level, definitions)) conversion.leave(level, node, "no counterpart");
        continue;
      }
      const user = type in LOADERS ? weightsUser(level, node) : null;
      if (user !== null) {
        conversion.leave(level, node, "weights", { node: user.type });
      } else if (conversion.replace(level, node, to) && type in LOADERS) {
        loaders.push(node); // a VAE is decoded by the workers that are there
      }
    }
    if (loaders.length) conversion.connectConfig(level, loaders);
  }
  return conversion.result();
}

/**
 * Replaces this pack's nodes by ComfyUI's, in the graph and in all its subgraphs: those that `toPack` replaced by what
 * they were, others by those that do the same. SP Configs that nothing needs any more are removed.
 * @param {object} workflow as the front end saves it; it is left as it is
 * @param {object} options
 * @param {Record<string, object>} options.definitions the nodes that exist, as /object_info describes them
 * @returns {{workflow: object, report: Report}}
 */
export function toNative(workflow, { definitions }) {
  const conversion = new Conversion(workflow, definitions);
  for (const level of conversion.levels) {
    const configs = new Set();
    for (const node of [...level.nodes]) {
      if (node.type in NATIVE) {
        const replaced = node.properties?.[REPLACED]?.type;
        const known = (LOADERS[replaced] ?? DECODERS[replaced]) === node.type;
        const usual = conversion.readsGGUF(node) ? GGUF : NATIVE[node.type];
        conversion.replace(level, node, known ? replaced : usual, configs);
      } else if (node.type !== CONFIG && definitions[node.type]?.category === "sequence parallel") {
        conversion.leave(level, node, "no counterpart");
      }
    }
    for (const config of configs) conversion.removeConfig(level, config);
  }
  return conversion.result();
}

/** Whether `toPack` replaces nodes of this type. */
export function hasPackLoader(type) {
  return type in LOADERS;
}

/** Whether `toNative` replaces nodes of this type. */
export function hasNative(type) {
  return type in NATIVE;
}

/** Whether a node makes a MODEL from nothing; not for subgraphs, whose nodes are looked at themselves. */
function loadsModel(node, level, definitions) {
  if (node.type.startsWith("SP") && node.type in definitions) return false;
  if (level.subgraphIds.has(node.type) || node.type === "GetNode") return false;
  const any = (type) => type === "MODEL" || String(type).includes("*") || String(type).startsWith("COMFY_MATCHTYPE");
  return !!node.outputs?.some(({ type }) => type === "MODEL") && !node.inputs?.some(({ type }) => any(type));
}

/** A node that gets a loader's MODEL, through other nodes or not, and needs its weights; null if there is none here. */
function weightsUser(level, loader) {
  const nodes = new Map(level.nodes.map((node) => [node.id, node]));
  const reached = new Set([loader]);
  for (const { id } of reached) {
    for (const link of level.links()) {
      const target = nodes.get(linkValue(link, "target_id"));
      if (linkValue(link, "origin_id") !== id || linkValue(link, "type") !== "MODEL" || !target) continue;
      if (NEEDS_WEIGHTS.test(target.type) && !NEVER_RUN.includes(target.mode)) return target;
      reached.add(target); // a set's loop comes to what is added while it runs
    }
  }
  return null;
}

/** The graph, or a subgraph's definition. Links are arrays in the one and objects in the other. */
class Level {
  constructor(graph, where, subgraphIds) {
    this.graph = graph;
    this.where = where;
    this.subgraphIds = subgraphIds;
    this.nodes = graph.nodes ??= [];
    this._arrays = !("state" in graph);
  }

  links() {
    return (this.graph.links ??= []);
  }

  link(id) {
    const found = this.links().find((link) => linkValue(link, "id") === id);
    return found ?? null;
  }

  addLink(values) {
    this.links().push(this._arrays ? LINK_FIELDS.map((name) => values[name]) : values);
  }

  /** Takes a link away, and every mention of it but its target's. */
  removeLink(id) {
    const link = this.link(id);
    if (link === null) return null;
    const origin = linkValue(link, "origin_id");
    const slot = linkValue(link, "origin_slot");
    this.graph.links = this.links().filter((other) => other !== link);
    const node = this.nodes.find((other) => other.id === origin) ?? null;
    const output = node?.outputs?.[slot];
    if (output?.links) output.links = output.links.filter((other) => other !== id);
    const input = origin === SUBGRAPH_INPUTS ? this.graph.inputs?.[slot] : undefined;
    if (input?.linkIds) input.linkIds = input.linkIds.filter((other) => other !== id);
    const extra = this.graph.extra;
    if (extra?.linkExtensions) extra.linkExtensions = extra.linkExtensions.filter((other) => other.id !== id);
    for (const holder of [this.graph, extra]) {
      if (!Array.isArray(holder?.reroutes)) continue;
      for (const reroute of holder.reroutes) {
        if (reroute.linkIds) reroute.linkIds = reroute.linkIds.filter((other) => other !== id);
      }
      holder.reroutes = withoutUnused(holder.reroutes);
    }
    return node;
  }
}

/** Reroutes that a link passes, or that lead to one that is. */
function withoutUnused(reroutes) {
  const used = reroutes.filter(
    (reroute) =>
      !reroute.linkIds || reroute.linkIds.length || reroute.floating || reroutes.some((o) => o.parentId === reroute.id),
  );
  return used.length === reroutes.length ? reroutes : withoutUnused(used);
}

const LINK_FIELDS = ["id", "origin_id", "origin_slot", "target_id", "target_slot", "type"];

function linkValue(link, name) {
  return Array.isArray(link) ? link[LINK_FIELDS.indexOf(name)] : link[name];
}

function setLinkValue(link, name, value) {
  if (Array.isArray(link)) link[LINK_FIELDS.indexOf(name)] = value;
  else link[name] = value;
}

class Conversion {
  constructor(workflow, definitions) {
    this.workflow = structuredClone(workflow);
    this._definitions = definitions;
    this._report = { converted: [], left: [], added: [], removed: [] };
    this.levels = levelsOf(this.workflow);
    const graphs = this.levels.map(({ graph }) => graph);
    const states = graphs.map(({ state }) => state ?? {});
    const nodes = this.levels.flatMap((level) => level.nodes.map(({ id }) => id));
    const links = this.levels.flatMap((level) => level.links().map((link) => linkValue(link, "id")));
    // Ids are unique over all levels: the front end renames nodes of subgraphs otherwise.
    this._lastNode = largest(this.workflow.last_node_id, ...states.map((state) => state.lastNodeId), ...nodes);
    this._lastLink = largest(this.workflow.last_link_id, ...states.map((state) => state.lastLinkId), ...links);
  }

  result() {
    if (this._report.added.length || this._report.converted.length) {
      if ("last_node_id" in this.workflow) this.workflow.last_node_id = this._lastNode;
      if ("last_link_id" in this.workflow) this.workflow.last_link_id = this._lastLink;
      for (const { graph } of this.levels) {
        if (graph.state) Object.assign(graph.state, { lastNodeId: this._lastNode, lastLinkId: this._lastLink });
      }
    }
    return { workflow: this.workflow, report: this._report };
  }

  /** Whether the file of a node of this pack is one that ComfyUI's own loader does not read. */
  readsGGUF(node) {
    const definition = this._definitions[node.type];
    return !!definition && /\.gguf$/i.test(widgetValues(node, slotsOf(definition)).unet_name ?? "");
  }

  leave(level, node, reason, details = {}) {
    this._report.left.push({ id: node.id, type: node.type, where: level.where, reason, ...details });
  }

  /**
   * Makes a node one of another type, in place. Inputs and widgets of the same name keep their links and values; others
   * have the new type's defaults.
   * @param {Set<object>} [freed] gets the SP Configs that lose a link
   * @returns {boolean} whether it did; else it is in the report why not
   */
  replace(level, node, to, freed = new Set()) {
    const [old, wanted] = [this._definitions[node.type], this._definitions[to]];
    if (old === undefined || wanted === undefined) {
      this.leave(level, node, "unregistered", { node: old === undefined ? node.type : to });
      return false;
    }
    const [before, after] = [slotsOf(old), slotsOf(wanted)];
    const values = widgetValues(node, before);
    const inputs = new Map((node.inputs ?? []).map((input) => [input.name, input]));
    for (const [name, refused] of Object.entries(REFUSED[to] ?? {})) {
      const linked = (inputs.get(name)?.link ?? null) !== null; // then the widget's value does not count
      if (linked || !(name in values) || !refused.test(values[name])) continue;
      this.leave(level, node, "value", { name, value: values[name], node: to });
      return false;
    }
    this._report.converted.push({ id: node.id, type: node.type, where: level.where, to });

    const gone = before.filter(({ name }) => !after.some((slot) => slot.name === name));
    for (const { name } of gone) {
      const link = inputs.get(name)?.link ?? null;
      const origin = link === null ? null : level.removeLink(link);
      if (origin?.type === CONFIG) freed.add(origin);
      inputs.delete(name);
    }
    const own = after.map((slot) => inputs.get(slot.name) ?? newInput(slot));
    const foreign = [...inputs.values()].filter(({ name }) => !after.some((slot) => slot.name === name));
    node.inputs = [...own, ...foreign];
    node.inputs.forEach((input, slot) => {
      const link = (input.link ?? null) === null ? null : level.link(input.link);
      if (link !== null) setLinkValue(link, "target_slot", slot);
    });

    const widgets = after.filter(({ widget }) => widget);
    const named = Object.fromEntries(widgets.map(({ name, initial }) => [name, name in values ? values[name] : initial]));
    if (widgets.length || node.widgets_values) node.widgets_values = Object.values(named);
    if (node.widgets_values_named) node.widgets_values_named = named;
    renameProperties(node, to);
    node.type = to;
    return true;
  }

  /** Connects an SP Config to nodes of a level that have none yet: the one that is there, else a new one. */
  connectConfig(level, nodes) {
    const runs = (node) => node.type === CONFIG && !NEVER_RUN.includes(node.mode);
    const config = level.nodes.find(runs) ?? this._addConfig(level, nodes);
    if (config === null) return;
    config.outputs ??= [];
    const output = (config.outputs[0] ??= { name: "sp_config", type: CONFIG_TYPE, links: null });
    for (const node of nodes) {
      const slot = node.inputs.findIndex(({ type }) => type === CONFIG_TYPE);
      if (slot < 0 || (node.inputs[slot].link ?? null) !== null) continue;
      const id = ++this._lastLink;
      level.addLink({
        id,
        origin_id: config.id,
        origin_slot: 0,
        target_id: node.id,
        target_slot: slot,
        type: CONFIG_TYPE,
      });
      node.inputs[slot].link = id;
      output.links = [...(output.links ?? []), id];
    }
  }

  _addConfig(level, nodes) {
    const definition = this._definitions[CONFIG];
    if (definition === undefined || nodes.every(({ inputs }) => !inputs.some(({ type }) => type === CONFIG_TYPE))) {
      return null;
    }
    const slots = slotsOf(definition);
    const widgets = slots.filter(({ widget }) => widget);
    const width = 320;
    const config = {
      id: ++this._lastNode,
      type: CONFIG,
      pos: freePlace(level, nodes, [width, 60 + 30 * slots.length]), // as high as Nodes 2.0 makes it
      size: [width, 34 + 24 * slots.length],
      flags: {},
      order: 0,
      mode: 0,
      inputs: slots.map(newInput),
      outputs: [{ name: "sp_config", type: CONFIG_TYPE, links: null }],
      properties: { "Node name for S&R": CONFIG },
      widgets_values: widgets.map(({ initial }) => initial),
      widgets_values_named: Object.fromEntries(widgets.map(({ name, initial }) => [name, initial])),
    };
    level.nodes.push(config);
    this._report.added.push({ id: config.id, type: CONFIG, where: level.where });
    return config;
  }

  /** Removes an SP Config without a link, unless its widgets are shown outside of its subgraph. */
  removeConfig(level, config) {
    if (config.outputs?.some(({ links }) => links?.length)) return; // other nodes of the pack use it
    const shown = this.levels.some(({ nodes }) =>
      nodes.some(
        ({ type, properties }) =>
          type === level.graph.id && properties?.proxyWidgets?.some?.(([id]) => String(id) === String(config.id)),
      ),
    );
    if (shown || config.inputs?.some(({ link }) => (link ?? null) !== null)) {
      this.leave(level, config, "in use");
      return;
    }
    level.nodes.splice(level.nodes.indexOf(config), 1);
    this._report.removed.push({ id: config.id, type: CONFIG, where: level.where });
  }
}

/** The graph and all definitions of subgraphs, which may have further ones in them. */
function levelsOf(workflow) {
  const definitions = (graph) =>
    (graph.definitions?.subgraphs ?? []).flatMap((subgraph) => [subgraph, ...definitions(subgraph)]);
  const subgraphs = definitions(workflow);
  const ids = new Set(subgraphs.map(({ id }) => id));
  return [
    new Level(workflow, "", ids),
    ...subgraphs.map((graph) => new Level(graph, graph.name ?? String(graph.id), ids)),
  ];
}

function largest(...ids) {
  return ids.map(Number).reduce((found, id) => (id > found ? id : found), 0); // what is no number is not larger
}

/** A node's inputs as slots, in the front end's order: those that are no widgets come first. */
function slotsOf(definition) {
  const { required = {}, optional = {} } = definition.input ?? {};
  const made = (inputs, isOptional) =>
    Object.entries(inputs).map(([name, [type, options = {}]]) => {
      const kind = Array.isArray(type) ? "COMBO" : type;
      const choices = Array.isArray(type) ? type : (options.options ?? []);
      const empty = { INT: 0, FLOAT: 0, STRING: "", BOOLEAN: false, COMBO: choices[0] ?? null }[kind];
      const widget = WIDGET_TYPES.includes(kind) && !options.forceInput;
      return { name, type: kind, optional: isOptional, widget, initial: options.default ?? empty };
    });
  const slots = [...made(required, false), ...made(optional, true)];
  return [...slots.filter(({ widget }) => !widget), ...slots.filter(({ widget }) => widget)];
}

function newInput({ name, type, optional, widget }) {
  if (widget) return { name, type, widget: { name }, link: null };
  return optional ? { name, shape: OPTIONAL, type, link: null } : { name, type, link: null };
}

/** A node's widgets by name. Without names, values are in the widgets' order. */
function widgetValues(node, slots) {
  const values = node.widgets_values ?? node.widgets_values_named ?? [];
  if (!Array.isArray(values)) return { ...values };
  const widgets = slots.filter(({ widget }) => widget).slice(0, values.length);
  return Object.fromEntries(widgets.map(({ name }, i) => [name, values[i]]));
}

/** Keeps in a property what the node was, or goes back to that. */
function renameProperties(node, to) {
  const { [REPLACED]: before, ...properties } = node.properties ?? {};
  const origin = Object.fromEntries(ORIGIN.filter((name) => name in properties).map((name) => [name, properties[name]]));
  for (const name of ORIGIN) delete properties[name];
  if (properties["Node name for S&R"] === node.type) properties["Node name for S&R"] = to;
  if (before?.type === to) {
    for (const name of ORIGIN) if (name in before) properties[name] = before[name];
  } else if (to in NATIVE) {
    properties[REPLACED] = { type: node.type, ...origin };
  }
  node.properties = properties;
}

/**
 * Where a node of this size overlaps no other, and no border of a group if that can be: left of the first of `nodes` or
 * of the groups around it, above, below, or further left.
 */
function freePlace(level, nodes, [width, height]) {
  const taken = level.nodes.map(rectangle);
  const edges = ({ bounding: [x, y, w, h] }) => [x, y, x + w, y + h];
  for (const end of [level.graph.inputNode, level.graph.outputNode]) if (end?.bounding) taken.push(edges(end));
  const groups = (level.graph.groups ?? []).filter(({ bounding }) => bounding).map(edges);
  const first = nodes.map(rectangle).sort((a, b) => a[1] - b[1] || a[0] - b[0])[0];
  const [left, top] = first;
  const frames = [first, ...groups.filter((group) => contains(group, first)).sort((a, b) => b[0] - a[0])];
  const [down, step] = [height + TITLE_HEIGHT, width + GAP];
  const candidates = [
    ...frames.map(([x]) => [x - step, top]),
    ...frames.map(([, y]) => [left, y - down - GAP]),
    ...frames.map(([, , , y]) => [left, y + GAP]),
    ...[2, 3, 4, 5].map((times) => [left - times * step, top]),
    [Math.min(...[...taken, ...groups].map(([x]) => x)) - step, top],
  ];
  const free = ([x, y]) => taken.every((other) => apart([x - GAP / 2, y, x + width + GAP / 2, y + down], other));
  const tidy = ([x, y]) => {
    const place = [x, y, x + width, y + down];
    return groups.every((group) => apart(place, group) || contains(group, place));
  };
  const found = candidates.filter(free);
  const [x, y] = found.find(tidy) ?? found[0] ?? candidates.at(-1);
  return [x, y + TITLE_HEIGHT]; // a node's position is below its title
}

const apart = (a, b) => a[2] <= b[0] || b[2] <= a[0] || a[3] <= b[1] || b[3] <= a[1];
const contains = (a, b) => a[0] <= b[0] && a[1] <= b[1] && b[2] <= a[2] && b[3] <= a[3];

/** Of a node with its title: left, top, right, bottom. */
function rectangle({ pos, size, flags }) {
  const [x, y] = [Number(pos?.[0] ?? 0), Number(pos?.[1] ?? 0)];
  const [width, height] = flags?.collapsed ? [160, 0] : [Number(size?.[0] ?? 200), Number(size?.[1] ?? 100)];
  return [x, y - TITLE_HEIGHT, x + width, y + height];
}
