// The form of the page: draw or upload, paste, or type; every change is asked at /predict.
"use strict";

const KEY = "hedgerow-key";
const SIDE = 280; // of the drawing board, in CSS pixels
let headers = {};
let asked = 0;

const el = (name, attributes = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in made && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
};
const $ = (selector) => document.querySelector(selector);
const percent = (share) => (share > 0 && share < 0.0005 ? "< 0.1%" : `${(100 * share).toFixed(1)}%`);
// A space and a line break are labels too, and would not be seen.
const shown = (label) => ({ " ": "␣ space", "\n": "↵ line break", "\t": "⇥ tab" })[label] ?? label;

async function ask(inputs) {
  const mine = ++asked;
  const start = performance.now();
  let answer;
  try {
    const response = await fetch("/predict", {
      method: "POST", body: JSON.stringify({ inputs }), headers: { "Content-Type": "application/json", ...headers },
    });
    answer = await response.json();
  } catch (error) {
    answer = { error: `no answer: ${error.message}` };
  }
  if (mine === asked) show(answer, performance.now() - start);
  return answer;
}

function show(answer, ms) {
  $("#answer .wrong").textContent = answer.error ?? "";
  const first = answer.predictions?.[0];
  $("#label").className = first ? "said" : "quiet";
  $("#label").textContent = first ? `${shown(first.label)} ` : "nothing to show";
  $("#bars").replaceChildren();
  $("#times").textContent = "";
  if (!first) return;
  $("#label").append(el("small", {}, percent(first.probability)));
  const rows = Object.entries(first.probabilities).sort((a, b) => b[1] - a[1]).slice(0, 10);
  for (const [label, share] of rows) {
    const bar = el("div", { className: "bar" }, el("i"));
    bar.firstChild.style.width = percent(share).replace("< ", "");
    $("#bars").append(el("tr", {}, el("th", { scope: "row", title: label }, shown(label)),
      el("td", { ariaHidden: true }, bar), el("td", {}, percent(share))));
  }
  $("#times").textContent =
    `Model ${answer.run_ms.toFixed(2)} ms, there and back ${ms.toFixed(0)} ms. ` +
    `Round ${answer.model.round} of ${answer.model.agent}.`;
}

function clear() {
  asked += 1;
  $("#label").className = "quiet";
  $("#label").textContent = "nothing asked yet";
  $("#answer .wrong").textContent = $("#times").textContent = "";
  $("#bars").replaceChildren();
}

// --- pictures ----------------------------------------------------------------------------------------

