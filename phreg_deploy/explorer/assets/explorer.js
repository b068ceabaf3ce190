"use strict";
// The maps: choose an image, a layer and a patch, and draw every model.

const find = (id) => document.getElementById(id);

class Explorer {
  constructor(data) {
    Object.assign(this, data);
    this.features = Object.fromEntries(Object.entries(data.packed).map(([key, packed]) => [key, new Features(packed)]));
    const [, rows, columns] = data.colours[""][this.models[0]].shape;
    Object.assign(this, { rows, columns });
    const against = this.models.includes("student") ? this.models.indexOf("student") : 0;
    this.state = { image: 0, layer: this.layers.length - 1, row: rows >> 1, column: columns >> 1, against, head: 0 };
    this.shown = {};
  }

  get key() {
    return this.layers[this.state.layer].key;
  }

  get place() {
    return this.state.row * this.columns + this.state.column;
  }

  // Build the controls and the board, and draw.
  async start() {
    this.pictures = this.images.map(({ src, name }) => element("img", { src, alt: `Photograph ${name}` }));
    this.pictures.forEach((picture, image) => {
      const button = element("button", { type: "button", title: this.images[image].name }, picture);
      button.addEventListener("click", () => this.set({ image }));
      find("images").append(button);
    });
    await Promise.all(this.pictures.map((picture) => picture.decode()));
    for (const button of document.querySelectorAll("button[data-image]")) {
      button.addEventListener("click", () => {
        this.set({ image: Number(button.dataset.image) });
        find("maps").scrollIntoView();
      });
    }
    find("layer").max = this.layers.length - 1;
    find("layer").value = this.state.layer;
    find("layer").addEventListener("input", () => this.set({ layer: Number(find("layer").value) }));
    find("layer-control").hidden = this.layers.length < 2;
    find("against").append(...this.models.map((name, value) => element("option", { value }, name)));
    find("against").value = this.state.against;
    find("against-control").hidden = this.models.length < 2;
    find("against").addEventListener("change", () => this.set({ against: Number(find("against").value) }));
    find("head").append(...this.heads.map(({ output }, value) => element("option", { value }, output)));
    find("head").addEventListener("change", () => this.set({ head: Number(find("head").value) }));
    find("head-control").hidden = this.heads.length === 0;
    for (const id of ["stretch", "opacity"]) find(id).addEventListener("input", () => this.draw());
    find("controls").addEventListener("submit", (event) => event.preventDefault());
    document.addEventListener("keydown", (event) => this.keyOnPage(event));
    this.build();
    find("order").textContent = this.order;
    find("maps").hidden = false;
    this.draw();
  }

  // One row for each model: a photograph or labels, features, norms, similarity, difference.
  build() {
    this.kinds = ["image", "features (PCA)", "token norms", "similarity"];
    if (this.models.length > 1) this.kinds.push("difference");
    const board = find("board");
    const { naturalWidth: width, naturalHeight: height } = this.pictures[0];
    const aspect = width && height ? `${width} / ${height}` : `${this.columns} / ${this.rows}`;
    board.style.gridTemplateColumns = `minmax(5rem, 8.5rem) repeat(${this.kinds.length}, minmax(110px, 1fr))`;
    this.views = this.models.map((model) => {
      board.append(element("h3", {}, model));
      return Object.fromEntries(this.kinds.map((kind) => [kind, this.view(board, model, kind, aspect)]));
    });
  }

  view(board, model, kind, aspect) {
    const canvas = element("canvas");
    const mark = element("div", { className: "mark" });
    const map = element("div", { className: "map", tabIndex: 0, role: "application" }, canvas, mark);
    map.setAttribute("aria-roledescription", "map of patches");
    map.style.aspectRatio = aspect;
    map.addEventListener("click", (event) => this.set(this.patchAt(map, event)));
    map.addEventListener("keydown", (event) => this.keyOnMap(event));
    map.addEventListener("pointermove", (event) => this.hover(this.patchAt(map, event)));
    map.addEventListener("pointerleave", () => this.hover(null));
    const caption = element("figcaption");
    board.append(element("figure", {}, caption, map));
    return { model, kind, canvas, mark, map, caption };
  }

  patchAt(map, event) {
    const box = map.getBoundingClientRect();
    const share = (from, size, count) => Math.min(Math.max(Math.floor((from / size) * count), 0), count - 1);
    return {
      row: share(event.clientY - box.top, box.height, this.rows),
      column: share(event.clientX - box.left, box.width, this.columns),
    };
  }

  keyOnMap(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const inside = (value, count) => Math.min(Math.max(value, 0), count - 1);
    const { row, column } = this.state;
    this.set({ row: inside(row + step[0], this.rows), column: inside(column + step[1], this.columns) });
  }

  keyOnPage(event) {
    const step = { n: 1, p: -1 }[event.key.toLowerCase()];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select")) return;
    const count = this.images.length;
    this.set({ image: (this.state.image + step + count) % count });
  }

  set(change) {
    Object.assign(this.state, change);
    this.draw();
  }

  // What is drawn of a model, for the whole image: arrays with one number for each patch.
  values(model) {
    const { image, against } = this.state;
    const number = this.models.indexOf(model);
    const pair = number === against ? null : [number, against].sort((a, b) => a - b).join(",");
    return {
      norms: ofImage(this.norms[this.key][model].values, image),
      rate: this.norms[this.key][model].rates[image],
      similarity: this.features[this.key].similarity(model, image, this.place),
      difference: pair === null ? null : ofImage(this.differences[this.key][pair], image),
    };
  }

