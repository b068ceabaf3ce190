"use strict";
// The charts, by uPlot, and the start of the page.

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const modelColour = (i) => style(`--model-${i % 6}`);

function axis(more) {
  const line = { stroke: style("--grid"), width: 1 };
  return { stroke: style("--faint"), grid: line, ticks: line, ...more };
}

const exponents = (_, splits) => splits.map((value) => (value === null ? "" : value.toExponential(0)));
const shownValue = (_, value) => (value === null ? "-" : digits(value));

// One chart in a figure whose text says what a reader sees.
function chart(parent, caption, said, options, data) {
  const place = element("div", { role: "img", "aria-label": said });
  parent.append(element("figure", {}, element("figcaption", {}, caption), place));
  const cursor = { y: false, drag: { x: false, y: false } };
  return new uPlot({ legend: { show: false }, cursor, ...options }, data, place);
}

function drawNorms(norms, names) {
  const box = find("norm-charts");
  box.hidden = norms.length === 0;
  const parent = box.querySelector(".charts");
  parent.replaceChildren();
  const key = names.map((name, i) => {
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = modelColour(i);
    return element("span", {}, swatch, name);
  });
  box.querySelector(".key").replaceChildren(...key);
  for (const { block, centres, shares, largest } of norms) {
    const shown = names.filter((name) => name in shares);
    const said = shown.map((name) => `${name} up to ${digits(largest[name])} medians`).join(", ");
    const paths = uPlot.paths.stepped({ align: 1 });
    const lines = shown.map((label) => ({
      label, stroke: modelColour(names.indexOf(label)), width: 1.5, points: { show: false }, paths,
    }));
    // uPlot hands over null for lines of the grid without a label.
    const powers = (_, splits) => splits.map((value) => (value === null || Math.log2(value) % 2 ? "" : digits(value)));
    const options = {
      width: 330, height: 190,
      scales: { x: { time: false, distr: 3, log: 2 }, y: { distr: 3, range: [1e-5, 1] } },
      axes: [axis({ values: powers }), axis({ size: 62, values: exponents })],
      series: [{}, ...lines],
    };
    chart(parent, `after block ${block}: ${said}`, `Norms after block ${block}: ${said}`, options,
      [centres, ...shown.map((name) => shares[name].map((share) => share || 1e-5))]);
  }
}

function drawPercentiles(percentiles) {
  const box = find("percentile-charts");
  const names = Object.keys(percentiles);
  box.hidden = names.length === 0;
  const parent = box.querySelector(".charts");
  parent.replaceChildren();
  if (!names.length) return;
  // Keys that are whole numbers come first in an object; sort all.
  const points = Object.keys(percentiles[names[0]]).sort((a, b) => a - b);
  const data = names.map((name) => points.map((q) => Math.max(1 - percentiles[name][q], 1e-16)));
  const median = points.indexOf("50");
  const figures = (values) => `median ${digits(values[median])}, worst ${digits(values[0])}`;
  const said = names.map((name, i) => `${name}: ${figures(data[i])}`).join("; ");
  const places = points.map((_, i) => i);
  const options = {
    width: 640, height: 240, legend: { show: true },
    scales: { x: { time: false }, y: { distr: 3 } },
    axes: [axis({ splits: () => places, values: () => points.map((q) => `${q} %`) }), axis({ size: 70, values: exponents })],
    series: [
      { label: "percentile", value: (_, i) => (i === null ? "-" : `${points[i]} %`) },
      ...names.map((label, i) => ({ label, stroke: modelColour(i + 1), width: 2, value: shownValue })),
    ],
  };
  const caption = "1 - cosine per patch, by percentile of the patches of all images; the worst patches on the left";
  chart(parent, caption, said, options, [places, ...data]);
}

function drawSensitivity(sensitivity) {
  const box = find("int8");
  const names = Object.keys(sensitivity);
  box.hidden = names.length === 0;
  const parent = box.querySelector(".charts");
  parent.replaceChildren();
  for (const name of names) {
    const layers = sensitivity[name];
    const worst = layers.reduce((a, b) => (b.mean > a.mean ? b : a));
    const said = `the most sensitive of ${layers.length} layers is ${worst.name}, ${digits(worst.mean)}`;
    const places = layers.map((_, i) => i);
    const short = layers.map((layer) => layer.name.replace("blocks.", ""));
    const pick = (float) => layers.map((layer) => ((layer.precision === "float") === float ? layer.mean : null));
    const bars = (label, i) => ({
      label, stroke: modelColour(i), fill: modelColour(i), value: shownValue,
      paths: uPlot.paths.bars({ size: [0.8, 40] }), points: { show: false },
    });
    const options = {
      width: Math.max(480, 22 * layers.length), height: 330, legend: { show: true },
      scales: { x: { time: false, range: [-1, layers.length] } },
      axes: [axis({ splits: () => places, values: () => short, rotate: -90, size: 110 }), axis({ size: 70 })],
      series: [
        { label: "layer", value: (_, i) => layers[i]?.name ?? "-" }, bars("in 8 bits", 1), bars("kept in float", 0),
      ],
    };
    chart(parent, `${name}: gain in mean patch cosine`, `${name}: ${said}`, options, [places, pick(false), pick(true)]);
  }
}

function theme(explored, models) {
  const button = find("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const redraw = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Change to ${dark() ? "light" : "dark"} colours`);
    drawNorms(explored.norms, models);
    drawPercentiles(explored.percentiles);
    drawSensitivity(explored.sensitivity);
  };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    redraw();
  });
  system.addEventListener("change", redraw);
  redraw();
}

const page = JSON.parse(find("data").textContent);
theme(page.charts, page.models ?? []);
window.ready = (async () => {
  if (!page.models) return;
  const { charts, ...maps } = page;
  window.explorer = new Explorer(await unpackAll(maps));
  await window.explorer.start();
})();