function pictureForm(model) {
  const [channels, height, width] = model.shape;
  const scale = Math.max(1, SIDE / Math.max(height, width));
  const board = el("canvas", { className: "draw", width: Math.round(width * scale), height: Math.round(height * scale) });
  const seen = el("canvas", { className: "seen", width, height });
  seen.style.width = `${Math.round(board.width / 2.5)}px`;
  board.setAttribute("aria-label", "drawing board");
  const pen = board.getContext("2d", { willReadFrequently: true });
  const small = seen.getContext("2d");
  const invert = el("input", { type: "checkbox" });
  const colour = el("input", { type: "color", value: "#ffffff", ariaLabel: "colour" });
  const file = el("input", { type: "file", accept: "image/png,image/jpeg" });
  const wipe = () => { pen.fillStyle = "#000"; pen.fillRect(0, 0, board.width, board.height); };

  // The mean of what was drawn into each pixel; a browser's own scaling would leave most of it out.
  const means = () => {
    const { data } = pen.getImageData(0, 0, board.width, board.height);
    const found = new Float32Array(3 * width * height);
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      const top = Math.floor(y * board.height / height), bottom = Math.floor((y + 1) * board.height / height);
      const left = Math.floor(x * board.width / width), right = Math.floor((x + 1) * board.width / width);
      const sum = [0, 0, 0];
      for (let v = top; v < bottom; v++) for (let u = left; u < right; u++) {
        for (let c = 0; c < 3; c++) sum[c] += data[4 * (v * board.width + u) + c];
      }
      for (let c = 0; c < 3; c++) found[3 * (y * width + x) + c] = sum[c] / Math.max(1, (bottom - top) * (right - left));
    }
    return found;
  };
  const values = () => {
    const found = means();
    const preview = small.createImageData(width, height);
    const planes = Array.from({ length: channels }, () => Array.from({ length: height }, () => new Array(width)));
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      const at = y * width + x;
      let rgb = [0, 1, 2].map((c) => (invert.checked ? 255 - found[3 * at + c] : found[3 * at + c]));
      if (channels === 1) rgb = new Array(3).fill(0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]);
      planes.forEach((plane, c) => { plane[y][x] = Math.round(rgb[c] / 255 * model.top * 1000) / 1000; });
      preview.data.set([...rgb.map(Math.round), 255], 4 * at);
    }
    small.putImageData(preview, 0, 0);
    return planes;
  };
  const send = () => ask([values()]);

  let last = null;
  const at = (event) => {
    const box = board.getBoundingClientRect();
    return [(event.clientX - box.left) * board.width / box.width, (event.clientY - box.top) * board.height / box.height];
  };
  const stroke = (event) => {
    const now = at(event);
    pen.strokeStyle = channels === 1 ? "#fff" : colour.value;
    pen.lineWidth = scale * Math.max(1, width / 13);
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(...(last ?? now));
    pen.lineTo(...now);
    pen.stroke();
    last = now;
  };
  board.addEventListener("pointerdown", (event) => { board.setPointerCapture(event.pointerId); last = null; stroke(event); });
  board.addEventListener("pointermove", (event) => { if (event.buttons && last) stroke(event); });
  board.addEventListener("pointerup", () => { last = null; send(); });
  invert.addEventListener("change", send);
  file.addEventListener("change", async () => {
    if (!file.files.length) return;
    try {
      const picture = await createImageBitmap(file.files[0]);
      pen.imageSmoothingQuality = "high";
      pen.drawImage(picture, 0, 0, board.width, board.height);
      await send();
    } catch (error) {
      show({ error: `this is no picture that a browser can read: ${error.message}` }, 0);
    }
    file.value = "";
  });
  const again = el("button", { type: "button" }, "Clear");
  again.addEventListener("click", () => { wipe(); values(); clear(); });
  wipe();
  values();
  return [
    el("div", { className: "board" },
      el("figure", {}, board, el("figcaption", {}, "draw here")),
      el("figure", {}, seen, el("figcaption", {}, `what the model sees: ${width} × ${height}, values 0 to ${model.top}`))),
    el("div", { className: "tools" }, again, el("label", { className: "file" }, "Upload a picture", file),
      ...(channels === 3 ? [el("label", {}, colour, " colour")] : []), el("label", {}, invert, " invert")),
  ];
}

// --- windows of a series -----------------------------------------------------------------------------

function numbersOf(text) {
  const rows = text.trim().startsWith("[") ? JSON.parse(text)
    : text.trim().split("\n").map((line) => line.trim().split(/[\s,;]+/).map(Number));
  if (rows.some((row) => !Array.isArray(row) || row.some((value) => !Number.isFinite(value)))) {
    throw new Error("there is something that is no number");
  }
  return rows;
}

function plot(canvas, rows) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const colours = ["--green", "--blue", "--amber", "--red", "--soft"].map((name) => style.getPropertyValue(name));
  pen.lineWidth = 1.5 * ratio;
  for (let c = 0; c < rows[0].length; c++) {
    const line = rows.map((row) => row[c]);
    const low = Math.min(...line), high = Math.max(...line);
    pen.strokeStyle = colours[c] ?? `hsl(${(c * 137) % 360} 60% 55%)`;
    pen.beginPath();
    line.forEach((value, t) => {
      const y = high > low ? (value - low) / (high - low) : 0.5;
      pen.lineTo((t + 0.5) / line.length * canvas.width, canvas.height * (0.92 - 0.84 * y));
    });
    pen.stroke();
  }
}

