"use strict";
const data = JSON.parse(document.getElementById("figures").textContent);
const find = id => document.getElementById(id);
const LEVELS = { Macro: "var(--macro)", Midi: "var(--midi)", Micro: "var(--micro)" };
const CAUSES = { memory: "var(--macro)", compute: "var(--midi)", gaps: "var(--warm)", host: "var(--warm)" };
const unit = data.mode === "decode" ? "token" : "prompt";

// Words for figures
const digits = (v, n = 3) => v === 0 ? "0" : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(n));
const time = s => Math.abs(s) >= 1 ? `${digits(s)} s` : Math.abs(s) >= 1e-3 ? `${digits(s * 1e3)} ms` : `${digits(s * 1e6)} µs`;
const bytes = b => b >= 1e9 ? `${digits(b / 1e9)} GB` : b >= 1e6 ? `${digits(b / 1e6)} MB` : b >= 1e3 ? `${digits(b / 1e3)} kB` : `${digits(b)} B`;
const percent = (v, n = 1) => `${(100 * v).toFixed(n)}%`;

function make(name, attributes = {}, text, parent) {
  const svg = ["svg", "g", "line", "path", "rect", "circle", "text"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

// Each part has a colour of its level's family, and the host's parts are grey.
const parts = data.parts.map((part, place) => ({ ...part, place, number: place + 1 }));
for (const [level, [from, to]] of Object.entries({ Macro: [170, 232], Midi: [38, 38], Micro: [272, 338] })) {
  const family = parts.filter(part => part.level === level && !part.host);
  family.forEach((part, i) => {
    const hue = family.length > 1 ? from + (to - from) * i / (family.length - 1) : (from + to) / 2;
    const [light, dark] = i % 2 ? [47, 70] : [36, 58];
    part.colour = `light-dark(hsl(${hue} 62% ${light}%), hsl(${hue} 52% ${dark}%))`;
  });
}
for (const part of parts) part.colour ??= "var(--none)";

// One tip for everything that can be pointed at
const tip = find("tip");
function point(node, text, place) {
  const light = on => {
    for (const other of document.querySelectorAll(`[data-part="${place}"]`)) other.classList.toggle("lit", on);
  };
  const show = (x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 6))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18}px`;
    light(true);
  };
  const hide = () => { tip.hidden = true; light(false); };
  node.addEventListener("pointermove", event => show(event.clientX, event.clientY));
  node.addEventListener("pointerleave", hide);
  node.addEventListener("focus", () => { const box = node.getBoundingClientRect(); show(box.right - 14, box.top); });
  node.addEventListener("blur", hide);
}
const describe = part =>
  `${part.number} ${part.part} (${part.operation})\n${time(part.seconds.median)}, ${percent(part.share)} of the ${unit}` +
  `\n${digits(part.gb_per_second)} GB/s, ${digits(part.gflops_per_second)} GFLOP/s` +
  `\n${digits(part.intensity)} FLOP/byte, ${percent(part.roofline_share, 0)} of the roofline`;

function head() {
  const name = data.model.split("/").pop();
  document.title = `headrace profile: ${name}`;
  find("model").textContent = name;
  const size = data.size ? [`${bytes(data.size)}, ${digits(data.parameters / 1e6, 4)} M parameters`] : [];
  const what = data.mode === "decode" ? `${data.seconds.count} tokens decoded` : `${data.seconds.count} prompts of ${data.n_tokens} tokens`;
  find("about").textContent = [data.architecture, data.device, ...size, `${what} at depth ${data.depth}`].join(" · ");
  const [cause, ...rest] = data.bottleneck.sentence.split(":");
  find("verdict").style.setProperty("--cause", CAUSES[data.bottleneck.cause]);
  find("cause").textContent = `${cause}:`;
  find("sentence").textContent = rest.join(":");
  for (const node of document.querySelectorAll(".unit")) node.textContent = unit;
  const level = Object.fromEntries(data.levels.map(l => [l.level, l.share]));
  const tiles = [
    [`a ${unit}`, time(data.seconds_unprofiled.median), `${digits(data.tokens_per_second)} tokens a second`],
    ["reads", `${digits(data.total.gb_per_second)} GB/s`, `of ${digits(data.read_gb_per_second)} GB/s`],
    ["computes", `${digits(data.total.gflops_per_second)} GFLOP/s`, `${digits(data.total.intensity)} FLOP/byte`],
    ["of the roofline", percent(data.total.roofline_share, 0), `each part at its own`],
    ["Macro, Midi, Micro", `${["Macro", "Midi", "Micro"].map(l => (100 * (level[l] ?? 0)).toFixed(0)).join(" · ")} %`, "matmuls, attention, the rest"],
    ["time stamps cost", percent(data.overhead_share), `unattributed ${percent(data.unattributed_share)}`],
  ];
  for (const [label, value, more] of tiles) {
    const tile = make("div", {}, undefined, find("tiles"));
    make("dt", {}, label, tile);
    make("small", {}, more, make("dd", {}, value, tile));
  }
  find("notes").textContent =
    `Time stamps: ${data.clock}. Every sample was run twice, with and without them, in turn. Rates are of the median ${unit}; ` +
    `shares are of the mean, so that they add up. Bytes are those that must move at least once; a FLOP is a multiplication or an addition. ` +
    `The ceilings were measured in the same run. headrace ${data.version}.`;
}

// Roofline
function roofline() {
  const svg = find("roofline"), width = svg.clientWidth || 600, narrow = width < 520;
  const height = narrow ? 330 : Math.min(480, width * .6), right = 12, top = 14, bottom = 40;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const dots = parts.filter(part => part.gflops_per_second > 0 && part.intensity > 0 && !part.host);
  const roofs = [...data.compute_gflops_per_second].sort((a, b) => b.gflops_per_second - a.gflops_per_second);
  const band = data.read_gb_per_second, highest = roofs[0].gflops_per_second, ridge = highest / band;
  const left = highest > 2e5 ? 74 : 58;
  const low = Math.log10(Math.min(ridge / 30, ...dots.map(d => d.intensity)) * .6);
  const high = Math.log10(Math.max(ridge * 8, ...dots.map(d => d.intensity * 2)));
  const floor = Math.log10(Math.min(highest / 300, ...dots.map(d => d.gflops_per_second)) * .5), roof = Math.log10(highest * 2.2);
  const x = v => left + (Math.log10(v) - low) / (high - low) * (width - left - right);
  const y = v => height - bottom - (Math.log10(v) - floor) / (roof - floor) * (height - top - bottom);
  const ticks = (from, to) => Array.from({ length: Math.floor(to) - Math.ceil(from) + 1 }, (_, i) => 10 ** (Math.ceil(from) + i));
  for (const v of ticks(low, high)) {
    make("line", { class: "grid", x1: x(v), x2: x(v), y1: top, y2: height - bottom }, undefined, svg);
    make("text", { x: x(v), y: height - bottom + 17, "text-anchor": "middle" }, digits(v), svg);
  }
  for (const v of ticks(floor, roof)) {
    make("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }, undefined, svg);
    make("text", { x: left - 7, y: y(v) + 4, "text-anchor": "end" }, digits(v), svg);
  }
  make("path", { class: "axis", fill: "none", d: `M${left} ${top}V${height - bottom}H${width - right}` }, undefined, svg);
  make("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "FLOP a byte", svg);
  make("text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(11 ${(top + height - bottom) / 2}) rotate(-90)` }, "GFLOP/s", svg);
  const taken = [];
  roofs.forEach(({ arithmetic, gflops_per_second: speed }, i) => {
    const start = x(speed / band), end = width - right;
    make("path", { class: i ? "roof low" : "roof", d: `M${start} ${y(speed)}H${end}` }, undefined, svg);
    const name = make("text", { class: "roofname", x: end, y: y(speed) + (i ? 15 : -6), "text-anchor": "end" }, `${digits(speed)} GFLOP/s ${arithmetic}`, svg);
    taken.push(name.getBBox());
  });
  const first = Math.max(10 ** low, 10 ** floor / band);
  make("path", { class: "roof", d: `M${x(first)} ${y(first * band)}L${x(ridge)} ${y(highest)}` }, undefined, svg);
  for (let i = 0; i <= 40; i++) {  // numbers keep off the line
    const v = 10 ** (Math.log10(first) + (Math.log10(ridge) - Math.log10(first)) * i / 40);
    taken.push({ x: x(v) - 4, y: y(v * band) - 4, width: 8, height: 8 });
  }
  const slope = Math.atan2(y(highest) - y(first * band), x(ridge) - x(first)) * 180 / Math.PI;
  const middle = first ** .7 * ridge ** .3;  // in the lower half, where dots are rarely near the line
  make("text", { class: "roofname", "text-anchor": "middle", transform: `translate(${x(middle)} ${y(middle * band)}) rotate(${slope}) translate(0 -7)` }, `${digits(band)} GB/s reading`, svg);
  // Large dots first, so that small ones lie on top; a number beside each, where there is room.
  const placed = dots.map(part => ({ part, x: x(part.intensity), y: y(part.gflops_per_second), r: Math.max(4.5, Math.sqrt(part.share) * (narrow ? 26 : 34)) }));
  placed.sort((a, b) => b.r - a.r);
  for (const dot of placed) {
    const node = make("circle", { class: "dot", cx: dot.x, cy: dot.y, r: dot.r, tabindex: 0, role: "img", "data-part": dot.part.place, style: `fill:${dot.part.colour}`, "aria-label": describe(dot.part) }, undefined, svg);
    point(node, describe(dot.part), dot.part.place);
    taken.push({ x: dot.x - dot.r, y: dot.y - dot.r, width: 2 * dot.r, height: 2 * dot.r });
  }
  for (const dot of placed) label(svg, dot, taken, { left, right: width - right, top, bottom: height - bottom });
}

