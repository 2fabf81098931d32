"use strict";
// Draws what the page's JSON holds; sets data-drawn on <body> once all plots are there.
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const narrow = () => window.innerWidth < 760;
  const config = { displaylogo: false, responsive: true, displayModeBar: false };
  const grid = { gridcolor: "#e8e8e8", zerolinecolor: "#d0d0d0", automargin: true, tickfont: { size: 12 } };

  function layoutOf(own) {
    const base = {
      height: 300,
      margin: { l: 56, r: 14, t: 26, b: 48 },
      font: { family: "system-ui, sans-serif", size: 12, color: "#444" },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      legend: { orientation: "h", x: 0, y: 1.0, yanchor: "bottom", font: { size: 12 } },
      hovermode: "x unified",
      dragmode: narrow() ? false : "zoom",
    };
    const layout = { ...base, ...own };
    layout.xaxis = { ...grid, title: { text: "optimizer step", standoff: 8 }, ...own.xaxis };
    for (const key of Object.keys(own)) if (/^yaxis/.test(key)) layout[key] = { ...grid, ...own[key] };
    return layout;
  }

  function draw(figure) {
    const data = figure.data.map((trace) =>
      trace.rownames ? { ...trace, text: trace.z.map((row, i) => row.map(() => trace.rownames[i])) } : trace
    );
    const own = { ...figure.layout };
    if (data.some((trace) => trace.type !== "scatter")) own.hovermode = "closest";
    const heat = data.find((trace) => trace.rownames);
    if (heat && narrow()) {
      // Beneath, where a phone has room for it.
      own.height += 50;
      own.margin = { l: 56, r: 10, t: 26, b: 98 };
      heat.colorbar = { ...heat.colorbar, orientation: "h", len: 1, y: -58 / (own.height - 124), yanchor: "top", nticks: 5 };
    }
    own.showlegend = data.filter((trace) => trace.type === "scatter").length > 1;
    return Plotly.newPlot(figure.name, data, layoutOf(own), config);
  }

  const byId = (id) => document.getElementById(id);

  // Four positions to a hexadecimal digit, the first in its highest bit; rows one after another.
  function unpack(digits, [rows, columns]) {
    const bit = (at) => (parseInt(digits[at >> 2], 16) >> (3 - (at & 3))) & 1;
    return Array.from({ length: rows }, (_, r) => Array.from({ length: columns }, (_, c) => bit(r * columns + c)));
  }

  function maps(found) {
    const slider = byId("map-time"), choice = byId("map-layer"), play = byId("map-play");
    found.layers.forEach((layer, i) => choice.add(new Option(layer.name, i)));
    slider.max = found.steps.length - 1;
    slider.value = slider.max;
    found.changes.forEach(({ label, colour }) => {
      const item = document.createElement("span"), box = document.createElement("i");
      box.style.background = colour;
      item.append(box, label);
      byId("mask-legend").append(item);
    });
    const count = found.changes.length;
    const scale = found.changes.flatMap(({ colour }, i) => [[i / count, colour], [(i + 1) / count, colour]]);

    function when(time) {
      const done = found.adaptations[time], last = found.adaptations[found.adaptations.length - 1];
      const step = `after ${found.steps[time].toLocaleString("en")} steps`;
      return done === null ? step : `${step}, ${done.toLocaleString("en")} of ${last.toLocaleString("en")} adaptations`;
    }

    // At most so many ticks, at multiples of `every` times a power of two.
    function ticks(size, every, most) {
      const values = [];
      let stride = every;
      while (size / stride > most) stride *= 2;
      for (let at = 0; at < size; at += stride) values.push(at);
      return values;
    }

    function mapLayout(id, [rows, columns], every, [high, wide], unit) {
      const width = Math.max(1, byId(id).clientWidth) / columns;
      const across = ticks(columns, every, narrow() ? 5 : 9), down = ticks(rows, 1, 6);
      const bare = { showgrid: false, zeroline: false };
      return layoutOf({
        height: Math.round(Math.min(narrow() ? 320 : 440, Math.max(200, 90 + rows * Math.min(14, width * 1.6)))),
        hovermode: "closest",
        margin: { l: 50, r: 10, t: 8, b: 40 },
        xaxis: { ...bare, title: { text: unit }, tickvals: across, ticktext: across.map((at) => at * wide), range: [-0.5, columns - 0.5] },
        yaxis: { ...bare, title: { text: "filter" }, tickvals: down, ticktext: down.map((at) => at * high), range: [rows - 0.5, -0.5] },
      });
    }

    function drawMask(layer, time) {
      const [rows, columns] = layer.shape;
      const first = unpack(layer.masks[0], layer.shape), now = unpack(layer.masks[time], layer.shape);
      const codes = now.map((row, r) => row.map((kept, c) => first[r][c] + 2 * kept));
      const tally = found.changes.map(() => 0);
      codes.forEach((row) => row.forEach((code) => tally[code]++));
      const data = [{
        type: "heatmap", z: codes, zmin: -0.5, zmax: count - 0.5, colorscale: scale, showscale: false,
        text: codes.map((row) => row.map((code) => found.changes[code].label)),
        hovertemplate: "filter %{y}, position %{x}: %{text}<extra></extra>",
      }];
      const layout = mapLayout("mask-map", layer.shape, layer.m, [1, 1], "input position");
      layout.shapes = [];
      for (let at = layer.m; at < columns && columns / layer.m <= 40; at += layer.m)
        layout.shapes.push({ type: "line", x0: at - 0.5, x1: at - 0.5, y0: -0.5, y1: rows - 0.5, line: { width: 1, color: "#999" } });
      byId("mask-title").textContent = layer.title;
      byId("mask-note").textContent =
        `Here ${tally[3].toLocaleString("en")} of ${(tally[2] + tally[3]).toLocaleString("en")} kept weights were kept at first, too.`;
      return Plotly.react("mask-map", data, layout, config);
    }

    function drawBlocks(name, layer, time, colours, format) {
      const values = layer[name];
      byId(`${name}-plot`).hidden = !values;
      if (!values) return Promise.resolve();
      // One scale for all times, so that colours can be compared.
      const now = values[time], cell = layer[`${name}_cell`], top = Math.max(...values.flat(2)) || 1;
      byId(`${name}-note`).textContent = layer[`${name}_title`];
      const place = (at, size) => (size === 1 ? at : `${at * size} to ${(at + 1) * size - 1}`);
      const data = [{
        type: "heatmap", z: now, zmin: 0, zmax: top, colorscale: colours,
        colorbar: { thickness: 12, outlinewidth: 0, tickformat: format, nticks: 6 },
        text: now.map((row, r) => row.map((_, c) => `filter ${place(r, cell[0])}, block ${place(c, cell[1])}`)),
        hovertemplate: `%{text}: %{z:${format}}<extra></extra>`,
      }];
      const layout = mapLayout(`${name}-map`, [now.length, now[0].length], 1, cell, "block of the filter");
      return Plotly.react(`${name}-map`, data, layout, config);
    }

    function show() {
      const layer = found.layers[Number(choice.value)], time = Number(slider.value);
      byId("map-when").textContent = when(time);
      byId("oscillations-plot").classList.toggle("wide", !layer.frozen);
      return Promise.all([
        drawMask(layer, time),
        drawBlocks("oscillations", layer, time, "Viridis", ".4~g"),
        drawBlocks("frozen", layer, time, [[0, "#F2F2F2"], [1, "#D55E00"]], ".4~%"),
      ]);
    }

    let timer = null;
    function stop() {
      clearInterval(timer);
      timer = null;
      play.textContent = "▶";
      play.setAttribute("aria-label", "Play");
    }
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (slider.value === slider.max) slider.value = 0;
      show();
      play.textContent = "⏸";
      play.setAttribute("aria-label", "Stop");
      timer = setInterval(() => {
        slider.value = Number(slider.value) + 1;
        show();
        if (slider.value === slider.max) stop();
      }, 600);
    });
    slider.addEventListener("input", () => { stop(); show(); });
    choice.addEventListener("change", show);
    return show();
  }

  Promise.all([...report.figures.map(draw), report.maps ? maps(report.maps) : null]).then(() => {
    document.body.dataset.drawn = String(document.querySelectorAll(".drawing.js-plotly-plot").length);
  });
})();
