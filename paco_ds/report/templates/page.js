"use strict";
// The charts and the list of classes of report.html. Texts are set as text, never as markup.
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const SHOTS = ["many", "medium", "few"];
const GROUPS = [...SHOTS, "all"];
const tone = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");
const named = name => name[0].toUpperCase() + name.slice(1);

function config() {
  const [ink, muted, grid] = ["ink", "muted", "grid"].map(tone);
  return {
    background: "transparent", font: "system-ui, sans-serif", view: {stroke: null},
    axis: {labelColor: muted, titleColor: muted, titleFontWeight: "normal", gridColor: grid, domain: false, ticks: false,
      labelPadding: 6, minExtent: 34, titlePadding: 8},
    axisX: {grid: false, minExtent: 0},
    legend: {orient: "top", title: null, labelColor: ink, symbolStrokeWidth: 3, padding: 0, offset: 6},
    line: {strokeWidth: 1.8, color: ink}, area: {color: ink}, bar: {color: tone("many")}, rule: {color: muted},
  };
}

const x = {field: "x", type: "quantitative", title: data.unit, scale: {nice: false}, axis: {format: "~g"}};
const y = (title, more = {}) => ({field: "y", type: "quantitative", title, ...more});
const shotColor = domain => ({field: "group", type: "nominal", legend: {labelExpr: "upper(slice(datum.label, 0, 1)) + slice(datum.label, 1)"},
  scale: {domain, range: domain.map(tone)}});
const rows = (name, factor = 1) =>
  (data.curves[name] || []).map(([at, mean, low, high]) => ({x: at, y: factor * mean, low: factor * low, high: factor * high}));

// A point appears at the x nearest to the pointer, with what it is
const hover = (encoding, tooltip) => ({
  params: [{name: "near", select: {type: "point", on: "pointermove", clear: "pointerout", nearest: true}}],
  mark: {type: "point", filled: true, size: 60},
  encoding: {...encoding, tooltip, opacity: {condition: {param: "near", empty: false, value: 1}, value: 0}},
});
const figure = (field, title, format = ".4~g") => ({field, type: "quantitative", title, format});

function curve(values, title, scale = {zero: false}) {
  const encoding = {x, y: y(title, {scale})};
  return {data: {values}, layer: [
    {mark: {type: "area", opacity: 0.15}, encoding: {x, y: {...encoding.y, field: "low"}, y2: {field: "high"}}},
    {mark: "line", encoding},
    hover(encoding, [figure("x", data.unit), figure("y", title), figure("low", "lowest"), figure("high", "highest")]),
  ]};
}

function probability(name) {
  const kinds = {mean: name, optimum: name + "_optimum"};
  const values = SHOTS.flatMap(group => Object.entries(kinds).flatMap(([kind, key]) =>
    rows(`${key}_${group}`).map(row => ({...row, group, kind}))));
  const encoding = {x, y: y("probability", {scale: {zero: true}}), color: shotColor(SHOTS), strokeDash:
    {field: "kind", scale: {domain: ["mean", "optimum"], range: [[1, 0], [5, 4]]}, legend: {symbolStrokeColor: tone("muted")}}};
  const {strokeDash, ...point} = encoding;
  return {data: {values}, layer: [{mark: "line", encoding},
    hover(point, [{field: "group", title: "shot"}, {field: "kind", title: "of"}, figure("x", data.unit), figure("y", "probability")])]};
}

function accuracy() {
  const encoding = {x, y: y("top-1 accuracy, %", {scale: {domain: [0, 100]}}), color: shotColor(GROUPS)};
  return {data: {values: data.accuracy}, layer: [{mark: {type: "line", point: true}, encoding},
    hover(encoding, [{field: "group", title: "shot"}, figure("x", data.unit), figure("y", "top-1, %", ".1f")])]};
}

function loss() {
  const spec = curve(rows("loss"), "loss");
  spec.layer.push({data: {values: data.skips.map(at => ({x: at}))}, mark: {type: "tick", color: tone("alarm"), thickness: 2},
    encoding: {x, y: {value: "height"}, tooltip: [figure("x", "skipped step")]}});
  return spec;
}

