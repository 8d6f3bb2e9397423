"use strict";
const $ = (id) => document.getElementById(id);
const log = $("log"), form = $("form"), input = $("message");
let messages = [];      // {role, content}, as they are sent
let running = null;     // the AbortController of the answer that is being made
let model = null;       // the name of the model, once the server is ready

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function button(text, act) {
  const element = make("button", "quiet", text);
  element.type = "button";
  element.addEventListener("click", act);
  return element;
}

// Of the browser's two stores one outlives the tab (settings), the other does not (the conversation).
function keep(store, key, value) {
  try {
    if (value === undefined) return store().getItem("headrace." + key);
    if (value === null) store().removeItem("headrace." + key);
    else store().setItem("headrace." + key, value);
  } catch { /* a private window, or full */ }
  return null;
}
const settings = (key, value) => keep(() => localStorage, key, value);
const tab = (key, value) => keep(() => sessionStorage, key, value);

// Settings: each keeps its value in this browser.

const fields = ["system", "temperature", "top_p", "min_p", "top_k", "repetition_penalty",
  "max_completion_tokens", "seed", "theme"];
const defaults = Object.fromEntries(fields.map((id) => [id, $(id).value]));

function show(id) {
  const shown = document.querySelector(`output[for=${id}]`);
  if (shown) shown.textContent = Number($(id).value).toFixed(2);
  if (id === "theme") document.documentElement.dataset.theme = $(id).value;
}
for (const id of fields) {
  $(id).value = settings(id) ?? $(id).value;
  $(id).addEventListener("input", () => { settings(id, $(id).value); show(id); });
  show(id);
}
$("reset").addEventListener("click", () => {
  for (const id of fields) { $(id).value = defaults[id]; settings(id, null); show(id); }
  $("status").textContent = "The settings are back to the defaults";
});
$("toggle").addEventListener("click", () => {
  const open = $("settings").hidden;
  $("settings").hidden = !open;
  $("main").classList.toggle("open", open);
  $("toggle").setAttribute("aria-expanded", open);
  $("toggle").textContent = open ? "Close settings" : "Settings";
  if (open) $("system").focus();
});

function request() {
  const body = { model, stream: true, stream_options: { include_usage: true } };
  for (const id of fields) {
    if (id === "system" || id === "theme" || $(id).value === "" || !$(id).checkValidity()) continue;
    body[id] = Number($(id).value);
  }
  const system = $("system").value.trim();
  body.messages = system ? [{ role: "system", content: system }, ...messages] : messages;
  return body;
}

// Markdown, as far as models write it in answers: made of elements, never of HTML.