function windowForm(model) {
  const [steps, channels] = model.shape;
  const text = el("textarea", { spellcheck: false, ariaLabel: "window",
    placeholder: `${steps} lines, oldest first, of ${channels} ${channels > 1 ? "numbers" : "number"} each (spaces, commas or JSON)` });
  const canvas = el("canvas", { className: "plot", hidden: true });
  const caption = el("p", { className: "quiet" });
  const send = () => {
    if (!text.value.trim()) { canvas.hidden = true; caption.textContent = ""; return clear(); }
    let rows;
    try {
      rows = numbersOf(text.value);
      if (rows.some((row) => row.length !== rows[0].length)) throw new Error("the lines are not equally long");
    } catch (error) {
      return show({ error: error.message }, 0);
    }
    canvas.hidden = false;
    const used = rows.slice(-steps);
    plot(canvas, used);
    caption.textContent = (rows.length > steps ? `The last ${steps} of ${rows.length} lines. ` : "") +
      "Every channel has a scale of its own.";
    if (used.length < steps || used[0].length !== channels) {
      return show({ error: `${used.length} lines of ${used[0].length}: the model takes ${steps} of ${channels}` }, 0);
    }
    return ask([used]);
  };
  let timer;
  text.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(send, 250); });
  const example = el("button", { type: "button" }, "Make one up");
  example.title = "waves around the mean of the training data; not a recording";
  example.addEventListener("click", () => {
    const phases = Array.from({ length: channels }, () => [1 + 3 * Math.random(), 2 * Math.PI * Math.random()]);
    text.value = Array.from({ length: steps }, (_, t) => phases.map(([turns, phase], c) =>
      ((model.mean?.[c] ?? 0) + (model.std?.[c] ?? 1) * Math.sin(2 * Math.PI * turns * t / steps + phase)).toFixed(3)).join(" ")).join("\n");
    send();
  });
  const again = el("button", { type: "button" }, "Clear");
  again.addEventListener("click", () => { text.value = ""; send(); });
  return [text, canvas, caption, el("div", { className: "tools" }, example, again)];
}

// --- text --------------------------------------------------------------------------------------------

function textForm(model) {
  const [longest] = model.shape;
  const spelt = model.labels.every((label) => [...label].length === 1);
  const text = el("textarea", { spellcheck: false, ariaLabel: "text",
    placeholder: spelt ? "type something; the model says which character follows" : "numbers from 0, separated by spaces" });
  const inputs = () => {
    const whole = spelt ? [...text.value] : text.value.trim().split(/[\s,]+/).filter(Boolean).map(Number);
    return [spelt ? whole.slice(-longest).join("") : whole.slice(-longest)];
  };
  const send = () => (text.value.trim() || (spelt && text.value) ? ask(inputs()) : clear());
  let timer;
  text.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(send, 200); });
  const on = el("button", { type: "button", className: "first" }, "Write on");
  on.title = "append the likeliest character, 40 times";
  on.addEventListener("click", async () => {
    on.disabled = true;
    for (let i = 0; i < 40 && text.value; i++) {
      const answer = await ask(inputs());
      if (!answer.predictions) break;
      text.value += (spelt ? "" : " ") + (spelt ? answer.predictions[0].label : model.labels.indexOf(answer.predictions[0].label));
      text.scrollTop = text.scrollHeight;
    }
    on.disabled = false;
  });
  const again = el("button", { type: "button" }, "Clear");
  again.addEventListener("click", () => { text.value = ""; clear(); });
  return [text, el("p", { className: "quiet" }, `The model reads the last ${longest} characters.`),
    el("div", { className: "tools" }, on, again)];
}

function otherForm(model) {
  const text = el("textarea", { spellcheck: false, ariaLabel: "values", placeholder: `JSON of ${model.shape.join(" × ")} numbers` });
  text.addEventListener("change", () => {
    try { ask([JSON.parse(text.value)]); } catch (error) { show({ error: error.message }, 0); }
  });
  return [text];
}

// --- the page ----------------------------------------------------------------------------------------

function begin() {
  const model = JSON.parse($("main").dataset.model);
  $("main").hidden = model === null;
  $("#key").hidden = model !== null;
  if (model === null) return;
  const drawn = model.input === "image" && [1, 3].includes(model.shape[0]);
  const form = drawn ? pictureForm : { series: windowForm, text: textForm }[model.input] ?? otherForm;
  $("#form").replaceChildren(...form(model));
  $("pre").textContent = $("pre").textContent.replaceAll("http://this-device", location.origin);
}

async function open(key) {
  headers = { Authorization: `Bearer ${key}` };
  const response = await fetch("/", { headers });
  const found = new DOMParser().parseFromString(await response.text(), "text/html");
  const known = found.querySelector("main")?.dataset.model !== "null";
  if (known) {
    sessionStorage.setItem(KEY, key);
    document.title = found.title;
    $("h1").textContent = found.title;
    $("main").replaceWith(document.adoptNode(found.querySelector("main")));
  } else {
    sessionStorage.removeItem(KEY);
    $("#key .wrong").textContent = "this is not the key of this server";
  }
  begin();
}

$("#key form").addEventListener("submit", (event) => {
  event.preventDefault();
  open(event.target.querySelector("input").value.trim());
});
if ($("main").dataset.model === "null" && sessionStorage.getItem(KEY)) open(sessionStorage.getItem(KEY));
else begin();
