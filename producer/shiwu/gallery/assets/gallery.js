"use strict";
// Every text of an answer is set as textContent, so none of it is read as HTML. Nothing here loads anything.

const STAGES = [...document.querySelectorAll("#legend span")].map((span) => span.textContent);
const byId = (id) => document.getElementById(id);
const answers = JSON.parse(byId("data").textContent);
const TAGGED = "tagged";

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const milliseconds = (ms) => (ms >= 1000 ? `${(ms / 1000).toFixed(1)} s` : `${ms.toFixed(ms >= 10 ? 0 : 1)} ms`);

function thumbnail(answer) {
  const frame = element("div", "thumb");
  if (!answer.webp) {
    frame.textContent = answer.unseen ? `no thumbnail: ${answer.unseen}` : "no thumbnail";
    return frame;
  }
  const image = element("img");
  image.decoding = "async";
  image.alt = answer.tags.length ? answer.tags[0][0] : "";
  image.src = `data:image/webp;base64,${answer.webp}`;
  frame.append(image);
  return frame;
}

function tagList(tags) {
  const list = element("ul", "tags");
  for (const [label, score, cosine] of tags) {
    const row = element("li");
    const fill = element("span", "fill");
    fill.style.width = `${Math.max(0, Math.min(1, score)) * 100}%`;
    row.title = `cosine ${cosine.toFixed(4)}`;
    row.append(fill, element("bdi", "", label), element("span", "score", score.toFixed(3)));
    list.append(row);
  }
  return list;
}

function times(answer) {
  const block = element("div", "times");
  const bar = element("div", "bar");
  const details = element("details");
  const lines = element("ul");
  answer.ms.forEach((ms, stage) => {
    if (ms <= 0) return;
    const part = element("span", `s${stage}`);
    part.style.flexGrow = ms;
    bar.append(part);
    lines.append(element("li", "", `${STAGES[stage]} ${milliseconds(ms)}`));
  });
  if (answer.size) lines.append(element("li", "", answer.size));
  lines.append(element("li", "", `attempts ${answer.attempts}`), element("li", "", `id ${answer.id}`));
  details.append(element("summary", "", milliseconds(answer.total)), lines);
  block.append(bar, details);
  return block;
}

function secondAnswer({ status, code, tags }) {
  const block = element("div", "second");
  block.append(element("div", "which", tags.length ? "second answer" : `second answer: ${status}${code ? `, ${code}` : ""}`));
  if (tags.length) block.append(tagList(tags));
  return block;
}

// "same" or "other" by the first labels, or the status where one has none; "none" without a second answer.
function comparison(answer) {
  if (!answer.other) return "none";
  const firsts = [answer, answer.other].map(({ status, tags }) => (tags.length ? `tag ${tags[0][0]}` : status));
  return firsts[0] === firsts[1] ? "same" : "other";
}

function card(answer) {
  const made = element("article", answer.status === TAGGED ? "" : "failed");
  const reference = element("div", "ref");
  reference.append(element("bdi", "", answer.readable || answer.ref || answer.id));
  reference.title = answer.ref;
  made.append(thumbnail(answer), reference);
  if (answer.changed) made.append(element("div", "warning", "the image has changed since it was tagged"));
  if (answer.status !== TAGGED || answer.code) {
    const where = answer.stage ? ` in ${answer.stage}` : "";
    made.append(element("div", "code", `${answer.status}: ${answer.code || "no code"}${where}`));
    if (answer.message) made.append(element("div", "message", answer.message));
  }
  if (answer.tags.length) made.append(tagList(answer.tags));
  if (answer.other) made.append(secondAnswer(answer.other));
  for (const text of answer.warnings || []) made.append(element("div", "warning", text));
  made.append(times(answer));
  return made;
}

// ---------------------------------------------------------------- filter, sort, threshold
const entries = answers.map((answer, order) => {
  const scores = answer.tags.map((tag) => tag[1]).sort((a, b) => b - a);
  const node = card(answer);
  return {
    answer,
    node,
    rows: [...node.querySelectorAll(".tags li")],
    scores: [...answer.tags, ...(answer.other ? answer.other.tags : [])].map((tag) => tag[1]),
    second: comparison(answer),
    order,
    score: scores.length ? scores[0] : -1,
    margin: scores.length > 1 ? scores[0] - scores[1] : -1,
    time: answer.total,
    text: [answer.id, answer.ref, answer.readable, answer.code, answer.message, ...answer.tags.map((tag) => tag[0])]
      .join("\n")
      .toLowerCase(),
  };
});
const controls = Object.fromEntries(
  ["text", "label", "status", "code", "second", "sort", "reverse", "threshold", "only"].map((id) => [id, byId(id)]),
);

function fillSelect(select, values) {
  const counts = new Map();
  for (const value of values) if (value) counts.set(value, (counts.get(value) || 0) + 1);
  const sorted = [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
  for (const [value, count] of sorted) select.append(new Option(`${value} (${count})`, value));
}

function compare(key) {
  if (key === "order") return (a, b) => a.order - b.order;
  return (a, b) => b[key] - a[key] || a.order - b.order;
}

const hasLabel = (answer, label, least) => answer.tags.some((tag) => tag[0] === label && tag[1] >= least);

function countsText(shown, least) {
  const statuses = new Map();
  for (const { answer } of shown) statuses.set(answer.status, (statuses.get(answer.status) || 0) + 1);
  const parts = [`${shown.length} of ${entries.length} shown`];
  for (const [status, count] of statuses) parts.push(`${count} ${status}`);
  if (controls.second) parts.push(`${shown.filter((entry) => entry.second === "other").length} with another first tag`);
  if (least > 0) {
    const reached = shown.filter((entry) => entry.score >= least).length;
    parts.push(`${reached} with a tag of ${least.toFixed(2)} or more`);
  }
  return parts.join(" · ");
}

let drawnThreshold = null;

function markTags(least) {
  if (least === drawnThreshold) return;
  for (const { rows, scores } of entries) {
    rows.forEach((row, index) => row.classList.toggle("below", scores[index] < least));
  }
  drawnThreshold = least;
}

function update() {
  const least = Number(controls.threshold.value);
  const text = controls.text.value.trim().toLowerCase();
  const { value: label } = controls.label;
  const shown = entries.filter(
    ({ answer, score, second, text: searched }) =>
      (!text || searched.includes(text)) &&
      (!label || hasLabel(answer, label, least)) &&
      (!controls.status.value || answer.status === controls.status.value) &&
      (!controls.code.value || answer.code === controls.code.value) &&
      (!controls.second?.value || second === controls.second.value) &&
      (!controls.only.checked || score >= least),
  );
  shown.sort(compare(controls.sort.value));
  if (controls.reverse.checked) shown.reverse();
  markTags(least);
  byId("threshold-text").textContent = least.toFixed(2);
  byId("counts").textContent = countsText(shown, least);
  byId("cards").replaceChildren(...shown.map((entry) => entry.node));
}

fillSelect(controls.label, answers.flatMap((answer) => [...new Set(answer.tags.map((tag) => tag[0]))]));
fillSelect(controls.status, answers.map((answer) => answer.status));
fillSelect(controls.code, answers.map((answer) => answer.code));

let isPlanned = false;
function plan() {
  if (isPlanned) return;
  isPlanned = true;
  requestAnimationFrame(() => {
    isPlanned = false;
    update();
  });
}
byId("controls").addEventListener("input", plan);
byId("controls").addEventListener("reset", plan);
byId("controls").addEventListener("submit", (event) => event.preventDefault());
update();
