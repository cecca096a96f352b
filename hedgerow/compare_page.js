"use strict";
// Draws the figures with the colours of the style sheet, again when the screen turns dark or light.
const figures = JSON.parse(document.getElementById("figures").textContent);
const hidden = new Set();
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 40rem)");
const MARKS = {
  "circle": '<circle cx="17" cy="9" r="5"/>',
  "square": '<rect x="12" y="4" width="10" height="10"/>',
  "diamond": '<path d="M17 2l7 7-7 7-7-7z"/>',
  "triangle-up": '<path d="M17 3l6 11H11z"/>',
  "triangle-down": '<path d="M17 15l6-11H11z"/>',
  "x": '<path d="M13 2l4 4 4-4 3 3-4 4 4 4-3 3-4-4-4 4-3-3 4-4-4-4z"/>',
  "star": '<path d="M17 1l2.3 5.4 5.7.6-4.3 3.9 1.3 5.8L17 13.6l-5 3.1 1.3-5.8L9 7l5.7-.6z"/>',
  "cross": '<path d="M15 3h4v4h4v4h-4v4h-4v-4h-4V7h4z"/>',
};

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function coloured(value) {
  if (typeof value === "string" && value.startsWith("@")) {
    const [name, share] = value.slice(1).split("/");
    const hex = css(name);
    const full = hex.length === 4 ? "#" + [...hex.slice(1)].map((c) => c + c).join("") : hex;
    return share ? full + Math.round((share / 100) * 255).toString(16).padStart(2, "0") : full;
  }
  if (Array.isArray(value)) return value.map(coloured);
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, coloured(one)]));
  }
  return value;
}

function axis(given) {
  const base = { gridcolor: css("line"), zerolinecolor: css("line"), linecolor: css("soft"), automargin: true, ticks: "outside", tickcolor: css("line") };
  const own = { ...given, title: { standoff: 10, ...given.title, font: { size: 13 } } };
  if (own.type === "log") Object.assign(own, { minor: { ticks: "outside", tickcolor: css("line") }, tickformat: "~g" });
  return { ...base, ...own };
}

function draw(place) {
  const figure = figures[place.dataset.figure];
  if (!figure) { place.remove(); return; }
  const traces = figure.traces.filter((trace) => !hidden.has(trace.row)).map((trace) => coloured({ showlegend: trace.row === undefined, ...trace }));
  const { xaxis, yaxis, height, ...rest } = figure.layout;
  const layout = {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", height: height || 350,
    font: { family: "system-ui, sans-serif", size: 12, color: css("ink") },
    margin: { l: 10, r: 14, t: 14, b: 10 }, showlegend: false, hovermode: "closest",
    hoverlabel: { bgcolor: css("card"), font: { color: css("ink") }, bordercolor: css("soft") },
    modebar: { bgcolor: "transparent", color: css("soft"), activecolor: css("ink") },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal", font: { size: 11 } },
    ...rest, xaxis: axis(xaxis), yaxis: axis(yaxis),
  };
  if (layout.showlegend) {
    const names = traces.filter((trace) => trace.showlegend).length;
    layout.height += 20 * Math.ceil(names / Math.max(1, Math.floor(place.clientWidth / 150)));
  }
  place.style.minHeight = `${layout.height}px`;
  Plotly.react(place, traces, layout, { responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
    toImageButtonOptions: { format: "svg", filename: place.dataset.figure } });
}

const places = [...document.querySelectorAll("[data-figure]")];
const all = () => places.filter((place) => place.isConnected).forEach(draw);
dark.addEventListener("change", all);
narrow.addEventListener("change", all);
for (const button of document.querySelectorAll("#legend button")) {
  const open = button.dataset.symbol.endsWith("-open");
  button.querySelector("svg").innerHTML = `<path d="M0 9h34" stroke="currentColor" stroke-width="2"/><g stroke="currentColor" stroke-width="${open ? 2 : 0}" fill="${open ? "var(--card)" : "currentColor"}">${MARKS[button.dataset.symbol.replace("-open", "")]}</g>`;
  button.addEventListener("click", () => {
    const row = Number(button.dataset.row);
    const show = hidden.delete(row);
    if (!show) hidden.add(row);
    button.setAttribute("aria-pressed", String(show));
    all();
  });
}
all();
