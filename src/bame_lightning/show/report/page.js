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

  // Colours by powers of ten; what is told stays as it is.
  function coloured(trace) {
    if (!trace.logarithmic) return {};
    const powers = trace.z.map((row) => row.map((value) => (value > 0 ? Math.log10(value) : null)));
    const high = Math.log10(trace.zmax), low = Math.floor(Math.min(high - 1, ...powers.flat().filter((power) => power !== null)));
    const ticks = Array.from({ length: Math.floor(high) - low + 1 }, (_, i) => low + i);
    const percent = (power) => `${Number((100 * 10 ** power).toPrecision(3))}%`;
    return {
      z: powers, zmin: low, zmax: high, customdata: trace.z, hovertemplate: trace.hovertemplate.replace("%{z:", "%{customdata:"),
      colorbar: { ...trace.colorbar, tickvals: ticks, ticktext: ticks.map(percent) },
    };
  }

  function draw(figure) {
    const data = figure.data.map((trace) =>
      trace.rownames ? { ...trace, text: trace.z.map((row, i) => row.map(() => trace.rownames[i])), ...coloured(trace) } : { ...trace }
    );
    const own = { ...figure.layout };
    if (own.yaxis && own.yaxis.type === "log") // zero lies infinitely far down: a gap
      for (const trace of data) if (trace.type === "scatter") trace.y = trace.y.map((value) => (value > 0 ? value : null));
    if (data.some((trace) => trace.type !== "scatter")) own.hovermode = "closest";
    const heat = data.find((trace) => trace.rownames);
    if (heat && narrow()) {
      // Beneath, where a phone has room for it.
      own.height += 50;
      own.margin = { l: 56, r: 10, t: 26, b: 98 };
      heat.colorbar = { ...heat.colorbar, orientation: "h", len: 1, y: -58 / (own.height - 124), yanchor: "top", nticks: 5 };
    }
    own.showlegend = data.filter((trace) => trace.type === "scatter" && trace.showlegend !== false).length > 1;
    if (own.tall && narrow()) own.height += own.tall; // room for a legend of several lines
    delete own.tall;
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

    function legend(id, entries) {
      byId(id).replaceChildren(...entries.map(({ label, colour }) => {
        const item = document.createElement("span"), box = document.createElement("i");
        box.style.background = colour;
        item.append(box, label);
        return item;
      }));
    }

    // The same for all maps of a layer, so that a block lies below its positions.
    function mapLayout(id, [rows, columns], every) {
      const width = Math.max(1, byId(id).clientWidth) / columns;
      const across = ticks(columns, every, narrow() ? 5 : 9), down = ticks(rows, 1, 6);
      const bare = { showgrid: false, zeroline: false };
      return layoutOf({
        height: Math.round(Math.min(narrow() ? 320 : 440, Math.max(200, 90 + rows * Math.min(14, width * 1.6)))),
        hovermode: "closest",
        margin: { l: 50, r: 10, t: 8, b: 40 },
        xaxis: { ...bare, title: { text: "input position" }, tickvals: across, range: [-0.5, columns - 0.5] },
        yaxis: { ...bare, title: { text: "filter" }, tickvals: down, range: [rows - 0.5, -0.5] },
      });
    }

    function borders({ shape: [rows, columns], m }) {
      const shapes = [];
      for (let at = m; at < columns && columns / m <= 40; at += m)
        shapes.push({ type: "line", x0: at - 0.5, x1: at - 0.5, y0: -0.5, y1: rows - 0.5, line: { width: 1, color: "#999" } });
      return shapes;
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
      const layout = { ...mapLayout("mask-map", layer.shape, layer.m), shapes: borders(layer) };
      legend("mask-legend", found.changes);
      byId("mask-title").textContent = layer.title;
      byId("mask-note").textContent =
        `Here ${tally[3].toLocaleString("en")} of ${(tally[2] + tally[3]).toLocaleString("en")} kept weights were kept at first, too.`;
      return Plotly.react("mask-map", data, layout, config);
    }

    function drawBlocks(name, layer, time, colours, entries, told, note) {
      byId(`${name}-plot`).hidden = !layer[name];
      if (!layer[name]) return Promise.resolve();
      const now = layer[name][time];
      legend(`${name}-legend`, entries);
      byId(`${name}-note`).textContent = note;
      const data = [{
        type: "heatmap", z: now, x0: (layer.m - 1) / 2, dx: layer.m, zmin: 0, zmax: colours.top, colorscale: colours.scale, showscale: false,
        text: now.map((row, r) => row.map((value, c) => `filter ${r}, positions ${c * layer.m} to ${(c + 1) * layer.m - 1}: ${told(value)}`)),
        hovertemplate: "%{text}<extra></extra>",
      }];
      return Plotly.react(`${name}-map`, data, { ...mapLayout(`${name}-map`, layer.shape, layer.m), shapes: borders(layer) }, config);
    }

    // Zero is pale, one is already coloured; one scale for all times, so that colours can be compared.
    function countColours(layer) {
      const { nothing, counts } = found.colours, top = Math.max(1, ...(layer.oscillations || []).flat(2)), zero = 0.5 / top;
      const stops = counts.map((colour, i) => [zero + (1 - zero) * i / (counts.length - 1), colour]);
      const shown = [...new Set([1, Math.ceil(top / 2), top])];
      const at = (count) => counts[Math.round((counts.length - 1) * (count / top - zero) / (1 - zero))];
      const entries = [{ label: "never", colour: nothing }, ...shown.map((count) => ({ label: `${count} ${count === 1 ? "time" : "times"}`, colour: at(count) }))];
      return { top, scale: [[0, nothing], [zero, nothing], ...stops], entries };
    }

    function show() {
      const layer = found.layers[Number(choice.value)], time = Number(slider.value), { nothing, frozen } = found.colours;
      byId("map-when").textContent = when(time);
      const colours = countColours(layer);
      const cold = layer.frozen ? layer.frozen[time].flat() : [];
      return Promise.all([
        drawMask(layer, time),
        drawBlocks("oscillations", layer, time, colours, colours.entries, (count) => `${count} oscillations`, layer.told ? layer.told[time] : ""),
        drawBlocks("frozen", layer, time, { top: 1, scale: [[0, nothing], [1, frozen]] },
          [{ label: "may change", colour: nothing }, { label: "frozen", colour: frozen }],
          (value) => (value ? "frozen" : "may change"),
          `Here ${cold.filter(Boolean).length.toLocaleString("en")} of ${cold.length.toLocaleString("en")} blocks are frozen.`),
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

  // A table that is wider than the page says so until its end has been seen.
  for (const table of document.querySelectorAll(".scroll")) {
    const hint = table.nextElementSibling;
    const look = () => (hint.hidden = table.scrollLeft + table.clientWidth >= table.scrollWidth - 2);
    table.addEventListener("scroll", look);
    window.addEventListener("resize", look);
    look();
  }

  Promise.all([...report.figures.map(draw), report.maps ? maps(report.maps) : null]).then(() => {
    document.body.dataset.drawn = String(document.querySelectorAll(".drawing.js-plotly-plot").length);
  });
})();
