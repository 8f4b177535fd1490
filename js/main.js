/** What ComfyUI's front end gets from this pack: a sidebar tab, settings, commands, toasts and a badge. */

import { app } from "./comfy.js";
import { Connection } from "./panel/connection.js";
import { keepNodeTexts } from "./panel/node_texts.js";
import { Panel } from "./panel/panel.js";
import { loadTranslations, t } from "./panel/text.js";
import { TAB_ID, setBadge, topbarBadges, watchTrouble } from "./panel/trouble.js";
import { settings } from "./settings.js";
import { commands, menuCommands, nodeMenuItems } from "./workflow.js";

let show;
watchTrouble(new Promise((resolve) => (show = resolve)));
keepNodeTexts();

app.registerExtension({
  name: "SequenceParallel",
  settings,
  commands,
  menuCommands,
  getNodeMenuItems: nodeMenuItems,
  get topbarBadges() {
    return topbarBadges();
  },
  async setup() {
    await loadTranslations();
    addStyles();
    let panel = null;
    app.extensionManager.registerSidebarTab({
      id: TAB_ID,
      icon: "pi pi-server",
      iconBadge: "",
      title: t("Sequence Parallel"),
      label: t("SP workers"),
      tooltip: t("Sequence Parallel: workers and their memory"),
      type: "custom",
      render(container) {
        if (panel === null) {
          panel = new Panel();
          new Connection(panel).onShown = () => setBadge(false);
        }
        if (panel.element.parentElement !== container) container.replaceChildren(panel.element);
        container.style.height = "100%";
      },
    });
    show();
  },
});

function addStyles() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./panel/panel.css", import.meta.url).href;
  document.head.append(link);
}
