"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const viewer = document.getElementById("viewer");
  const make = (name, values = {}, ...children) => {
    const element = Object.assign(document.createElement(name), values);
    element.append(...children);
    return element;
  };
  const short = (value) => String(Number(value.toPrecision(3)));
  const pictures = new Map();
  const pictureOf = (image) => {
    if (!pictures.has(image)) {
      const picture = new Image();
      picture.src = data.pictures[image];
      pictures.set(image, picture.decode().then(() => picture));
    }
    return pictures.get(image);
  };
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

  const select = make("select", { id: "pair" });
  data.pairs.forEach((pair, number) => {
    const label = `${pair.correct ? "✓ correct" : "✗ wrong"}, score ${pair.score.toFixed(3)}: ${pair.caption}`;
    select.append(make("option", { value: number, textContent: label }));
  });
  const back = make("button", { type: "button", textContent: "‹", ariaLabel: "previous pair" });
  const on = make("button", { type: "button", textContent: "›", ariaLabel: "next pair" });
  const sum = make("p", { className: "note" });
  const words = make("div", { className: "words", role: "group", ariaLabel: "words of the caption" });
  const maps = make("div", { className: "maps" });
  const said = make("p", { className: "hidden" });
  said.setAttribute("aria-live", "polite");
  const opacity = make("input", { type: "range", id: "opacity", min: 0, max: 100, value: Math.round(100 * data.alpha) });
  viewer.append(
    make("div", { className: "steps" },
      make("div", {}, make("label", { htmlFor: "pair", textContent: "Picture and caption" }), select), back, on),
    sum, words, maps,
    make("div", { className: "opacity" },
      make("label", { htmlFor: "opacity", textContent: "Opacity of the heatmap" }), opacity),
    said);
  viewer.hidden = false;

  const stops = [0, 32, 64, 96, 128, 160, 192, 224, 255].map((at) => `rgb(${data.colours[at].join(",")})`).join(",");
  let pair, word, drawing = 0;

  // Bilinear between the centres of the cells, as hacan.report.heatmaps.upsample.
  const spread = (values, start, rows, columns, height, width) => {
    const place = (at, size, cells) => {
      const x = Math.min(Math.max((at + 0.5) * cells / size - 0.5, 0), cells - 1);
      const low = Math.floor(x);
      return [low, Math.min(low + 1, cells - 1), x - low];
    };
    const across = Array.from({ length: width }, (_, x) => place(x, width, columns));
    const out = new Float32Array(height * width);
    for (let y = 0; y < height; y++) {
      const [top, bottom, down] = place(y, height, rows);
      for (let x = 0; x < width; x++) {
        const [left, right, along] = across[x];
        const at = (row, column) => values[start + row * columns + column];
        out[y * width + x] = (1 - down) * ((1 - along) * at(top, left) + along * at(top, right))
          + down * ((1 - along) * at(bottom, left) + along * at(bottom, right));
      }
    }
    return out;
  };

  const draw = async () => {
    const turn = ++drawing;
    const picture = await pictureOf(pair.image);
    if (turn !== drawing) return;
    const width = picture.naturalWidth, height = picture.naturalHeight, most = opacity.value / 100;
    maps.children[0].querySelector("img").src = picture.src;
    pair.streams.forEach((stream, k) => {
      const canvas = maps.children[k + 1].querySelector("canvas");
      canvas.width = width;
      canvas.height = height;
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(picture, 0, 0);
      const pixels = context.getImageData(0, 0, width, height);
      const cells = stream.rows * stream.columns;
      stream.bytes ??= bytes(stream.values);
      const values = spread(stream.bytes, word * cells, stream.rows, stream.columns, height, width);
      for (let i = 0; i < values.length; i++) {
        const alpha = most * (data.faint + (1 - data.faint) * values[i] / 255);
        const colour = data.colours[Math.round(values[i])];
        for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = (1 - alpha) * pixels.data[4 * i + c] + alpha * colour[c];
      }
      context.putImageData(pixels, 0, 0);
      canvas.setAttribute("aria-label", `${stream.name}: where “${pair.words[word].text}” looks`);
    });
    said.textContent = `heatmaps of the word ${pair.words[word].text}`;
  };

  const chooseWord = (number, focus = false) => {
    word = number;
    // Tab leads to the chosen word, arrows from there to its neighbours.
    [...words.children].forEach((button, k) => {
      button.setAttribute("aria-pressed", k === number);
      button.tabIndex = k === number ? 0 : -1;
    });
    if (focus) words.children[number].focus();
    draw();
  };

  const choosePair = (number) => {
    pair = data.pairs[number];
    select.value = number;
    sum.textContent = `Fine similarity ${pair.score.toFixed(3)} = `
      + pair.streams.map((stream) => `${stream.name} ${stream.score.toFixed(3)}`).join(" + ")
      + `. The caption is ${pair.correct ? "one of" : "not one of"} this picture's.`;
    words.replaceChildren(...pair.words.map((item, k) => make("button", {
      type: "button", textContent: item.text, className: item.special ? "special" : "", onclick: () => chooseWord(k),
    })));
    const plain = make("img", { alt: "the picture, as the model sees it" });
    const seen = make("figure", {}, make("figcaption", { textContent: "Picture" }), plain);
    maps.replaceChildren(seen, ...pair.streams.map((stream) => {
      const canvas = make("canvas");
      canvas.setAttribute("role", "img");
      const scale = make("div", { className: "scale" });
      scale.style.background = `linear-gradient(to right, ${stops})`;
      return make("figure", {}, make("figcaption", { textContent: `${stream.name}, ${stream.rows} × ${stream.columns}` }),
        canvas, scale, make("div", { className: "ends" }, make("span", { textContent: short(stream.low) }),
          make("span", { textContent: stream.unit }), make("span", { textContent: short(stream.high) })));
    }));
    // A word that stands out, to begin with: the one whose map of the first stream reaches highest.
    const first = pair.streams[0], cells = first.rows * first.columns, all = bytes(first.values);
    const peaks = pair.words.map((item, k) => item.special ? -1 : Math.max(...all.subarray(k * cells, (k + 1) * cells)));
    chooseWord(peaks.indexOf(Math.max(...peaks)));
  };

  words.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) {
      event.preventDefault();
      chooseWord((word + step + pair.words.length) % pair.words.length, true);
    }
  });
  const turn = (step) => choosePair((Number(select.value) + step + data.pairs.length) % data.pairs.length);
  select.addEventListener("change", () => choosePair(Number(select.value)));
  back.addEventListener("click", () => turn(-1));
  on.addEventListener("click", () => turn(1));
  opacity.addEventListener("input", draw);
  document.querySelectorAll(".see").forEach((button) => button.addEventListener("click", () => {
    choosePair(Number(button.dataset.pair));
    document.getElementById("heatmaps").scrollIntoView();
    select.focus({ preventScroll: true });
  }));
  choosePair(0);
})();
