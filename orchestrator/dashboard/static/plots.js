// Plots other than curves: families of jobs, and what a search found. Data comes from the server, colours from the theme.
window.pwPlots = (() => {
  const text = (t) => ({ color: t.ink, fontSize: 12 });
  const box = (t, formatter) => ({ confine: true, backgroundColor: t.raised, borderColor: t.line, textStyle: text(t), formatter });
  const labels = (t, more) => ({ color: t.soft, fontSize: 11, hideOverlap: true, ...more });
  const axis = (t, more) => ({
    axisLabel: labels(t), axisLine: { lineStyle: { color: t.line } }, splitLine: { show: false },
    nameTextStyle: { color: t.soft }, ...more,
  });
  const base = (t) => ({ animation: false, textStyle: { fontFamily: "system-ui, sans-serif", color: t.soft } });
  const bold = (t, one) => `<b>${t.escape(one)}</b>`;

  // nodes: id, name, sub, tone, href, here, x, y (places in a grid); links: source, target, how, text.
  // On hidden axes: a graph's own coordinates are stretched with the window, and its symbols with them.
  function graph(spec, t) {
    const dash = { fork: "solid", weights: "dashed", retry: "dotted" };
    const told = (p) => (p.dataType === "node" ? `${bold(t, p.data.title)}<br>${t.escape(p.data.sub)}` : t.escape(p.data.told));
    const columns = Math.max(...spec.nodes.map((node) => node.x)) + 1;
    const ys = spec.nodes.map((node) => node.y);
    const hidden = { type: "value", show: false };
    return {
      ...base(t),
      tooltip: box(t, told),
      grid: { left: 0, right: 0, top: 8, bottom: 24 },
      xAxis: { ...hidden, min: -0.5, max: columns - 0.5 },
      yAxis: { ...hidden, min: Math.min(...ys) - 0.5, max: Math.max(...ys) + 0.5, inverse: true },
      series: [{
        type: "graph", coordinateSystem: "cartesian2d", cursor: "pointer",
        edgeSymbol: ["none", "arrow"], edgeSymbolSize: 8, symbol: "circle", symbolSize: 16,
        data: spec.nodes.map((node) => ({
          id: node.id, name: node.id, title: node.name, sub: node.sub, href: node.href, value: [node.x, node.y],
          itemStyle: { color: t.tone(node.tone), borderColor: node.here ? t.ink : "transparent", borderWidth: 3 },
          label: {
            show: true, position: "bottom", color: t.ink, fontSize: 12, fontWeight: node.here ? 700 : 400,
            formatter: () => node.name, width: Math.min(200, t.width / columns - 8), overflow: "truncate",
          },
        })),
        links: spec.links.map((link) => ({
          source: link.source, target: link.target, told: link.text,
          lineStyle: { color: t.soft, width: 1.6, type: dash[link.how], curveness: 0.06 },
        })),
      }],
    };
  }

  // axes: name, options (of choices) or log; rows: name, href, values in the order of the axes, good (0 to 1, the best)
  function parallel(spec, t) {
    const shown = (value) => (typeof value === "number" ? t.number(value) : (value ?? "–"));
    const told = (p) => [bold(t, p.data.name), ...spec.axes.map((one, i) => `${t.escape(one.name)} ${bold(t, shown(p.data.value[i]))}`)].join("<br>");
    const line = (good) => ({
      width: good === 1 ? 3.5 : 1.6, opacity: 0.3 + 0.7 * good, color: good === 1 ? t.colours[1] : t.colours[0],
    });
    return {
      ...base(t),
      tooltip: box(t, told),
      parallel: { left: 48, right: 80, top: 40, bottom: 24 },
      parallelAxis: spec.axes.map((one, dim) => axis(t, {
        dim, name: one.name, nameLocation: "end", nameGap: 14,
        ...(one.options ? { type: "category", data: one.options } : { type: one.log ? "log" : "value", scale: true }),
        axisLabel: labels(t, { formatter: shown, textBorderColor: t.surface, textBorderWidth: 4 }),
      })),
      series: [{
        type: "parallel", cursor: "pointer", emphasis: { lineStyle: { width: 4, opacity: 1 } },
        data: spec.rows.map((row) => ({ value: row.values, name: row.name, href: row.href, lineStyle: line(row.good) })),
      }],
    };
  }

  // points: x, y, name, href; best: the best so far, [x, y] each
  function history(spec, t) {
    const format = t.formats[spec.unit] ?? t.number;
    return {
      ...base(t),
      grid: { left: 8, right: 16, top: 34, bottom: 4, containLabel: true },
      legend: { top: 0, left: 0, textStyle: text(t), itemHeight: 8 },
      tooltip: box(t, (p) => (p.data.name ? `${bold(t, p.data.name)}<br>${t.escape(format(p.value[1]))}` : "")),
      xAxis: axis(t, { type: "value", minInterval: 1, min: 0 }),
      yAxis: axis(t, { type: "value", scale: true, splitLine: { lineStyle: { color: t.line } }, axisLabel: labels(t, { formatter: format }) }),
      series: [
        { type: "line", name: "Best so far", step: "end", symbol: "none", color: t.colours[1], lineStyle: { width: 1.8 }, data: spec.best },
        {
          type: "scatter", name: "Trial", symbolSize: 9, color: t.colours[0], cursor: "pointer",
          data: spec.points.map((p) => ({ value: [p.x, p.y], name: p.name, href: p.href })),
        },
      ],
    };
  }

  // rows: name, value; the largest last, which is drawn on top
  function bars(spec, t) {
    return {
      ...base(t),
      grid: { left: 8, right: 56, top: 8, bottom: 4, containLabel: true },
      xAxis: axis(t, { type: "value", min: 0, splitLine: { lineStyle: { color: t.line } } }),
      yAxis: axis(t, { type: "category", data: spec.rows.map((row) => row.name), axisLabel: { color: t.ink, fontSize: 12 } }),
      series: [{
        type: "bar", color: t.colours[0], barMaxWidth: 22, data: spec.rows.map((row) => row.value),
        label: { show: true, position: "right", color: t.ink, formatter: (p) => t.number(p.value) },
      }],
    };
  }

  return { graph, parallel, history, bars };
})();