  draw() {
    const { image, row, column } = this.state;
    const buttons = document.querySelectorAll("#images button");
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === image));
    find("layer-name").textContent = this.layers[this.state.layer].name;
    this.shown = Object.fromEntries(this.models.map((model) => [model, this.values(model)]));
    this.views.forEach((views, i) => {
      for (const view of Object.values(views)) {
        const said = this.drawView(view, this.shown[this.models[i]]);
        view.caption.textContent = `${view.kind}${said ? `: ${said}` : ""}`;
        view.map.setAttribute("aria-label", `${view.model}, ${view.caption.textContent}`);
        Object.assign(view.mark.style, {
          left: `${(100 * column) / this.columns}%`, top: `${(100 * row) / this.rows}%`,
          width: `${100 / this.columns}%`, height: `${100 / this.rows}%`,
        });
      }
    });
    this.readout();
  }

  // Draw one map and return what its caption says.
  drawView({ model, kind, canvas }, shown) {
    const { rows, columns } = this;
    const heat = (value) => heatColour(this.heat, value);
    if (kind === "features (PCA)") {
      const colours = ofImage(this.colours[this.key][model], this.state.image);
      drawPixels(canvas, rows, columns, (i) => colours.subarray(3 * i, 3 * i + 3));
      return "";
    }
    if (kind === "token norms") {
      drawPixels(canvas, rows, columns, (i) => heat(shown.norms[i] / 3));
      return `largest ${digits(range(shown.norms)[1])} medians, outliers ${digits(100 * shown.rate)} %`;
    }
    if (kind === "similarity") {
      const [low, high] = find("stretch").checked ? range(shown.similarity) : [0, 1];
      drawPixels(canvas, rows, columns, (i) => heat((shown.similarity[i] - low) / Math.max(high - low, 1e-9)));
      return `${digits(low)} to ${digits(high)}`;
    }
    if (kind === "difference") {
      // Logarithmic from 1e-6 to 1, so that those of 8 bits show beside those of another model.
      const part = (value) => 1 + Math.log10(Math.max(value, 1e-6)) / 6;
      drawPixels(canvas, rows, columns, (i) => heat(shown.difference ? part(shown.difference[i]) : 0));
      if (!shown.difference) return "none, the reference";
      return `1 - cosine with ${this.models[this.state.against]}, up to ${digits(range(shown.difference)[1])}`;
    }
    canvas.className = "smooth";
    const picture = this.pictures[this.state.image];
    const labels = this.labels(model);
    drawOverlay(canvas, picture, labels?.shape, labels?.colour, Number(find("opacity").value) / 100);
    return labels ? labels.said : this.images[this.state.image].name;
  }

  // The chosen head's answers of a model on the image; null where there are none.
  labels(model) {
    const head = this.heads[this.state.head];
    const map = head?.maps[model];
    if (!map) return null;
    const values = ofImage(map, this.state.image);
    const shape = map.shape.slice(1);
    const y = Math.floor(((this.state.row + 0.5) / this.rows) * shape[0]);
    const x = Math.floor(((this.state.column + 0.5) / this.columns) * shape[1]);
    const here = values[y * shape[1] + x];
    if (head.kind === "depth") {
      const depth = head.low + (here / 255) * (head.high - head.low);
      const colour = (i) => heatColour(this.heat, values[i] / 255);
      return { values, shape, said: head.output, here: digits(depth), colour };
    }
    const colour = (i) => head.colours[values[i]] ?? [0, 0, 0];
    return { values, shape, said: head.output, here: head.classes[here] ?? String(here), colour };
  }

  // The table of the chosen patch, the legend of the head, and what a screen reader says.
  readout() {
    const { row, column, against, image } = this.state;
    const head = this.heads[this.state.head];
    find("readout-cosine").textContent = `cosine with ${this.models[against]}`;
    document.querySelector(".of-head").hidden = !head;
    const lines = this.models.map((model) => {
      const { norms, rate, difference } = this.shown[model];
      const cosine = difference ? digits(1 - difference[this.place]) : "-";
      const cells = [digits(norms[this.place]), `${digits(100 * rate)} %`, cosine];
      if (head) cells.push(this.labels(model)?.here ?? "-");
      return element("tr", {}, element("th", { scope: "row" }, model), ...cells.map((cell) => element("td", {}, cell)));
    });
    document.querySelector("#readout tbody").replaceChildren(...lines);
    find("readout").caption.textContent = `Patch in row ${row}, column ${column} of ${this.images[image].name}`;
    const spoken = this.models.map((model) => `${model} norm ${digits(this.shown[model].norms[this.place])} medians`);
    find("said").textContent = `Row ${row}, column ${column}: ${spoken.join(", ")}`;
    const names = head?.classes ?? [];
    find("legend").replaceChildren(...names.map((name, i) => {
      const swatch = element("span", { className: "swatch" });
      swatch.style.background = `rgb(${head.colours[i].join(" ")})`;
      return element("span", {}, swatch, name);
    }));
    const { kept, channels, offset, error_p99: usual, error_max: most } = this.packed[this.key];
    find("packing").textContent =
      `Similarities are computed here from ${offset.length} of ${channels} principal components in 8 bits, which keep ` +
      `${digits(100 * kept)} % of the variance: off by at most ${digits(usual)} for 99 % of the pairs of patches, and ` +
      `by ${digits(most)} for the worst. Colours, norms and differences come from the whole features.`;
  }

  hover(at) {
    if (at === null) {
      find("hover").textContent = "\u00a0";
      return;
    }
    const place = at.row * this.columns + at.column;
    const parts = this.models.map((model) => `${model} ${digits(this.shown[model].similarity[place])}`);
    const where = `Row ${at.row}, column ${at.column}`;
    find("hover").textContent = `${where}: similarity to the chosen patch ${parts.join(", ")}`;
  }
}