function label(svg, dot, taken, frame) {
  const text = String(dot.part.number), w = 8 * text.length + 2, h = 13;
  for (let away = dot.r + 3; away < dot.r + 90; away += 4)
    for (const turn of [0, 180, 315, 45, 225, 135, 270, 90, 340, 20, 200, 160]) {
      const cx = dot.x + (away + w / 2) * Math.cos(turn * Math.PI / 180), cy = dot.y + (away + h / 2 - 2) * Math.sin(turn * Math.PI / 180);
      const box = { x: cx - w / 2, y: cy - h / 2, width: w, height: h };
      if (box.x < frame.left || box.x + w > frame.right || box.y < frame.top || box.y + h > frame.bottom) continue;
      if (taken.some(t => box.x < t.x + t.width && t.x < box.x + w && box.y < t.y + t.height && t.y < box.y + h)) continue;
      taken.push(box);
      if (away > dot.r + 8) {
        const far = Math.hypot(cx - dot.x, cy - dot.y), ux = (cx - dot.x) / far, uy = (cy - dot.y) / far;
        make("line", { class: "lead", x1: dot.x + ux * dot.r, y1: dot.y + uy * dot.r, x2: cx - ux * 8, y2: cy - uy * 8 }, undefined, svg);
      }
      make("text", { class: "number", x: cx, y: cy + 4, "text-anchor": "middle" }, text, svg);
      return;
    }
}

