"use strict";
const at = (id) => document.getElementById(id);
const MAPPED = 12; // pictures that show where a word matched
let shown = { find: "pictures", text: "", results: [] };
let asked = 0; // the newest question; answers to older ones are dropped
let chosen = -1; // the word whose maps are shown
let pinned = -1; // the word that was tapped
const maps = new Map();

function say(message, isError = false) {
  at("status").textContent = message;
  at("status").classList.toggle("error", isError);
}

async function answerOf(url, options) {
  const response = await fetch(url, options);
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(typeof body.detail === "string" ? body.detail : `the server answered ${response.status}`);
  return body;
}

async function ask(url, options) {
  const mine = ++asked;
  say("searching …");
  URL.revokeObjectURL(at("asked").src);
  at("asked").hidden = !options;
  if (options) at("asked").src = URL.createObjectURL(options.body);
  try {
    const answer = await answerOf(url, options);
    if (mine === asked) show(answer);
  } catch (error) {
    if (mine !== asked) return;
    at("asked").hidden = true;
    say(error.message, true);
  }
}

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function show(answer) {
  shown = answer;
  chosen = pinned = -1;
  maps.clear();
  const kind = answer.find === "texts" ? "texts" : "pictures";
  say(answer.results.length ? `${answer.results.length} ${kind}, best first` : "the index is empty");
  at("results").className = kind;
  at("results").replaceChildren(...answer.results.map(card));
  at("words").hidden = !answer.text || !answer.results.length;
  at("chips").replaceChildren();
  if (!at("words").hidden) makeChips();
}

function card(result) {
  const item = document.createElement("li");
  if (shown.find === "pictures") {
    const link = element("a", "", { href: `/pictures/${result.id}?size=large`, target: "_blank", rel: "noopener" });
    const small = `/pictures/${result.id}`;
    link.append(element("img", "", { src: small, alt: `${result.rank}: ${result.name}`, loading: "lazy", "data-plain": small }));
    item.append(link);
  }
  const lines = document.createElement("div");
  lines.append(element("strong", `${result.rank}. ${result.name}`));
  const fine = result.fine === null ? "" : ` · fine ${result.fine.toFixed(3)}`;
  lines.append(element("p", `coarse ${result.coarse.toFixed(3)}${fine}`));
  item.append(lines);
  return item;
}

function mapsOf(id) {
  const stream = at("stream").value;
  const key = `${id} ${stream}`;
  if (!maps.has(key)) {
    const query = new URLSearchParams({ id, text: shown.text, stream });
    const found = answerOf(`/api/explain?${query}`);
    found.catch(() => maps.delete(key)); // asked again another time
    maps.set(key, found);
  }
  return maps.get(key);
}

async function makeChips() {
  const mine = asked;
  try {
    const { words } = await mapsOf(shown.results[0].id); // words as the model reads them
    if (mine !== asked) return;
    at("chips").replaceChildren(...words.map(({ word }, place) => {
      const chip = element("button", word, { type: "button", "aria-pressed": "false" });
      chip.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && point(place));
      chip.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(pinned));
      chip.addEventListener("focus", () => chip.matches(":focus-visible") && point(place));
      chip.addEventListener("blur", () => point(pinned));
      chip.addEventListener("click", () => { pinned = pinned === place ? -1 : place; point(pinned); });
      return chip;
    }));
  } catch (error) {
    if (mine === asked) say(error.message, true);
  }
}

async function point(place) {
  chosen = place;
  [...at("chips").children].forEach((chip, other) => chip.setAttribute("aria-pressed", String(other === place)));
  const pictures = [...at("results").querySelectorAll("img")];
  if (place < 0) {
    for (const picture of pictures) if (picture.dataset.map) { delete picture.dataset.map; picture.src = picture.dataset.plain; }
    return;
  }
  const mine = asked;
  for (let k = 0; k < Math.min(MAPPED, pictures.length); k++) {
    try {
      const { words } = await mapsOf(shown.results[k].id);
      if (mine !== asked || chosen !== place) return;
      pictures[k].src = words[place].map;
      pictures[k].dataset.map = words[place].word;
    } catch (error) {
      if (mine === asked) say(error.message, true);
    }
  }
}

function askByPicture(file) {
  if (file) ask(`/api/search?${new URLSearchParams({ find: at("find").value })}`, { method: "POST", body: file });
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (text) ask(`/api/search?${new URLSearchParams({ text })}`);
});
at("file").addEventListener("change", () => { askByPicture(at("file").files[0]); at("file").value = ""; });
at("stream").addEventListener("change", () => point(chosen >= 0 ? chosen : pinned));
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", name === "dragover");
    if (name === "drop") askByPicture(event.dataTransfer.files[0]);
  });
}
answerOf("/api/about").then(({ pictures, texts }) => {
  at("about").textContent = `${pictures} pictures${texts ? `, ${texts} texts` : ""} in this index`;
}, (error) => say(error.message, true));
