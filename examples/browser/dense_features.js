// Dense features of a bundle in a browser, by onnxruntime-web and docs/bundle-format.md.
//
// It serves bundles of one fixed size whose weights are inside model.onnx. The browser resizes the picture, which gives
// other pixels than Pillow by a few grey levels. Hashes are not compared, and the exam is not run.
import * as ort from "onnxruntime-web";

const FORMAT = 4;
const OUTLIER_FACTOR = 2; // above 2x or below 1/2 of the median norm, a patch token is an artifact

export class DenseFeatures {
  // Loads a bundle from the address of its folder. Throws an Error with a message for people.
  static async load(folder) {
    const response = await fetch(`${folder}/manifest.json`).catch(() => ({ ok: false, status: "no answer" }));
    if (!response.ok) throw new Error(`There is no bundle at ${folder} (${response.status}).`);
    const manifest = await response.json();
    if (manifest.format > FORMAT) throw new Error(`The bundle has format ${manifest.format}; this page knows ${FORMAT}.`);
    if (manifest.sizes.mode !== "fixed") throw new Error("This page serves bundles of one fixed size; export one.");
    if (manifest.only_heads) throw new Error("This page draws features, and the bundle serves its heads alone.");
    if (manifest.weights) throw new Error("This page serves bundles whose weights are inside model.onnx.");
    return new DenseFeatures(manifest, await ort.InferenceSession.create(`${folder}/model.onnx`));
  }

  constructor(manifest, session) {
    [this.manifest, this.session] = [manifest, session];
    [this.height, this.width] = manifest.sizes.sizes[0];
  }

  // RGB bytes (H, W, 3) of the whole picture at the model's size, whatever the bundle's crop.
  pixels(image) {
    const canvas = new OffscreenCanvas(this.width, this.height);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, this.width, this.height);
    const rgba = context.getImageData(0, 0, this.width, this.height).data;
    const rgb = new Uint8Array(3 * this.width * this.height);
    for (let i = 0, j = 0; i < rgba.length; i += 4) {
      rgb[j++] = rgba[i];
      rgb[j++] = rgba[i + 1];
      rgb[j++] = rgba[i + 2];
    }
    return rgb;
  }

  // Features of RGB bytes (H, W, 3) at the model's size.
  async run(rgb) {
    const lowest = this.manifest.batches.lowest; // a larger lowest batch is filled with copies
    const batch = new Uint8Array(lowest * rgb.length);
    for (let i = 0; i < lowest; i++) batch.set(rgb, i * rgb.length);
    const image = new ort.Tensor("uint8", batch, [lowest, this.height, this.width, 3]);
    const { features, token_norm } = await this.session.run({ image }, ["features", "token_norm"]);
    const [, rows, columns, channels] = features.dims;
    const values = Float32Array.from(features.data.subarray(0, rows * columns * channels));
    return new FeatureMap(values, rows, columns, token_norm.data.slice(0, rows * columns), this.manifest.norm_median);
  }
}

export class FeatureMap {
  // `features` Float32Array (rows, columns, channels); `norms` Float32Array (rows, columns), before the final norm.
  constructor(features, rows, columns, norms, median) {
    Object.assign(this, { features, rows, columns, norms });
    this.channels = features.length / (rows * columns);
    this.lengths = Float32Array.from({ length: rows * columns }, (_, i) => Math.sqrt(this.dot(i, i)));
    const sorted = Float32Array.from(norms).sort();
    const middle = sorted.length / 2;
    const centre = median ?? (sorted[Math.ceil(middle) - 1] + sorted[Math.floor(middle)]) / 2;
    const outlier = (norm) => norm > OUTLIER_FACTOR * centre || norm < centre / OUTLIER_FACTOR;
    this.artifactRate = norms.filter(outlier).length / norms.length;
  }

  dot(a, b) {
    let sum = 0;
    for (let c = 0; c < this.channels; c++) {
      sum += this.features[a * this.channels + c] * this.features[b * this.channels + c];
    }
    return sum;
  }

  // Cosine of every patch to one, Float32Array (rows, columns), -1 to 1.
  similarity(row, column) {
    const one = row * this.columns + column;
    return this.lengths.map((length, i) => this.dot(one, i) / Math.max(length * this.lengths[one], 1e-12));
  }

  // Draws similarities into a canvas of (columns, rows) pixels, from blue at 0 and below, over white, to red at 1.
  draw(canvas, similarity) {
    const context = canvas.getContext("2d");
    const shown = context.createImageData(this.columns, this.rows);
    similarity.forEach((cosine, i) => {
      const share = Math.min(1, Math.max(0, cosine));
      const fade = 255 * (1 - Math.abs(2 * share - 1));
      shown.data.set(share < 0.5 ? [fade, fade, 255, 255] : [255, fade, fade, 255], 4 * i);
    });
    context.putImageData(shown, 0, 0);
  }
}
