// Follows the coordinator's events and asks for the parts of the page again. Templates render; this only places.
"use strict";

const run = document.body.dataset.run ? "?run=" + encodeURIComponent(document.body.dataset.run) : "";
const asking = {};

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

// One request per part at a time; what happens meanwhile asks once more afterwards.
async function refresh(part) {
  if (asking[part]) { asking[part] = "again"; return; }
  asking[part] = "now";
  try {
    const answer = await fetch("/parts/" + part + run);
    if (answer.ok) place(document.getElementById(part), await answer.text());
    if (answer.ok && part === "run") draw();
  } catch (error) {
    console.warn("the coordinator did not answer", error);
  }
  const again = asking[part] === "again";
  asking[part] = "";
  if (again) setTimeout(refresh, 500, part);
}

function draw() {
  const told = JSON.parse(document.getElementById("chart-data").textContent);
  const box = document.getElementById("chart");
  document.getElementById("chart-section").hidden = !told.rounds.length;
  if (!told.rounds.length || typeof Plotly === "undefined") return;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const line = (name, y, ink, dash) => ({
    name, x: told.rounds, y, mode: "lines+markers", line: { color: colour(ink), dash, width: 2 }, marker: { size: 5 },
    hovertemplate: "%{y:.1f} %",
  });
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line") };
  Plotly.react(box, [
    line("after training, mean", told.trained.mean, "--green", "solid"),
    line("after training, worst", told.trained.worst, "--green", "dot"),
    line("as sent, mean", told.sent.mean, "--blue", "solid"),
    line("as sent, worst", told.sent.worst, "--blue", "dot"),
  ], {
    margin: { l: 55, r: 10, t: 10, b: 45 }, hovermode: "x unified", showlegend: true,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 12 },
    hoverlabel: { bgcolor: colour("--card") },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: { ...axis, title: { text: "round" }, tickformat: "d", range: [0.5, Math.max(2, ...told.rounds) + 0.5] },
    yaxis: { ...axis, title: { text: "accuracy (%)" }, range: [0, 102] },
  }, { responsive: true, displayModeBar: false });
}

function follow() {
  const link = document.getElementById("link");
  const say = (text, state) => { link.textContent = text; link.className = state; };
  const everything = () => ["now", "fleet", "run"].forEach(refresh);
  const stream = new EventSource("/api/v1/events");
  stream.onopen = () => { say("live", "on"); everything(); };
  stream.onerror = () => {
    say("no connection to the coordinator: trying again", "off");
    if (stream.readyState === EventSource.CLOSED) setTimeout(follow, 3000);
  };
  stream.onmessage = () => refresh("run");
  stream.addEventListener("status", () => { refresh("now"); refresh("fleet"); });
}

draw();
setInterval(refresh, 30000, "fleet"); // "last heard" grows older even when nothing happens
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
follow();
