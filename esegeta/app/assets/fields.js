// Parameters as fields: a control for each kind, its default, its range, and what its docstring says.
import { button, el, fresh, options } from "./dom.js";
import { browse } from "./browse.js";
import { choosePlace } from "./places.js";

const shown = (value) => Array.isArray(value) && value.every((one) => typeof one === "string") ? value.join(", ") : (typeof value === "string" ? value : value === undefined || value === null ? "" : JSON.stringify(value));

export function parsed(text, kind) {
  if (text === "") return undefined;
  if (kind === "integer" || kind === "number") return Number.isFinite(Number(text)) ? Number(text) : text;
  if (kind === "text") return text;
  if (kind === "texts") return text.split(",").map((one) => one.trim()).filter(Boolean);
  try { return JSON.parse(text); } catch { return text; }
}

const standard = (field) => {
  if (field.required) return "needed";
  const value = field.shown || shown(field.default);
  return value === "" ? "" : `default ${value}`;
};

// set(value) is called with undefined where the default shall count.
export function control(field, value, set, id) {
  const common = { id, "aria-describedby": `${id}-help`, data: { field: field.name } };
  if (field.kind === "flag") {
    const entries = [["", `default (${field.default ? "yes" : "no"})`], ["true", "yes"], ["false", "no"]];
    const select = options(el("select", common), entries, value === undefined ? "" : String(value));
    select.addEventListener("change", () => set(select.value === "" ? undefined : select.value === "true"));
    return select;
  }
  if (field.kind === "choice") {
    const entries = [["", field.required ? "choose" : field.default === null ? "default" : `default (${shown(field.default)})`], ...field.choices];
    const select = options(el("select", common), entries, value ?? "");
    select.addEventListener("change", () => set(select.value || undefined));
    return select;
  }
  if (field.kind === "stack") {
    const calls = (value || []).map((one) => (typeof one === "string" ? { name: one } : structuredClone(one)));
    return stack(field.name, field.makers, calls, "name", (entries) => set(entries.length ? structuredClone(entries) : undefined));
  }
  if (field.kind === "call") return call(field, value, set, common);
  if (field.name === "place" || field.name === "layer") return placed(field, value, set, common);
  const number = field.kind === "integer" || field.kind === "number";
  const input = el("input", {
    ...common, type: number ? "number" : "text", step: field.kind === "integer" ? 1 : "any",
    placeholder: standard(field).replace("default ", ""), value: shown(value), required: field.required || undefined,
  });
  input.addEventListener("change", () => set(parsed(input.value.trim(), field.kind)));
  return input;
}

// A place of the network, typed or picked from the tree of its layers.
export function placed(field, value, set, common) {
  const input = el("input", { ...common, type: "text", value: shown(value), list: "places", required: field.required || undefined, placeholder: standard(field) });
  input.addEventListener("change", () => {
    const several = input.value.split(",").map((one) => one.trim()).filter(Boolean);
    set(several.length > 1 ? several : several[0]);
  });
  const pick = button("pick", async () => {
    const found = await choosePlace(input.value);
    if (found === null) return;
    input.value = found;
    input.dispatchEvent(new Event("change"));
  }, { class: "small", "aria-label": `Pick ${field.name} from the layers`, data: { pick: field.name } });
  return el("span", { class: "row" }, input, pick);
}

// A function by its name, with fields of its own: {name = "grid", size = 8}.
function call(field, value, set, common) {
  const box = el("div");
  let now = typeof value === "string" ? { name: value } : value && value.name ? { ...value } : {};
  const file = value && value.file;
  const select = options(el("select", common), [["", field.required ? "choose" : standard(field) || "default"],
    ...field.makers.map((maker) => maker.name), ["#file", "a file ..."]], file ? "#file" : now.name || "");
  const inner = el("div", { class: "inner" });
  const draw = () => {
    const maker = field.makers.find((one) => one.name === now.name);
    inner.replaceChildren(...(maker ? [el("small", { class: "quiet" }, maker.line),
      ...maker.fields.map((one) => row(one, now[one.name], (v) => {
        if (v === undefined) delete now[one.name]; else now[one.name] = v;
        set({ ...now });
      }))] : file ? [el("small", {}, file)] : []));
  };
  select.addEventListener("change", async () => {
    if (select.value === "#file") {
      const path = await browse();
      if (path) set({ file: path });
      return;
    }
    now = select.value ? { name: select.value } : {};
    set(select.value ? { ...now } : undefined);
    draw();
  });
  draw();
  box.append(select, inner);
  return box;
}

export function row(field, value, set) {
  const id = fresh("field");
  const words = [field.help, standard(field), field.range || (field.kind === "value" ? field.words : "")];
  return el("div", { class: "field" },
    el("label", { for: id }, field.name),
    control(field, value, set, id),
    el("small", { id: `${id}-help` }, words.filter(Boolean).join(" · ")));
}

// The fields that are needed, set, or the first; the others are there when asked for.
const FIRST = 2;

function fewer(fields, entry, put) {
  const drawn = fields.map((field, n) => [n < FIRST || field.required || field.name in entry, row(field, entry[field.name], (value) => put(field.name, value))]);
  const rest = drawn.filter(([first]) => !first).map(([, node]) => node);
  return [...drawn.filter(([first]) => first).map(([, node]) => node), rest.length ? el("details", {}, el("summary", {}, "More settings"), rest) : null];
}

// A stack of functions: added from a list, moved by dragging or by buttons.
export function stack(title, known, entries, key, set) {
  const box = el("div");
  const draw = () => {
    let dragged = null;
    const move = (from, to) => {
      if (to < 0 || to >= entries.length) return;
      entries.splice(to, 0, ...entries.splice(from, 1));
      set(entries);
      draw();
    };
    const items = entries.map((entry, n) => {
      const maker = known.find((one) => one.name === entry[key]);
      const item = el("li", { draggable: "true", data: { entry: entry[key] } },
        el("span", { class: "row" }, el("strong", {}, entry[key]),
          button("up", () => move(n, n - 1), { class: "small", "aria-label": `${entry[key]} up` }),
          button("down", () => move(n, n + 1), { class: "small", "aria-label": `${entry[key]} down` }),
          button("remove", () => { entries.splice(n, 1); set(entries); draw(); }, { class: "small" })),
        maker ? el("small", { class: "quiet" }, maker.line) : null,
        ...fewer(maker ? maker.fields : [], entry, (name, value) => {
          if (value === undefined) delete entry[name]; else entry[name] = value;
          set(entries);
        }));
      item.addEventListener("dragstart", (event) => { dragged = n; event.stopPropagation(); });
      item.addEventListener("dragover", (event) => event.preventDefault());
      item.addEventListener("drop", (event) => { event.preventDefault(); if (dragged !== null) move(dragged, n); });
      return item;
    });
    const add = options(el("select", { "aria-label": `Add to ${title}` }),
      [["", `add ...`], ...known.map((one) => [one.name, one.name])]);
    add.addEventListener("change", () => { entries.push({ [key]: add.value }); set(entries); draw(); });
    box.replaceChildren(el("ol", { class: "stack", "aria-label": title }, items), add);
  };
  draw();
  return box;
}