function* blocks(text) {
  let block = null;
  for (const line of text.split("\n")) {
    const fence = /^\s*```/.test(line);
    if (block?.kind === "code") {
      if (fence) { yield block; block = null; } else block.lines.push(line);
      continue;
    }
    const kind = fence ? "code" : !line.trim() ? null : /^\s*#{1,6} /.test(line) ? "heading"
      : /^\s*([-*+]|\d{1,9}[.)]) /.test(line) || (block?.kind === "list" && /^\s/.test(line)) ? "list"
        : "text";
    if (block && (kind !== block.kind || kind === "heading")) { yield block; block = null; }
    if (kind === "code") block = { kind, label: line.trim().slice(3).trim(), lines: [] };
    else if (kind) (block ??= { kind, lines: [] }).lines.push(line);
  }
  if (block) yield block;
}

function inline(parent, text) {
  const marks = /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?\S|\S)\*\*|(?<![\w*])\*(?=[^\s*])([^*]*[^\s*])\*(?![\w*])/g;
  let at = 0;
  for (const found of text.matchAll(marks)) {
    parent.append(text.slice(at, found.index));
    at = found.index + found[0].length;
    if (found[1]) parent.append(make("code", "", found[2]));
    else inline(parent.appendChild(make(found[3] ? "strong" : "em")), found[3] ?? found[4]);
  }
  parent.append(text.slice(at));
}

const drawn = {
  text(block) {
    const element = make("p");
    inline(element, block.lines.join("\n"));
    return element;
  },
  heading(block) {
    const element = make("h3");
    inline(element, block.lines[0].replace(/^\s*#+ +/, ""));
    return element;
  },
  list(block) {
    const ordered = /^\s*\d/.test(block.lines[0]);
    const element = make(ordered ? "ol" : "ul");
    for (const line of block.lines) {
      const [, indent, mark, text] = line.match(/^(\s*)(?:([-*+]|\d{1,9}[.)]) )?(.*)$/);
      if (!mark && element.lastChild) {
        inline(element.lastChild, "\n" + text);
        continue;
      }
      const item = element.appendChild(make("li"));
      if (indent) item.style.marginLeft = Math.min(indent.length, 12) / 2 + "em";
      if (/\d/.test(mark)) item.value = parseInt(mark);
      else if (ordered) item.style.listStyleType = "disc";
      inline(item, text);
    }
    return element;
  },
  code(block) {
    const element = make("figure"), caption = element.appendChild(make("figcaption", "", block.label));
    const text = block.lines.join("\n");
    element.appendChild(make("pre")).append(make("code", "", text));
    caption.append(copier(text));
    return element;
  },
};

// Draw `text` in `parent`; of what is there already only the blocks that have changed.
function draw(parent, text) {
  let i = 0;
  for (const block of blocks(text)) {
    const source = JSON.stringify(block), old = parent.children[i];
    if (old?.source !== source) {
      const element = drawn[block.kind](block);
      element.source = source;
      if (old) old.replaceWith(element); else parent.append(element);
    }
    i += 1;
  }
  while (parent.children.length > i) parent.lastChild.remove();
}

function copier(text) {
  const element = button("Copy", async () => {
    await navigator.clipboard.writeText(text);
    element.textContent = "Copied";
    setTimeout(() => { element.textContent = "Copy"; }, 1500);
  });
  element.hidden = !navigator.clipboard;  // only where the connection is safe
  return element;
}

// The conversation

function addTurn(role, text) {
  $("empty").hidden = true;
  const turn = make("article", "turn " + role), body = make("div", "text");
  turn.append(make("h2", "", role === "user" ? "You" : model), body);
  if (role === "user") body.textContent = text; else draw(body, text);
  log.append(turn);
  log.scrollTop = log.scrollHeight;
  return turn;
}

function finish(turn, text, facts, failed) {
  const footer = turn.appendChild(make("footer"));
  footer.append(make("p", failed ? "note bad" : "note", facts));
  if (text) footer.append(copier(text));
  $("last")?.remove();
  const last = footer.appendChild(make("span"));
  last.id = "last";
  last.append(button("Edit message", revise), button("Try again", retry));
  log.scrollTop = log.scrollHeight;
}

function update() {
  const busy = running !== null;
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  $("send").disabled = model === null;
  $("clear").disabled = !log.querySelector(".turn");
}

// The events of a stream: the JSON after each "data: ".
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function answer() {
  const control = running = new AbortController();
  const turn = addTurn("assistant", ""), body = turn.querySelector(".text");
  turn.classList.add("busy");
  $("last")?.remove();
  update();
  $("status").textContent = "The answer begins";
  const start = performance.now();
  let text = "", usage = null, reason = null, first = 0, last = 0, error = null, frame = 0;
  const redraw = () => {
    frame = 0;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    draw(body, text);
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request()), signal: control.signal,
    });
    if (!response.ok) {
      const body = await response.json().catch(() => null);
      throw new Error(body?.error?.message ?? `${response.status} ${response.statusText}`);
    }
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      reason = choice?.finish_reason ?? reason;
      if (!choice?.delta?.content) continue;
      last = performance.now();
      first ||= last;
      text += choice.delta.content;
      frame ||= requestAnimationFrame(redraw);
    }
    if (!reason) throw new Error("the connection was lost");
  } catch (failure) {
    error = failure;
  }
  if (running !== control) return;  // a new chat has begun
  running = null;
  cancelAnimationFrame(frame);
  redraw();
  turn.classList.remove("busy");
  if (text) messages.push({ role: "assistant", content: text });
  tab("messages", JSON.stringify(messages));
  const stopped = control.signal.aborted;
  if (error && !stopped) {
    const why = error instanceof TypeError ? "the server does not answer" : error.message;
    finish(turn, text, why, true);
    $("status").textContent = "The answer failed: " + why;
  } else {
    const facts = [];
    if (usage) facts.push(`${usage.completion_tokens} tokens`);
    if (usage?.completion_tokens > 1 && last > first) {
      facts.push(`${(1000 * (usage.completion_tokens - 1) / (last - first)).toFixed(1)} tok/s`);
    }
    if (first) facts.push(`first after ${((first - start) / 1000).toFixed(2)} s`);
    if (stopped) facts.push("stopped");
    if (reason === "length") facts.push("cut at the longest length");
    finish(turn, text, facts.join(" · "), false);
    $("status").textContent = stopped ? "The answer was stopped" : "The answer is complete: " + text;
  }
  update();
}

function send() {
  const text = input.value.trim();
  if (!text || running || model === null) return;
  if (messages.at(-1)?.role === "user") {  // its answer failed: it is left out
    messages.pop();
    for (const turn of [...log.querySelectorAll(".turn")].slice(-2)) turn.classList.add("failed");
  }
  input.value = "";
  grow();
  messages.push({ role: "user", content: text });
  addTurn("user", text);
  answer();
}

// Take the last answer back; and with it the message it answers.

function takeBack(role) {
  if (messages.at(-1)?.role === role) messages.pop();
  log.lastElementChild.remove();
}

function retry() {
  takeBack("assistant");
  answer();
  input.focus();
}

function revise() {
  takeBack("assistant");
  input.value = messages.at(-1).content;
  takeBack("user");
  tab("messages", JSON.stringify(messages));
  $("empty").hidden = messages.length > 0;
  update();
  grow();
  input.focus();
}

function grow() {
  input.style.height = "auto";
  input.style.height = input.scrollHeight + 2 + "px";
}

input.addEventListener("input", grow);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
form.addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("stop").addEventListener("click", () => { running?.abort(); input.focus(); });
$("clear").addEventListener("click", () => {
  running?.abort();
  running = null;
  messages = [];
  tab("messages", null);
  log.querySelectorAll(".turn").forEach((turn) => turn.remove());
  $("empty").hidden = false;
  update();
  input.focus();
});
for (const example of $("empty").querySelectorAll("button")) {
  example.addEventListener("click", () => { input.value = example.textContent; input.focus(); send(); });
}

// Begin: wait for the server, and go on with the tab's conversation.

async function connect() {
  try {
    const response = await fetch("/v1/models");
    if (response.ok) {
      const [found] = (await response.json()).data;
      model = found.id;
      $("name").textContent = model;
      $("facts").textContent = ` · ${found.device} · ${found.context_length} tokens of context`;
      $("model").title = $("model").textContent;
      restore();
      update();
      return;
    }
    $("name").textContent = response.status === 503 ? "the model is loading …" : "no access";
  } catch {
    $("name").textContent = "the server does not answer";
  }
  setTimeout(connect, 1000);
}

function restore() {
  try { messages = JSON.parse(tab("messages")) ?? []; } catch { messages = []; }
  if (messages.at(-1)?.role === "user") messages.pop();
  for (const { role, content } of messages) {
    const turn = addTurn(role, content);
    if (role === "assistant") finish(turn, content, "", false);
  }
}
connect();