function parts() {
  const values = Object.keys(data.curves).filter(name => name.startsWith("part_")).flatMap(name =>
    rows(name).map(row => ({...row, part: name.slice(5).replaceAll("_", " ")})));
  const encoding = {x, y: y("value", {scale: {type: "symlog", constant: 0.1}}), color: {field: "part", type: "nominal", scale: {scheme: "tableau10"}}};
  return {data: {values}, layer: [{mark: "line", encoding},
    hover(encoding, [{field: "part"}, figure("x", data.unit), figure("y", "mean")])]};
}

function time() {
  const total = data.time.reduce((sum, {seconds}) => sum + seconds, 0);
  const values = data.time.map(row => ({...row, share: 100 * row.seconds / total}));
  return {height: 30 * values.length, data: {values}, mark: {type: "bar", cornerRadius: 2}, encoding: {
    x: {field: "share", type: "quantitative", title: "% of the time of rank 0"},
    y: {field: "part", type: "nominal", title: null, sort: null, axis: {labelLimit: 120}},
    tooltip: [{field: "part"}, figure("seconds", "seconds", ",.1f"), figure("share", "%", ".1f")]}};
}

function reliability() {
  const values = data.reliability.map(bin => ({...bin, confidence: 100 * bin.confidence, y: 100 * bin.accuracy}));
  const sure = {field: "confidence", type: "quantitative", title: "confidence, %", scale: {domain: [0, 100]}};
  const right = y("accuracy, %", {scale: {domain: [0, 100]}});
  return {layer: [
    {data: {values: [{confidence: 0, y: 0}, {confidence: 100, y: 100}]}, mark: {type: "line", strokeDash: [4, 3], color: tone("muted"), strokeWidth: 1.2},
      encoding: {x: sure, y: right}},
    {data: {values}, mark: {type: "line", color: tone("many")}, encoding: {x: sure, y: right}},
    {data: {values}, mark: {type: "point", filled: true, opacity: 0.9, color: tone("many")}, encoding: {x: sure, y: right,
      size: {field: "images", type: "quantitative", legend: null, scale: {range: [20, 300]}},
      tooltip: [figure("confidence", "mean confidence, %", ".1f"), figure("y", "accuracy, %", ".1f"), figure("images", "images", ",")]}},
  ]};
}

function classes(field, title, scale) {
  const values = data.classes.map(([name, count, shot, accuracy], place) =>
    ({name, place: place + 1, count, group: SHOTS[shot], accuracy: accuracy === null ? null : 100 * accuracy}));
  const many = values.length > 40, reach = Math.ceil(values.length / 40);
  const place = {field: "place", type: "quantitative", title: "classes, from the largest to the smallest", scale: {nice: false, domain: [0.4, values.length + 0.6]},
    axis: {format: "d", tickMinStep: 1}};
  const encoding = {x: place, y: {field, type: "quantitative", title, scale}, color: {...shotColor(SHOTS), legend: field === "count" ? null : shotColor(SHOTS).legend},
    tooltip: [{field: "name", title: "class"}, {field: "group", title: "shot"}, figure("count", "training images", ","), figure("accuracy", "top-1, %", ".1f")]};
  const mark = many ? {type: "point", filled: true, size: 14, opacity: 0.55}
    : {type: "bar", width: {band: 0.7}, size: Math.max(3, Math.min(30, 240 / values.length))};
  if (!many && field === "count") encoding.y2 = {datum: 1};  // a logarithmic bar has no zero to begin at
  const layer = [{mark, encoding}];
  if (many && field === "accuracy") layer.push({transform: [{window: [{op: "mean", field, as: "near"}], frame: [-reach, reach]}],
    mark: {type: "line", strokeWidth: 2}, encoding: {x: place, y: {field: "near", type: "quantitative"}}});
  return {renderer: "canvas", height: field === "count" ? 110 : 220, data: {values}, layer};
}

