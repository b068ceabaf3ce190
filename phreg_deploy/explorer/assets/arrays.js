"use strict";
// Read the arrays of the page, and compute cosines of packed features.

const TYPES = { int8: Int8Array, uint8: Uint8Array, float32: Float32Array };

// Unpack one array: base64 of deflated little-endian bytes.
async function unpack({ dtype, shape, data }) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return { shape, values: new TYPES[dtype](await new Response(stream).arrayBuffer()) };
}

// Unpack every array in a document, in place of its base64.
async function unpackAll(value) {
  if (value === null || typeof value !== "object") return value;
  if (typeof value.dtype === "string" && typeof value.data === "string") return unpack(value);
  if (Array.isArray(value)) return Promise.all(value.map(unpackAll));
  const entries = await Promise.all(Object.entries(value).map(async ([key, part]) => [key, await unpackAll(part)]));
  return Object.fromEntries(entries);
}

// The part of an array that belongs to one image: all arrays have the images along their first axis.
function ofImage(array, image) {
  const size = array.shape.slice(1).reduce((a, b) => a * b, 1);
  return array.values.subarray(image * size, (image + 1) * size);
}

// Packed features of one layer: see phreg_deploy/explorer/packing.py.
class Features {
  constructor(packed) {
    this.packed = packed;
    this.cache = new Map();
  }

  // Codes of a model, with those of the model that they are stored as differences to; bytes wrap around.
  codes(model) {
    const { codes, origin } = this.packed;
    if (origin[model] !== null) {
      const other = this.codes(origin[model]).values;
      codes[model].values = codes[model].values.map((value, i) => value + other[i]);
      origin[model] = null;
    }
    return codes[model];
  }

  // Tokens of one image as unit vectors: one row of K + 1 numbers for each patch.
  vectors(model, image) {
    const key = `${model} ${image}`;
    if (!this.cache.has(key)) {
      const { step, offset, rest } = this.packed;
      const { values, shape } = this.codes(model);
      const [components, images] = shape;
      const count = shape[2] * shape[3];
      const width = components + 1;
      const vectors = new Float32Array(count * width);
      for (let token = 0; token < count; token++) {
        const start = token * width;
        let square = rest * rest;
        for (let k = 0; k < components; k++) {
          const value = values[(k * images + image) * count + token] * step + offset[k];
          vectors[start + k] = value;
          square += value * value;
        }
        vectors[start + components] = rest;
        const length = Math.max(Math.sqrt(square), 1e-12);
        for (let k = 0; k < width; k++) vectors[start + k] /= length;
      }
      this.cache.set(key, { vectors, width, count });
    }
    return this.cache.get(key);
  }

  // Cosines of all patches of an image with the patch at `place` (row-major).
  similarity(model, image, place) {
    const { vectors, width, count } = this.vectors(model, image);
    const chosen = vectors.subarray(place * width, (place + 1) * width);
    const cosines = new Float32Array(count);
    for (let token = 0; token < count; token++) {
      let sum = 0;
      for (let k = 0; k < width; k++) sum += vectors[token * width + k] * chosen[k];
      cosines[token] = sum;
    }
    return cosines;
  }
}
