"use strict";
// Draw maps on canvases: one pixel for each patch, enlarged by the page's style.

// A colour of the heat table for a value from 0 to 1.
function heatColour(table, value) {
  const place = Math.min(Math.max(value, 0), 1) * (table.length - 1);
  const below = Math.min(Math.floor(place), table.length - 2);
  return table[below].map((part, i) => part + (table[below + 1][i] - part) * (place - below));
}

// Draw `count` pixels by a function from a patch's number to [red, green, blue].
function drawPixels(canvas, rows, columns, colour) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    const [red, green, blue] = colour(i);
    pixels.data.set([red, green, blue, 255], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
}

// Draw an image, and over it a map of classes or depth with an opacity from 0 to 1.
function drawOverlay(canvas, picture, shape, colour, opacity) {
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  if (!colour) return;
  const layer = document.createElement("canvas");
  drawPixels(layer, shape[0], shape[1], colour);
  context.globalAlpha = opacity;
  context.imageSmoothingEnabled = false;
  context.drawImage(layer, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 1;
}

// Least and largest value of an array.
function range(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return [low, high];
}

// A number with the digits that matter.
function digits(value) {
  if (Math.abs(value) > 0.9 && Math.abs(value) < 1) return value.toFixed(Math.abs(value) > 0.9999 ? 7 : 4);
  return value === 0 ? "0" : Number(value.toPrecision(3)).toString();
}

// An element with properties and children.
function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}
