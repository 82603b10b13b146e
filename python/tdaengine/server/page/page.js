// The page asks the API as any other client does. Answers are shown as text while they come; what
// is made of their Markdown at the end, the server has freed of markup and scripts.
"use strict";

const find = (id) => document.getElementById(id);
let model = "";
let underWay = null;  // the AbortController of the question being answered
// Each side goes on with its own answers: [{role, content}].
const histories = { dense: [], tda: [] };

function headers() {
  const key = find("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `status ${response.status}`;
  }
}

async function connect() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) find("ask").querySelector("details").open = true;
    if (!response.ok) throw new Error(await failure(response));
    const about = (await response.json()).data[0];
    model = about.id;
    find("model").textContent = `${model}, weights ${about.weights}, context ${about.max_context}`;
    if (about.tda !== "dense") {
      find("server-default").hidden = false;
      find("server-default").textContent = `the server's default, ${about.tda}`;
      find("tda").value = "server";
    }
  } catch (error) {
    find("model").textContent = error.message;
  }
}

// What the field `tda` of a request says; undefined leaves it to the server.
function setting(side) {
  if (side === "dense") return false;
  switch (find("tda").value) {
    case "server": return undefined;
    case "hand": return JSON.parse(find("hand").value);
    default: return true;
  }
}

// The objects of a stream of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    pending += value;
    const lines = pending.split("\n");
    pending = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

const percent = (share) => `${(100 * share).toFixed(0)}%`;

// before: the stats that were shown last, null to show the whole.
function showStats(section, stats, before) {
  const parts = [
    `${stats.new_tokens} tokens`,
    `${stats.tokens_per_second.toFixed(1)} tokens/s`,
    `${(stats.bytes_per_token / 1e6).toFixed(1)} MB per token`,
  ];
  if (section.classList.contains("tda")) {
    parts.push(`FFN: ${percent(stats.ffn_bytes_fraction)} of bytes read`, stats.tda);
  }
  section.querySelector(".figures").textContent = parts.join(" · ");
  const active = latest("ffn_active_by_layer", stats, before);
  const coarse = latest("ffn_coarse_by_layer", stats, before);
  showLayers(section, active.map((share, i) => {
    return { exact: share - coarse[i], coarse: coarse[i], dropped: 1 - share };
  }));
}

// By layer, the mean over the tokens decoded between the two: the stats have it over all so far.
function latest(name, stats, before) {
  const count = stats.new_tokens - 1;  // the first token is from the prefill
  const earlier = before ? before.new_tokens - 1 : 0;
  if (earlier <= 0 || count <= earlier) return stats[name];
  return stats[name].map((share, i) => {
    const mean = (share * count - before[name][i] * earlier) / (count - earlier);
    return Math.min(1, Math.max(0, mean));  // rounding may leave that range
  });
}

const NAMES = { exact: "exact", coarse: "coarse (4 bits)", dropped: "dropped" };
const told = (shares) => Object.keys(NAMES).map((kind) => `${percent(shares[kind])} ${NAMES[kind]}`);

function showLayers(section, layers) {
  const picture = section.querySelector(".layers"), legend = section.querySelector(".legend");
  while (picture.children.length < layers.length) {
    const column = document.createElement("span");
    for (const kind in NAMES) {
      column.append(document.createElement("span"));
      column.lastChild.className = kind;
    }
    picture.append(column);
  }
  const mean = { exact: 0, coarse: 0, dropped: 0 };
  layers.forEach((shares, i) => {
    const column = picture.children[i];
    for (const kind in NAMES) {
      column.querySelector(`.${kind}`).style.height = `${100 * shares[kind]}%`;
      mean[kind] += shares[kind] / layers.length;
    }
    column.title = `layer ${i}: ${told(shares).join(", ")}`;
  });
  legend.hidden = false;
  told(mean).forEach((text, i) => { legend.children[i].textContent = text; });
  const dropped = layers.map((shares) => shares.dropped);
  const least = Math.min(...dropped), most = Math.max(...dropped);
  picture.setAttribute("aria-label", `Neurons of ${layers.length} layers: ` +
    `${told(mean).join(", ")}. Most dropped in layer ${dropped.indexOf(most)}, ${percent(most)}; ` +
    `fewest in layer ${dropped.indexOf(least)}, ${percent(least)}`);
}

