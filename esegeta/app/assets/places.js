// The layers of the network as a tree: to look at, and to pick from.
import { $, button, el } from "./dom.js";
import { store } from "./store.js";

// A branch for each part of a name; act(name) gives the button beside a layer.
export function tree(places, act, open = false) {
  const root = { inner: new Map(), place: null };
  for (const place of places) {
    let now = root;
    for (const part of place.name.split(".")) {
      if (!now.inner.has(part)) now.inner.set(part, { inner: new Map(), place: null });
      now = now.inner.get(part);
    }
    now.place = place;
  }
  const draw = (name, node) => {
    const { place } = node;
    const words = el("span", {}, el("strong", {}, name), place ? ` ${place.shape.join(" × ")} ` : null,
      place?.cut ? el("span", { class: "tag", title: "Everything passes through it" }, "cut") : null);
    const beside = place ? act(place.name) : null;
    if (!node.inner.size) return el("div", { class: "leaf", data: { place: place.name } }, words, beside);
    return el("details", { open }, el("summary", {}, words, " ", beside), [...node.inner].map(([inner, one]) => draw(inner, one)));
  };
  return el("div", { class: "tree", role: "group", "aria-label": "Layers of the network" }, [...root.inner].map(([name, node]) => draw(name, node)));
}

// Ask for a layer; null if none was picked.
export function choosePlace(now = "") {
  const dialog = $("browse");
  return new Promise((resolve) => {
    const end = (name) => { dialog.close(); resolve(name); };
    const known = store.trial.places || [];
    const box = el("div");
    const pick = (name) => button("pick", (event) => { event.preventDefault(); end(name); }, { class: "small", "aria-label": `Pick ${name}`, data: { place: name } });
    const search = el("input", { type: "search", placeholder: "Search", "aria-label": "Search among the layers" });
    const show = () => box.replaceChildren(tree(known.filter((one) => one.name.includes(search.value.trim())), pick, search.value.trim() !== "" || known.length < 60));
    search.addEventListener("input", show);
    show();
    dialog.replaceChildren(el("h2", {}, "Layers of the network"),
      known.length ? el("p", { class: "row" }, search, now ? el("span", { class: "quiet" }, `now: ${now}`) : null) : el("p", {}, "They are known after a trial: step 1, \u201cTry it on the first image\u201d."),
      known.length ? box : null, el("p", { class: "row" }, button("Close", () => end(null))));
    dialog.addEventListener("cancel", () => resolve(null), { once: true });
    dialog.showModal();
    search.focus();
  });
}
