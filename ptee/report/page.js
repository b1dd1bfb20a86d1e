"use strict";
(async () => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures"), slider = read("slider");
  const root = document.documentElement;

  async function load() {  // plotly.js, which the page holds compressed
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  function fit(layout, data) {  // on a phone a legend is a list: below the figure, which grows for it
    const names = data.filter((line) => line.name && line.showlegend !== false).length;
    if (layout.showlegend === false || names < 4) return;
    const [plot, title, line] = [300, 64, 20];
    layout.margin = {...layout.margin, b: title + line * names};
    layout.height = layout.margin.t + plot + layout.margin.b;
    layout.legend = {...layout.legend, y: -title / plot, maxheight: 0.9, itemwidth: 30};
  }

  function draw(width) {  // in the colours of the page, which may be dark, light or printed
    const style = getComputedStyle(root);
    for (const [key, figure] of Object.entries(figures)) {
      const layout = structuredClone(figure.layout);
      layout.font.color = style.getPropertyValue("--text").trim();
      layout.hoverlabel = {...layout.hoverlabel, bgcolor: style.getPropertyValue("--box").trim(), font: {color: layout.font.color}};
      if (width) Object.assign(layout, {width, height: Math.min(layout.height, 440)});  // two on a sheet of paper
      const place = document.getElementById("figure-" + key);
      if (place.clientWidth < 600 && !layout.yaxis2) fit(layout, figure.data);
      Plotly.react(place, structuredClone(figure.data), layout, {responsive: true, displaylogo: false,
        modeBarButtonsToRemove: ["lasso2d", "select2d"], toImageButtonOptions: {format: "svg", filename: key}});
    }
    move(at);
  }

  let at = slider ? slider.words.length - 1 : 0;  // the last place is the run's own thresholds
  function move(step) {
    at = step;
    if (!slider) return;
    document.getElementById("said").textContent = slider.words[step];
    document.getElementById("typed").textContent = slider.commands[step];
    for (const {figure, trace, x, y} of slider.moves) {
      const place = document.getElementById("figure-" + figure);
      const line = trace < 0 ? place.data.length + trace : trace;
      Plotly.restyle(place, {...(x && {x: [x[step]]}), ...(y && {y: [y[step]]})}, [line]);
    }
  }

  if (typeof DecompressionStream === "undefined") {
    document.getElementById("old").hidden = false;
    return;
  }
  await load();
  draw();
  if (slider) {
    const range = document.getElementById("t");
    range.addEventListener("input", () => move(Number(range.value)));
    document.getElementById("own").addEventListener("click", () => { range.value = slider.start; move(slider.words.length - 1); });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => { document.querySelectorAll("details").forEach((d) => { d.open = true; }); draw(680); });
  addEventListener("afterprint", () => draw());
  root.dataset.drawn = "yes";
})();