const CHARTS = {
  loss, accuracy, parts, time, reliability,
  lr: () => curve(rows("lr"), "learning rate"),
  norm: () => curve(rows("grad_norm"), "gradient norm", {zero: true}),
  throughput: () => curve(rows("images_per_second"), "images/s", {zero: true}),
  wait: () => curve(rows("wait", 100), "waiting for data, % of a step", {zero: true}),
  center: () => probability("center"),
  positive: () => probability("positive"),
  classes: () => classes("accuracy", "top-1 accuracy, %", {domain: [0, 100]}),
  sizes: () => classes("count", "images", {type: "log", domainMin: 1}),
};

let views = [];
function draw() {
  views.forEach(view => view.finalize());
  views = [...document.querySelectorAll("[data-chart]")].map(place => {
    const {renderer = "svg", ...spec} = CHARTS[place.dataset.chart]();
    const compiled = charts.compile({width: "container", height: 200, autosize: {type: "fit", contains: "padding"},
      description: place.getAttribute("aria-label"), ...spec}, {config: config()});
    const view = new charts.View(charts.parse(compiled.spec, null, {ast: true}), {expr: charts.expressionInterpreter, renderer,
      container: place, hover: true, tooltip: new charts.Handler({theme: dark.matches ? "dark" : "light"}).call});
    view.runAsync();
    return view;
  });
}
draw();
dark.addEventListener("change", draw);

// Only the rows in sight are elements: thousands of classes scroll as ten do. #q=WORD in the address searches at once.
const list = document.getElementById("class-list");
if (list) {
  const [search, order, count] = ["class-search", "class-order", "class-count"].map(id => document.getElementById(id));
  const ROW = 34, all = data.classes.map((row, place) => [...row, place]);
  const inner = list.firstElementChild;
  let shown = all;
  const cell = (row, kind, text) => row.appendChild(Object.assign(document.createElement("span"), {className: kind, textContent: text}));
  function rowOf(at) {
    const [name, images, shot, accuracy] = shown[at];
    const row = Object.assign(document.createElement("div"), {className: "class-row " + SHOTS[shot], title: name});
    row.setAttribute("role", "listitem");
    row.setAttribute("aria-posinset", at + 1);
    row.setAttribute("aria-setsize", shown.length);
    row.style.top = at * ROW + "px";
    cell(row, "dot", "");
    cell(row, "class-name", name);
    cell(row, "class-shot", named(SHOTS[shot]));
    cell(row, "class-images", images.toLocaleString("en"));
    const bar = cell(row, "class-bar", "");
    cell(bar, "class-filled", "").style.width = 100 * (accuracy || 0) + "%";
    cell(row, "class-accuracy", accuracy === null ? "-" : (100 * accuracy).toFixed(1));
    return row;
  }
  function scroll() {
    const first = Math.max(Math.floor(list.scrollTop / ROW) - 5, 0);
    const last = Math.min(first + Math.ceil(list.clientHeight / ROW) + 10, shown.length);
    inner.replaceChildren(...Array.from({length: last - first}, (_, n) => rowOf(first + n)));
  }
  const orders = {size: (a, b) => a[4] - b[4], worst: (a, b) => (a[3] ?? 2) - (b[3] ?? 2) || a[4] - b[4],
    best: (a, b) => (b[3] ?? -1) - (a[3] ?? -1) || a[4] - b[4], name: (a, b) => a[0].localeCompare(b[0])};
  function select() {
    const word = search.value.toLowerCase();
    shown = all.filter(row => row[0].toLowerCase().includes(word)).sort(orders[order.value]);
    inner.style.height = shown.length * ROW + "px";
    count.textContent = `${shown.length.toLocaleString("en")} of ${all.length.toLocaleString("en")}`;
    list.scrollTop = 0;
    scroll();
  }
  list.addEventListener("scroll", scroll, {passive: true});
  addEventListener("resize", scroll);
  search.addEventListener("input", select);
  order.addEventListener("change", select);
  const asked = () => { search.value = new URLSearchParams(location.hash.slice(1)).get("q") || ""; select(); };
  addEventListener("hashchange", asked);
  asked();
}
})();
