/** This pack's part of ComfyUI's settings dialog. The server reads the stored values: `nodes/settings.py`. */

const category = (...path) => ["Sequence Parallel", ...path];

export const settings = [
  {
    id: "SequenceParallel.Workers.Devices",
    category: category("Workers", "Devices"),
    name: "Default devices",
    tooltip:
      "For nodes without SP Config: auto (every GPU), or a list such as cuda:0,cuda:1. Takes effect with the next" +
      " prompt. Not used when ComfyUI runs with --multi-user.",
    type: "text",
    defaultValue: "auto",
  },
  {
    id: "SequenceParallel.Workers.KeepAliveMinutes",
    category: category("Workers", "KeepAlive"),
    name: "Keep-alive (minutes)",
    tooltip:
      "Idle workers exit after this many minutes and free all their memory; the next prompt starts them again." +
      " 0: they keep running. Not used when ComfyUI runs with --multi-user.",
    type: "number",
    defaultValue: 0,
    attrs: { min: 0, max: 10080, showButtons: true, maxFractionDigits: 1 },
  },
  {
    id: "SequenceParallel.Sampler.PreviewIntervalSeconds",
    category: category("Sampler", "PreviewInterval"),
    name: "Preview interval (seconds)",
    tooltip:
      "Least time between two previews of Sampler (SP); 0: one at every step. Between them no latents are sent to ComfyUI;" +
      " the progress bar goes on, and the last step is always shown. KSampler shows every step. Takes effect with the" +
      " next prompt. Not used when ComfyUI runs with --multi-user.",
    type: "number",
    defaultValue: 0,
    attrs: { min: 0, max: 3600, showButtons: true, maxFractionDigits: 1 },
  },
  {
    id: "SequenceParallel.Workflow.ReplaceVAEDecode",
    category: category("Workflow", "ReplaceVAEDecode"),
    name: "Use all GPUs: VAE Decode, too",
    tooltip:
      "Whether Use all GPUs in this workflow also replaces VAE Decode and VAE Decode (Tiled) by VAE Decode (Parallel)," +
      " which decodes in tiles of 512 pixels and 64 frames unless you change them.",
    type: "boolean",
    defaultValue: false,
  },
  {
    id: "SequenceParallel.Log.Level",
    category: category("Log", "Level"),
    name: "Log level",
    tooltip:
      "The least severe of this pack's messages that ComfyUI's log shows. comfyui: as ComfyUI's own; debug: also what" +
      " the workers print. Takes effect with the next prompt. Not used when ComfyUI runs with --multi-user.",
    type: "combo",
    options: ["comfyui", "error", "warning", "info", "debug"],
    defaultValue: "comfyui",
  },
];