function keys() {
  for (const part of parts) {
    const item = make("li", { "data-part": part.place }, undefined, find("key"));
    make("i", { style: `background:${part.colour}` }, undefined, item);
    make("b", {}, part.number, item);
    make("small", {}, ` ${part.operation}`, make("span", {}, part.part, item));
    make("em", {}, percent(part.share), item);
    point(item, describe(part), part.place);
  }
}

// Time
function strip() {
  const svg = find("strip"), width = svg.clientWidth || 600, height = 58;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const last = data.strip.at(-1);
  const end = last ? last[2] + last[3] : 1, x = us => us / end * width;
  find("striptext").textContent = `The median ${unit} as it ran, ${time(end / 1e6)}: ${data.strip.length} parts, one after the other. Pale: ${data.threads == null ? "between kernels" : "threads waited for each other"}. Colours as above.`;
  const layers = new Map();
  for (const [place, layer, start, length, waiting] of data.strip) {
    const part = parts[place];
    const node = make("rect", { x: x(start), y: 0, width: Math.max(.4, x(length)), height: 34, "data-part": place, style: `fill:${part.colour}` }, undefined, svg);
    if (waiting) make("rect", { class: "wait", x: x(start + length - waiting), y: 0, width: x(waiting), height: 34 }, undefined, svg);
    const where = layer === null ? "" : `, layer ${layer}`;
    point(node, `${part.part} (${part.operation}${where})\n${time(length / 1e6)} from ${time(start / 1e6)}` + (waiting ? `\nwaiting ${time(waiting / 1e6)}` : ""), place);
    if (layer === null) continue;
    const known = layers.get(layer) ?? [start, start];
    layers.set(layer, [known[0], start + length]);
  }
  for (const [layer, [from, to]] of layers) {
    if (to < from) continue;
    make("path", { class: "axis", fill: "none", d: `M${x(from) + .5} 37v4H${Math.max(x(from) + 1, x(to) - .5)}v-4` }, undefined, svg);
    if (layer % Math.ceil(layers.size / (width / 34)) === 0) make("text", { x: x((from + to) / 2), y: 55, "text-anchor": "middle" }, layer, svg);
  }
}

