// Draws the charts of a report by uPlot, hides and shows runs, and asks the server of a live page whether a run went on.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const charts = new Map(); // drawn charts by their element
  const hidden = new Set(JSON.parse(remembered("hidden") || "[]"));
  const HEIGHT = 270, POLL = 4000, FONT = "12px system-ui, Helvetica, Arial, sans-serif", SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹";

  function remembered(key) { try { return sessionStorage.getItem(location.pathname + key); } catch { return null; } }
  function remember(key, value) { try { sessionStorage.setItem(location.pathname + key, value); } catch { /* private */ } }

  const style = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const rgb = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));

  // A name of report.css, or the color of a moment between early and late.
  function color(name) {
    if (!name.startsWith("time")) return style(name);
    const share = +name.slice(4) * 2, ends = ["early", "middle", "late"].map(end => rgb(style(end)));
    const i = Math.min(Math.floor(share), 1);
    return `rgb(${ends[i].map((v, k) => Math.round(v + (ends[i + 1][k] - v) * (share - i))).join()})`;
  }

  function number(value, axis) {
    if (value == null) return "–";
    if (axis.percent) return `${+(100 * value).toPrecision(4)} %`;
    const size = Math.abs(value);
    if (value && (size < 1e-3 || size >= 1e6)) {
      const power = Math.floor(Math.log10(size) + 1e-9), factor = +(value / 10 ** power).toPrecision(3);
      const digits = [...String(Math.abs(power))].map(d => SUPERSCRIPT[d]).join("");
      return `${factor === 1 ? "" : `${factor}·`}10${power < 0 ? "⁻" : ""}${digits}`;
    }
    return (+value.toPrecision(5)).toLocaleString("en", { maximumFractionDigits: 12 }).replace("-", "−");
  }

  // Series of different places share one list of places: where a series has no value it is undefined and its line goes on;
  // null is a gap. A band is two more series that have no line of their own.
  function aligned(chart) {
    const columns = [];
    for (const line of chart.lines) {
      columns.push({ line, kind: "y" });
      if (line.low) columns.push({ line, kind: "low" }, { line, kind: "high" });
    }
    return { columns, values: columns.length ? uPlot.join(columns.map(c => [c.line.x, c.line[c.kind]])) : [[]] };
  }

  function range(axis, low, high) {
    for (const v of axis.limits) if (!axis.log || v > 0) { low = Math.min(low ?? v, v); high = Math.max(high ?? v, v); }
    if (low == null) return axis.log ? [1, 10] : [0, 1];
    if (axis.log) return high > low ? [low / 1.1, high * 1.1] : [low / 2, high * 2];
    const pad = (high - low) * 0.05 || Math.abs(low) * 0.1 || 1;
    return [axis.limits.includes(low) ? low : low - pad, high + pad];
  }

  const extent = (lists, floor) => {
    let low = null, high = null;
    for (const list of lists) for (const v of list) if (v != null && (!floor || v > 0)) {
      low = low == null ? v : Math.min(low, v); high = high == null ? v : Math.max(high, v);
    }
    return [low, high];
  };

  // Ticks of a logarithmic axis: powers of ten, with 2 and 5 between them where there are few.
  function decades(low, high) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), found = [];
    const factors = high < 200 * low ? [1, 2, 5] : [1], every = Math.ceil((last - first) / 7);
    for (let n = first; n <= last; n += every) for (const m of factors) found.push(+`${m}e${n}`);
    const inside = found.filter(v => v >= low && v <= high);
    return inside.length > 1 ? inside : [low, high];
  }

  // Words on the canvas with a halo of the page's color.
  function write(u, text, x, y, ink, turned) {
    const c = u.ctx;
    c.save();
    c.font = FONT.replace("12", String(Math.round(11 * devicePixelRatio)));
    c.translate(x, y);
    if (turned) c.rotate(-Math.PI / 2);
    c.textAlign = "left"; c.textBaseline = "alphabetic";
    c.lineWidth = 3 * devicePixelRatio; c.strokeStyle = style("halo"); c.lineJoin = "round"; c.fillStyle = ink;
    c.strokeText(text, 0, 0); c.fillText(text, 0, 0);
    c.restore();
  }

  function stroke(u, ink, dash, from, to) {
    const c = u.ctx;
    c.save(); c.beginPath(); c.strokeStyle = ink; c.lineWidth = devicePixelRatio; c.setLineDash(dash.map(d => d * devicePixelRatio));
    c.moveTo(...from); c.lineTo(...to); c.stroke(); c.restore();
  }

  // Dashed values to compare with, and moments of alarms with their words, which move aside rather than overlap.
  function annotate(u, chart) {
    const { left, top, width, height } = u.bbox, ratio = devicePixelRatio, places = [];
    u.ctx.save(); u.ctx.beginPath(); u.ctx.rect(left, top, width, height); u.ctx.clip();
    for (const level of [...chart.levels].sort((a, b) => b.y - a.y)) {
      if (chart.y.log && level.y <= 0) continue;
      const y = u.valToPos(level.y, "y", true);
      stroke(u, style("muted"), [4, 4], [left, y], [left + width, y]);
      let at = Math.max(y - 4 * ratio, top + 12 * ratio);
      while (places.some(p => Math.abs(p - at) < 13 * ratio)) at += 13 * ratio;
      places.push(at);
      write(u, level.label, left + 6 * ratio, at, style("muted"));
    }
    let next = -Infinity;
    const marks = chart.marks.filter(m => !hidden.has(m.run) && m.x >= u.scales.x.min && m.x <= u.scales.x.max);
    for (const mark of marks.sort((a, b) => a.x - b.x)) {
      const x = u.valToPos(mark.x, "x", true), at = Math.max(x + 11 * ratio, next + 12 * ratio);
      next = at;
      stroke(u, color(mark.color), [1, 3], [x, top], [x, top + height]);
      write(u, mark.label, Math.min(at, left + width - 2 * ratio), top + height - 5 * ratio, color(mark.color), true);
    }
    u.ctx.restore();
  }

  // Index of the value nearest to the pointer of each series, whose places differ.
  function nearest(u, series, at) {
    const x = u.data[0], y = u.data[series];
    if (series === 0 || y[at] != null) return at;
    let back = at, on = at;
    while (back >= 0 && y[back] == null) back--;
    while (on < y.length && y[on] == null) on++;
    if (back < 0) return on < y.length ? on : at;
    return on >= y.length || x[at] - x[back] <= x[on] - x[at] ? back : on;
  }

  function options(chart, columns, width) {
    const ink = style("ink"), grid = { stroke: style("grid"), width: 1 }, bands = [];
    const lists = ["y", "low", "high"].map(kind => chart.lines.map(line => line[kind] || []));
    const up = range(chart.y, ...extent([...lists.flat(), chart.levels.map(l => l.y)], chart.y.log));
    const across = range(chart.x, ...extent(chart.lines.map(line => line.x), chart.x.log));
    if (!chart.x.log) across[1] = Math.max(...chart.x.limits, ...chart.lines.flatMap(line => line.x.slice(-1))) || 1;
    const series = columns.map(({ line, kind }, i) => {
      const own = color(line.color), few = line.x.length <= 12;
      if (kind === "low") bands.push({ series: [i + 2, i + 1], fill: own.replace(/^rgb\((.*)\)$/, "rgba($1,.18)").replace(/^#(...)$/, (_, h) => `#${[...h].map(c => c + c).join("")}`).replace(/^(#.{6})$/, "$12e") });
      return kind === "y"
        ? { label: line.label, stroke: own, width: 1.8, dash: line.dash ? line.dash.split(" ").map(Number) : [],
            points: { show: few, size: 5, fill: own }, show: !hidden.has(line.run), value: (_, v) => number(v, chart.y) }
        : { label: `${line.label}, ${kind}`, stroke: "transparent", width: 0, points: { show: false },
            show: !hidden.has(line.run), value: (_, v) => number(v, chart.y) };
    });
    // Once zoomed, the selection and the values in it are what is shown; until then all data and what must be on the axis.
    const shown = (spec, whole) => (u, low, high) => (u.zoomed && low != null ? range({ ...spec, limits: [] }, low, high) : whole);
    const axis = (spec, size) => ({
      label: spec.label || null, labelSize: spec.label ? 20 : 0, font: FONT, labelFont: FONT, stroke: ink, grid, ticks: grid, size,
      values: (_, ticks) => ticks.map(v => (v == null ? "" : number(v, spec))),
      ...(spec.log ? { splits: (u, i, low, high) => decades(low, high), filter: (u, ticks) => ticks } : {}),
    });
    return {
      width, height: HEIGHT, series: [{ label: chart.x.label || "at", value: (_, v) => number(v, chart.x) }, ...series], bands,
      scales: {
        x: { time: false, distr: chart.x.log ? 3 : 1, range: (u, low, high) => (u.zoomed ? [low, high] : across) },
        y: { distr: chart.y.log ? 3 : 1, range: shown(chart.y, up) },
      },
      axes: [axis(chart.x, 34), axis(chart.y, 64)],
      cursor: { dataIdx: nearest, points: { size: 6 }, drag: { x: true, y: false } },
      legend: { live: true },
      hooks: {
        setSelect: [u => { u.zoomed = u.select.width > 0 || u.zoomed; }],
        draw: [u => annotate(u, chart)],
        ready: [u => u.over.addEventListener("dblclick", () => { u.zoomed = false; u.setScale("x", { min: across[0], max: across[1] }); })],
      },
    };
  }

  function draw(element) {
    charts.get(element)?.destroy();
    const chart = data.charts[element.dataset.chart], { columns, values } = aligned(chart);
    const drawn = new uPlot(options(chart, columns, element.clientWidth), values, element);
    charts.set(element, drawn);
    // The legend names lines, not the two ends of their bands.
    drawn.root.querySelectorAll(".u-legend .u-series").forEach((row, i) => { if (i && columns[i - 1].kind !== "y") row.style.display = "none"; });
    element.dataset.drawn = "";
  }

  // Charts of the first screen are drawn at once, folded ones when they come into sight, and all of them anew at another width.
  const sees = new IntersectionObserver(entries => {
    for (const { isIntersecting, target } of entries) if (isIntersecting && !charts.has(target) && target.clientWidth) draw(target);
  }, { rootMargin: "300px" });
  const widths = new ResizeObserver(entries => {
    for (const { target } of entries) if (charts.has(target) && target.clientWidth && target.clientWidth !== charts.get(target).width) draw(target);
  });
  const elements = [...document.querySelectorAll(".chart")];
  function redraw() {
    for (const element of charts.keys()) if (element.clientWidth) draw(element);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  function show() {
    document.querySelectorAll("[data-switch]").forEach(b => b.setAttribute("aria-pressed", String(!hidden.has(+b.dataset.switch))));
    document.querySelectorAll("figure[data-run]").forEach(f => { f.hidden = hidden.has(+f.dataset.run); });
    document.querySelectorAll(".runs tbody").forEach(body => [...body.rows].forEach((row, i) => { row.hidden = hidden.has(i); }));
  }
  document.querySelectorAll("[data-switch]").forEach(button => button.addEventListener("click", () => {
    const run = +button.dataset.switch;
    hidden.has(run) ? hidden.delete(run) : hidden.add(run);
    remember("hidden", JSON.stringify([...hidden]));
    show(); redraw();
  }));
  show();
  for (const element of elements) {
    if (!element.closest("details") && element.clientWidth) draw(element);
    sees.observe(element);
    widths.observe(element);
  }

  // What was unfolded stays so when a live page loads itself again.
  const folds = [...document.querySelectorAll("details")], opened = JSON.parse(remembered("opened") || "null");
  folds.forEach((fold, i) => {
    if (opened) fold.open = opened.includes(i);
    fold.addEventListener("toggle", () => remember("opened", JSON.stringify(folds.flatMap((f, k) => (f.open ? [k] : [])))));
  });

  async function poll() {
    try { if (await (await fetch("stamp")).text() !== data.stamp) return location.reload(); } catch { /* the server ended; it may come back */ }
    setTimeout(poll, POLL);
  }
  if (data.stamp) setTimeout(poll, POLL);
})();