function showWarnings(list, warnings) {
  list.hidden = warnings.length === 0;
  list.replaceChildren(...warnings.map((warning) => {
    const item = document.createElement("li");
    item.textContent = warning;
    return item;
  }));
}

// A reader at the page's end stays there as it grows.
function following(change) {
  const page = document.documentElement;
  const isAtEnd = window.innerHeight + window.scrollY >= page.scrollHeight - 8;
  change();
  if (isAtEnd) window.scrollTo(0, page.scrollHeight);
}

// A server that cannot leaves the text as it is.
async function showMarkdown(element, text) {
  try {
    const response = await fetch("markdown", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify({ text }),
    });
    if (!response.ok) return;
    const html = await response.text();
    following(() => { element.innerHTML = html; });
    element.classList.add("rendered");
  } catch {
    // The text is there.
  }
}

async function answer(section, side, question, signal) {
  const text = section.querySelector(".text");
  const system = find("system").value.trim();
  const messages = [...histories[side], { role: "user", content: question }];
  let before = null;  // the last stats
  let written = "";
  text.setAttribute("aria-busy", "true");  // read aloud once it is whole
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal,
      body: JSON.stringify({
        model,
        messages: system ? [{ role: "system", content: system }, ...messages] : messages,
        max_tokens: Number(find("tokens").value),
        temperature: Number(find("temperature").value),
        tda: setting(side),
        stream: true,
        stream_options: { include_stats: true },
      }),
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      following(() => {
        if (choice.delta.content) {
          written += choice.delta.content;
          text.append(choice.delta.content);  // a text node
        }
        if (choice.stats) {
          showStats(section, choice.stats, choice.finish_reason ? null : before);
          before = choice.stats;
        }
      });
      if (choice.finish_reason) {
        showWarnings(section.querySelector(".warnings"), choice.stats.warnings);
      }
    }
  } finally {
    if (written) {
      histories[side] = [...messages, { role: "assistant", content: written }];
      await showMarkdown(text, written);
    }
    text.setAttribute("aria-busy", "false");
  }
}

async function ask(question) {
  const turn = find("turn").content.cloneNode(true).firstElementChild;
  turn.querySelector(".question").textContent = question;
  find("turns").append(turn);
  turn.scrollIntoView({ block: "start" });
  underWay = new AbortController();
  setBusy(true);
  let ended = "Both answers are there.";
  for (const [side, name] of [["dense", "Dense"], ["tda", "TDA"]]) {
    const section = turn.querySelector(`.${side}`);
    try {
      find("status").textContent = `${name}: computing`;
      await answer(section, side, question, underWay.signal);
    } catch (error) {
      const shown = section.querySelector(".error");
      shown.textContent = underWay.signal.aborted ? "stopped" : error.message;
      shown.hidden = false;
      ended = "Not both answers are complete.";
    }
  }
  find("status").textContent = ended;
  underWay = null;
  setBusy(false);
}

function setBusy(isBusy) {
  find("send").disabled = isBusy;
  find("stop").disabled = !isBusy;
  find("forget").disabled = isBusy;
}

find("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = find("question").value.trim();
  if (!question || underWay) return;
  if (!model) await connect();
  find("question").value = "";
  await ask(question);
  find("question").focus();
});

find("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("ask").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") underWay?.abort();
});
find("stop").addEventListener("click", () => underWay?.abort());

find("forget").addEventListener("click", () => {
  histories.dense = [];
  histories.tda = [];
  find("turns").replaceChildren();
  find("status").textContent = "";
  find("question").focus();
});

find("tda").addEventListener("change", () => {
  find("hand-label").hidden = find("tda").value !== "hand";
});
find("key").addEventListener("change", connect);

connect();