function stacks() {
  const svg = find("layers"), width = svg.clientWidth || 600, row = 15, left = 30, top = 4;
  const totals = data.stacks.map(stack => stack.parts.reduce((sum, [, us]) => sum + us, 0));
  const longest = Math.max(1e-9, ...totals), height = top + row * data.stacks.length + 22;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const scale = (width - left - 4) / longest, step = 10 ** Math.floor(Math.log10(longest));
  const apart = longest / step > 5 ? 2 * step : longest / step > 2 ? step : step / 2;
  for (let v = 0; v <= longest; v += apart) {
    make("line", { class: "grid", x1: left + v * scale, x2: left + v * scale, y1: top, y2: height - 18 }, undefined, svg);
    make("text", { x: left + v * scale, y: height - 3, "text-anchor": v ? "middle" : "start" }, time(v / 1e6), svg);
  }
  data.stacks.forEach((stack, i) => {
    let at = left;
    const y = top + row * i;
    make("text", { x: left - 6, y: y + 11, "text-anchor": "end" }, stack.layer, svg);
    for (const [place, us] of stack.parts) {
      const part = parts[place];
      const node = make("rect", { x: at, y: y + 1, width: us * scale, height: row - 2, "data-part": place, style: `fill:${part.colour}` }, undefined, svg);
      point(node, `${part.part} (${part.operation}, layer ${stack.layer})\n${time(us / 1e6)}`, place);
      at += us * scale;
    }
  });
}

// Table
const COLUMNS = [
  ["what", row => row.name], ["×", row => row.records], ["median", row => row.seconds.median, time], ["min", row => row.seconds.min, time],
  ["max", row => row.seconds.max, time], ["share", row => row.share, percent], ["waiting", row => row.waiting_share, percent],
  ["GB/s", row => row.gb_per_second, digits], ["GFLOP/s", row => row.gflops_per_second, digits], ["FLOP/B", row => row.intensity, digits],
  ["bytes", row => row.bytes, bytes], ["of roofline", row => row.roofline_share, v => percent(v, 0)],
];
const ROWS = {
  parts: parts.map(part => ({ ...part, name: part.part, more: part.operation })),
  operations: data.operations.map(row => ({ ...row, name: row.operation })),
  levels: data.levels.map(row => ({ ...row, name: row.level, colour: LEVELS[row.level] })),
  layers: data.layers.map(row => ({ ...row, name: row.layer === null ? row.operation : `layer ${row.layer}` })),
};
let shown = "parts", sorted = -1, downwards = true;
function table() {
  const rows = [...ROWS[shown]];
  if (sorted >= 0) {
    const value = COLUMNS[sorted][1];
    rows.sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * (downwards ? -1 : 1));
  }
  const header = make("tr");
  COLUMNS.forEach(([name], i) => {
    const cell = make("th", { scope: "col", ...(i === sorted && { "aria-sort": downwards ? "descending" : "ascending" }) }, undefined, header);
    make("button", { type: "button" }, name, cell).addEventListener("click", () => {
      [sorted, downwards] = [i, i === sorted ? !downwards : i > 0];
      table();
      document.querySelectorAll("th button")[i].focus();
    });
  });
  document.querySelector("thead").replaceChildren(header);
  const largest = Math.max(...rows.map(row => row.share));
  document.querySelector("tbody").replaceChildren(...rows.map(row => {
    const line = make("tr", row.place === undefined ? {} : { "data-part": row.place });
    COLUMNS.forEach(([name, value, show], i) => {
      const cell = make("td", {}, undefined, line);
      if (i === 0 && row.colour) make("i", { style: `background:${row.colour}` }, undefined, cell);
      if (i === 0 && row.number) cell.append(`${row.number} `);
      cell.append(show ? show(value(row)) : value(row));
      if (i === 0 && row.more) make("small", {}, ` ${row.more}`, cell);
      if (name === "share") {
        cell.className = "share";
        cell.style.setProperty("--part", `${100 * row.share / largest}%`);
        cell.style.setProperty("--bar", "color-mix(in srgb, var(--accent) 22%, transparent)");
      }
    });
    return line;
  }));
}
for (const name of Object.keys(ROWS)) {
  const button = make("button", { type: "button", "aria-pressed": name === shown }, name, find("groups"));
  button.addEventListener("click", () => {
    shown = name;
    for (const other of find("groups").children) other.setAttribute("aria-pressed", other === button);
    table();
  });
}

// Theme: the system's, until the button says otherwise
const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const nameTheme = () => { find("theme").textContent = dark() ? "Light" : "Dark"; };
find("theme").addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; nameTheme(); });

const draw = () => { roofline(); strip(); stacks(); };
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
head(); keys(); draw(); table(); nameTheme();
