// Follows the coordinator's events, asks for the parts of the page again, draws charts, and sends what a person
// asks for. Templates render; this only places.
"use strict";

const parts = () => [...document.querySelectorAll("[data-part]")];
const asking = new Map(); // by part: "now" or "again"

// Put fresh HTML into a part, touching only the pieces with an id that differ, so that a selection survives.
function place(target, html) {
  const fresh = document.createElement("template");
  fresh.innerHTML = html;
  const ids = (root) => [...root.querySelectorAll("[id]")].map((piece) => piece.id).join();
  if (ids(target) !== ids(fresh.content)) {
    target.replaceChildren(fresh.content);
    return;
  }
  for (const piece of [...fresh.content.querySelectorAll("[id]")]) {
    const old = document.getElementById(piece.id);
    if (piece.querySelector("[id]") || !old || old.outerHTML === piece.outerHTML) continue;
    old.replaceWith(piece);
  }
}

// One request per part at a time; what happens meanwhile asks once more afterwards. What took long is asked
// for less often: one reader never takes more than a twentieth of the coordinator's time.
async function refresh(part) {
  if (asking.get(part)) { asking.set(part, "again"); return; }
  asking.set(part, "now");
  const began = performance.now();
  try {
    const answer = await fetch(part.dataset.part);
    if (answer.ok && !part.querySelector("dialog[open]")) place(part, await answer.text());
    if (answer.ok) draw();
  } catch (error) {
    console.warn("the coordinator did not answer", error);
  }
  setTimeout(() => {
    const again = asking.get(part) === "again";
    asking.delete(part);
    if (again) refresh(part);
  }, Math.max(500, 20 * (performance.now() - began)));
}

// A chart is <div class="chart" data-chart="NAME">, its figure <script type="application/json" id="chart-NAME">;
// colours are written as the style sheet's names, "--green".
function draw() {
  if (typeof Plotly === "undefined") return;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const painted = (value) => typeof value === "string" ? (value.startsWith("--") ? colour(value) : value)
    : Array.isArray(value) ? value.map(painted)
    : value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v)]))
    : value;
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true };
  for (const box of document.querySelectorAll("[data-chart]")) {
    const told = document.getElementById("chart-" + box.dataset.chart), text = told ? told.textContent : "{}";
    if (box.drawn === text + axis.gridcolor) continue;
    box.drawn = text + axis.gridcolor;
    const { data = [], layout = {} } = painted(JSON.parse(text));
    box.closest("section").hidden = !data.length;
    if (!data.length) continue;
    Plotly.react(box, data, {
      margin: { l: 55, r: 10, t: 10, b: 45 }, showlegend: true,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 12 },
      hoverlabel: { bgcolor: colour("--card") }, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      ...layout, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
    }, { responsive: true, displayModeBar: false });
  }
}

// <button data-ask="ID"> opens <dialog id="ID"><form data-send="POST /path">; its fields become the JSON.
async function send(form) {
  const [method, path] = form.dataset.send.split(" "), body = JSON.parse(form.dataset.body || "{}");
  for (const { name, type, value, checked } of form.elements) {
    if (!name || value === "" || (type === "radio" && !checked)) continue;
    body[name] = type === "checkbox" ? checked : type === "number" ? Number(value) : value;
  }
  const said = form.querySelector("[role=status]");
  said.textContent = "asking …";
  try {
    const headers = { "content-type": "application/json" };
    const answer = await fetch(path, { method, headers, body: JSON.stringify(body) });
    const told = await answer.json().catch(() => ({}));
    said.classList.toggle("problem", !answer.ok);
    said.textContent = answer.ok ? form.dataset.done || "" : told.detail || "the coordinator answered " + answer.status;
    if (!answer.ok) return;
    if (form.dataset.shows) form.querySelector("output").textContent = told[form.dataset.shows];
    else form.closest("dialog").close();
    parts().forEach(refresh);
  } catch (error) {
    said.textContent = "the coordinator did not answer: " + error.message;
  }
}

function follow() {
  const link = document.getElementById("link");
  const say = (text, state) => { link.textContent = text; link.className = state; };
  const on = (what) => parts().filter((part) => (part.dataset.on || "").includes(what)).forEach(refresh);
  const stream = new EventSource("/api/v1/events");
  stream.onopen = () => { say("live", "on"); parts().forEach(refresh); };
  stream.onerror = () => {
    say("no connection to the coordinator: trying again", "off");
    if (stream.readyState === EventSource.CLOSED) setTimeout(follow, 3000);
  };
  stream.onmessage = () => on("event");
  stream.addEventListener("status", () => on("status"));
}

document.addEventListener("click", ({ target }) => {
  const button = target.closest("[data-ask]");
  if (button) document.getElementById(button.dataset.ask).showModal();
});
document.addEventListener("submit", (event) => {
  // The Enter key in a field submits with the first button, which leaves things as they are: it means to send.
  const typed = document.activeElement && document.activeElement.tagName === "INPUT";
  const left = event.submitter && event.submitter.value === "cancel" && !typed;
  if (!event.target.dataset.send || left) return;
  event.preventDefault();
  send(event.target);
});
draw();
for (const part of parts()) { // "last heard" grows older even when nothing happens
  if (part.dataset.every) setInterval(refresh, 1000 * part.dataset.every, part);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
follow();
