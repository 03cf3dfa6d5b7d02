// What every page needs in the browser: times that pass without the server, the theme, charts in its colours, copying.
window.pw = (() => {
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  function span(seconds) {
    seconds = Math.max(0, Math.round(seconds));
    const at = units.findIndex(([size]) => seconds >= size);
    if (at < 0) return "0 s";
    const [size, unit] = units[at];
    const whole = Math.floor(seconds / size);
    const next = units[at + 1];
    if (at === 0 || at === 1) return `${whole} ${unit} ${Math.floor((seconds % size) / next[0])} ${next[1]}`;
    return `${whole} ${unit}`;
  }
  function ago(iso) {
    const seconds = (Date.now() - Date.parse(iso)) / 1000;
    if (seconds < 5) return "just now";
    if (seconds > 7 * 86400) return iso.slice(0, 10);
    return `${span(seconds)} ago`.replace(/ 0 (min|h)/, "");
  }
  function tick() {
    for (const element of document.querySelectorAll("time[data-ago]")) {
      const text = ago(element.dateTime);
      if (element.textContent !== text) element.textContent = text;
    }
    for (const element of document.querySelectorAll("time[data-since]")) {
      const text = span((Date.now() - Date.parse(element.dateTime)) / 1000);
      if (element.textContent !== text) element.textContent = text;
    }
  }
  setInterval(tick, 1000);
  const style = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();
  function cookie(value) {
    document.cookie = `patchwork_theme=${value};path=/dashboard;max-age=31536000;samesite=lax`;
  }
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }
  function number(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(2);
    if (size >= 1000) return value.toLocaleString("en-US", { maximumFractionDigits: 0 });
    return String(+value.toPrecision(4));
  }
  const percent = (value) => (value === null || value === undefined ? "–" : `${+(100 * value).toPrecision(4)} %`);
  // -- charts: data comes from the server, colours from the theme --
  const light = ["#2450d8", "#c2500b", "#13805a", "#9a2f9e", "#8f6a00", "#0b7f8f", "#c22a3a", "#6a4be0", "#55606e", "#7a4a1e"];
  const dark = ["#8fb0ff", "#ff9d5c", "#63d2a1", "#e08be6", "#e2c044", "#5fd0de", "#ff8f9b", "#b3a1ff", "#a3adba", "#d3a071"];
  const dashes = ["solid", "dashed", "dotted"];
  const charts = new Map();
  const escape = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const formats = {
    number,
    percent,
    seconds: (value) => (value === null || value === undefined ? "–" : value < 1 ? `${number(value * 1000)} ms` : `${number(value)} s`),
  };
  const axes = { step: "step", seconds: "time", images: "images seen" };
  const xText = (x, value) => (x === "seconds" ? span(value) : number(value));
  function smooth(values, weight) {
    if (!weight) return values;
    let last = 0, norm = 0;
    return values.map((value) => {
      if (value === null) return null;
      last = last * weight + value * (1 - weight);
      norm = norm * weight + (1 - weight);
      return last / norm;
    });
  }
  function lines(spec, colours) {
    const found = [];
    spec.series.forEach((one, order) => {
      const place = one.place ?? order;
      const color = colours[place % colours.length];
      const dash = dashes[Math.floor(place / colours.length) % dashes.length];
      const xs = one[spec.x] ?? one.steps;
      const weight = spec.smooth ?? 0;
      if (one.lows && !weight && !spec.log) {
        const band = { type: "line", stack: `band-${order}`, stackStrategy: "all", symbol: "none", silent: true, lineStyle: { opacity: 0 }, name: "", z: 1 };
        found.push({ ...band, data: xs.map((x, i) => [x, one.lows[i]]) });
        found.push({ ...band, data: xs.map((x, i) => [x, one.lows[i] === null ? null : one.highs[i] - one.lows[i]]), areaStyle: { color, opacity: 0.14 } });
      }
      const values = smooth(one.values, weight).map((value) => (spec.log && !(value > 0) ? null : value));
      found.push({
        type: "line", name: one.name, data: xs.map((x, i) => [x, values[i]]), color, z: 2,
        showSymbol: xs.length < 2, symbolSize: 6, symbol: "circle", connectNulls: false,
        lineStyle: { width: 1.8, type: dash }, emphasis: { disabled: true },
      });
    });
    return found;
  }
  function tooltip(spec) {
    const format = formats[spec.unit] ?? number;
    return (params) => {
      const shown = params.filter((p) => p.seriesName !== "" && p.value[1] !== null && p.value[1] !== undefined);
      if (!shown.length) return "";
      const head = `${axes[spec.x]} ${xText(spec.x, shown[0].value[0])}`;
      const rows = shown.slice(0, 20).map((p) => `${p.marker}${escape(p.seriesName)} <b>${escape(format(p.value[1]))}</b>`);
      return [escape(head), ...rows].join("<br>");
    };
  }
  function option(spec, width) {
    if (spec.kind) return window.pwPlots[spec.kind](spec, tools(width));
    const isDark = document.body.classList.contains("body--dark");
    const soft = style("--soft"), line = style("--line"), ink = style("--ink");
    const format = formats[spec.unit] ?? number;
    // Of more than these nobody finds the one they look for; the tooltip names them.
    const legend = spec.series.length > 1 && spec.series.length <= 20;
    return {
      animation: false,
      textStyle: { fontFamily: "system-ui, sans-serif", color: soft },
      grid: { left: 8, right: 16, top: legend ? 34 : 12, bottom: 4, containLabel: true },
      legend: { show: legend, type: "scroll", top: 0, left: 0, icon: "roundRect", itemWidth: 12, itemHeight: 4, textStyle: { color: ink, fontSize: 12, lineHeight: 18 }, pageTextStyle: { color: soft }, pageIconColor: soft, data: spec.series.map((one) => one.name) },
      tooltip: { trigger: "axis", confine: true, backgroundColor: style("--raised"), borderColor: line, textStyle: { color: ink, fontSize: 12 }, formatter: tooltip(spec), axisPointer: { lineStyle: { color: soft } } },
      xAxis: { type: "value", min: "dataMin", max: "dataMax", axisLabel: { color: soft, fontSize: 11, hideOverlap: true, formatter: (value) => xText(spec.x, value) }, axisLine: { lineStyle: { color: line } }, splitLine: { show: false } },
      yAxis: { type: spec.log ? "log" : "value", scale: true, axisLabel: { color: soft, fontSize: 11, hideOverlap: true, formatter: (value) => format(value) }, splitLine: { lineStyle: { color: line } } },
      series: lines(spec, isDark ? dark : light),
    };
  }
  // What plots of other kinds (plots.js) are drawn with.
  function tools(width) {
    const isDark = document.body.classList.contains("body--dark");
    return {
      colours: isDark ? dark : light, soft: style("--soft"), line: style("--line"), ink: style("--ink"),
      width, surface: style("--surface"), raised: style("--raised"), tone: (name) => style(name ? `--${name}` : "--soft"), number, formats, escape,
    };
  }
  function redraw(component) {
    const spec = charts.get(component);
    if (!component.chart || !spec) return;
    component.chart.setOption(option(spec, component.chart.getWidth()), spec.kind ? { notMerge: true } : { replaceMerge: ["series"] });
    component.$el.dataset.points = spec.kind ? spec.size : spec.series.reduce((sum, one) => sum + one.steps.length, 0);
    if (spec.kind && !component.leads) {
      component.leads = true;
      component.chart.on("click", (event) => event.data?.href && location.assign(event.data.href));
    }
  }
  // `changes` may be the whole picture or only what is different of it (smoothing, axes).
  function draw(component, changes) {
    charts.set(component, { x: "step", unit: "number", series: [], ...charts.get(component), ...changes });
    if (component.chart) redraw(component);
    else setTimeout(() => draw(component, {}), 30);
  }
  function drawIn(id, changes, tries = 100) {
    const component = getElement(id);
    if (component) draw(component, changes);
    else if (tries) setTimeout(() => drawIn(id, changes, tries - 1), 30);
  }
  let theme = "";
  new MutationObserver(() => {
    const now = document.body.classList.contains("body--dark") ? "dark" : "light";
    if (now === theme) return;
    theme = now;
    for (const component of charts.keys()) {
      if (component.$el?.isConnected) redraw(component);
      else charts.delete(component);
    }
  }).observe(document.documentElement, { subtree: true, attributes: true, attributeFilter: ["class"] });

  return { ago, span, tick, style, cookie, copy, number, percent, drawIn };
})();
