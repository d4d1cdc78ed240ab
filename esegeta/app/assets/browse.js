// A file among those that the server may read.
import * as api from "./api.js";
import { $, button, el, say } from "./dom.js";

const size = (bytes) => (bytes === null ? "" : bytes >= 2 ** 20 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${Math.ceil(bytes / 1024)} KiB`);

export function browse(folders = false) {
  const dialog = $("browse");
  return new Promise((resolve) => {
    const end = (path) => { dialog.close(); resolve(path); };
    const show = async (path) => {
      let found;
      try { found = await api.get("api/files", path ? { path } : undefined); } catch (error) { say(error.message, true); return end(null); }
      const up = found.parent ? button("one folder up", () => show(found.parent)) : null;
      dialog.replaceChildren(
        el("h2", {}, found.path),
        el("p", { class: "row" }, up, found.roots.map((root) => button(root, () => show(root), { class: "small" }))),
        el("div", { class: "entries" }, found.entries.map((entry) =>
          button(`${entry.folder ? "▸ " : ""}${entry.name} ${entry.folder ? "" : size(entry.size)}`,
            () => (entry.folder ? show(entry.path) : end(entry.path)), { data: { path: entry.path } }))),
        el("p", { class: "row" },
          folders ? button("All files of this folder", () => end(`${found.path}/*`)) : null,
          button("Close", () => end(null))));
      dialog.querySelector(".entries button")?.focus();
    };
    dialog.addEventListener("cancel", () => resolve(null), { once: true });
    dialog.showModal();
    show("");
  });
}
