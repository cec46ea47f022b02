/** Who draws what: each expert's weight over time, as a strip of areas, a legend and a table. */

import { el, svg } from "./dom.js";

const COLOURS = 8; // of experts; the classes e0 to e7 in studio.css
const OTHERS = "e-others";

/**
 * The classes of experts by name: the heaviest ones have a colour of their own.
 * @param {Array<{experts: string[], weights: number[][]}>} traces
 */
export function classesOf(traces) {
  const totals = new Map();
  for (const { experts, weights } of traces) {
    const means = meansOf(weights, experts.length);
    experts.forEach((name, i) => totals.set(name, (totals.get(name) ?? 0) + means[i]));
  }
  const names = [...totals.keys()];
  const heaviest = [...names].sort((a, b) => totals.get(b) - totals.get(a));
  const coloured = names.length <= COLOURS ? names : names.filter((name) => heaviest.indexOf(name) < COLOURS - 1);
  return new Map(names.map((name) => [name, coloured.includes(name) ? `e${coloured.indexOf(name)}` : OTHERS]));
}

/** Each expert's mean weight. */
export function meansOf(weights, count) {
  const sums = new Array(count).fill(0);
  for (const row of weights) row.forEach((weight, i) => (sums[i] += weight));
  return sums.map((sum) => sum / Math.max(1, weights.length));
}

const percent = (weight) => `${Math.round(100 * weight)} %`;

/** The mean weights in words, the heaviest first. */
export function inWords({ experts, weights }) {
  const means = meansOf(weights, experts.length);
  const order = experts.map((_, i) => i).filter((i) => means[i] >= 0.005);
  order.sort((a, b) => means[b] - means[a]);
  return order.map((i) => `${experts[i]} ${percent(means[i])}`).join(", ");
}

/** The areas of all experts over time, stacked; 1 unit per evaluation and 1 for all weight. */
export function stripOf({ experts, weights }, classes) {
  const areas = svg("svg", { viewBox: `0 0 ${weights.length} 1`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const floor = weights.map(() => 0);
  experts.forEach((name, i) => {
    const top = weights.map((row, v) => Math.min(1, floor[v] + row[i]));
    if (top.some((value, v) => value > floor[v])) {
      const path = areaPath(floor, top);
      areas.append(svg("path", { d: path, class: `area ${classes.get(name)}`, "vector-effect": "non-scaling-stroke" }));
    }
    top.forEach((value, v) => (floor[v] = value));
  });
  return areas;
}

/** The outline between two staircases. */
function areaPath(low, high) {
  const there = high.map((y, v) => `L${v} ${y}H${v + 1}`).join("");
  const back = low.map((y, v) => `L${v + 1} ${y}H${v}`).reverse().join("");
  return `M0 ${low[0]}${there}${back}Z`;
}

/** The legend's entries: a colour and a name each, and the mean weight over all traces. */
export function legendOf(traces, classes) {
  const entries = [...classes].filter(([, kind]) => kind !== OTHERS);
  const items = entries.map(([name, kind]) => {
    const own = traces.filter(({ experts }) => experts.includes(name));
    const mean = own.reduce((sum, { experts, weights }) => sum + meansOf(weights, experts.length)[experts.indexOf(name)], 0);
    return legendItem(kind, name, percent(mean / own.length));
  });
  const others = classes.size - entries.length;
  if (others) items.push(legendItem(OTHERS, `${others} others`, ""));
  return items;
}

function legendItem(kind, name, weight) {
  return el("li", {}, el("span", { class: `swatch ${kind}`, "aria-hidden": "true" }), `${name} `, el("span", { class: "muted" }, weight));
}

/** The rows of the table: one per evaluation. */
export function tableOf({ experts, weights, times }) {
  const head = el("tr", {}, ...["Evaluation", "Time", ...experts].map((name) => el("th", { scope: "col" }, name)));
  const rows = weights.map((row, v) => {
    const cells = [times[v].toFixed(3), ...row.map((weight) => weight.toFixed(3))];
    return el("tr", {}, el("th", { scope: "row" }, String(v + 1)), ...cells.map((cell) => el("td", {}, cell)));
  });
  return [el("thead", {}, head), el("tbody", {}, ...rows)];
}
