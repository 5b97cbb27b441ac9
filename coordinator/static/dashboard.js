// The page of `/dashboard`: ask a collection in words, and see how it is.
//
// It uses only the public HTTP API, so it can do nothing that its visitor could not do with curl.
// Whatever comes from a collection is shown as text, never as markup: elements are made by `el`,
// which knows no HTML. One `view` holds what is chosen; it is mirrored in the address, so that a
// search can be sent to somebody.

const SEARCH_DELAY_MS = 180; // after the last key
const POLL_MS = 2000;
const CLUSTER_POLL_MS = 6000; // a look asks every storage node
const SLOW_MS = 700; // then say that something is going on
const PAGE_SIZE = 10;
const RESULTS_MAX = 100;
const SAMPLE_POINTS = 100; // from which a key to filter by is guessed
const FACET_POINTS_MAX = 10000;
const FACET_REFRESH_MS = 15000;

const view = {
  collection: "",
  question: "",
  chosen: new Set(), // values of the facet key
  limit: PAGE_SIZE,
};
let status = null; // last answer of /shoal/v1/status
let cluster = null; // last answer of /shoal/v1/cluster, or the sentence why there is none
let clusterAt = 0; // when that was asked for
let changes = {}; // by vector, how far a change of its model is
let target = null; // what of the collection is searched: see `targetOf`
let facets = null; // {key, counts: Map, partial, points, at}
let running = null; // AbortController of the search under way
let typing = 0; // timer
let polling = false;
let opened = false; // a collection was chosen once, so the address has been heeded

const $ = (id) => document.getElementById(id);

function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

// -- the API ---------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

// Point ids go up to 2^64; a number that JavaScript would round is kept as the text it was.
function parse(text) {
  return JSON.parse(text, (key, value, context) =>
    typeof value === "number" && !Number.isSafeInteger(value) && /^-?\d+$/.test(context?.source ?? "")
      ? context.source
      : value,
  );
}

async function call(method, path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem("shoal-api-key");
  if (key) headers["api-key"] = key;
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. It may be stopped or just starting.", 0);
  }
  const text = await answer.text();
  let content = null;
  try {
    content = parse(text);
  } catch {
    throw new Refused(`The server answered ${answer.status} with something that is not JSON.`, answer.status);
  }
  if (!answer.ok) {
    throw new Refused(content?.status?.error ?? `The server answered ${answer.status}.`, answer.status);
  }
  return content;
}

const pathOf = (collection, rest = "") => `collections/${encodeURIComponent(collection)}${rest}`;

function askForKey(failure) {
  const dialog = $("key-dialog");
  if (dialog.open) return;
  if (sessionStorage.getItem("shoal-api-key")) $("key-why").textContent = failure.message;
  sessionStorage.removeItem("shoal-api-key");
  dialog.showModal();
}

$("key-form").addEventListener("submit", () => {
  sessionStorage.setItem("shoal-api-key", $("key").value);
  $("key").value = "";
  start();
});

// -- what is wrong, in a sentence --------------------------------------------------------------------

function complain(failure) {
  if (failure.name === "AbortError") return;
  if (failure.code === 401 || failure.code === 403) return askForKey(failure);
  if (!(failure instanceof Refused)) throw failure;
  $("outcome").textContent = sentence(failure.message);
  $("outcome").classList.add("failed");
}

const sentence = (text) => (/[.!?…]$/.test(text) ? text : `${text}.`);

function banner(text) {
  $("banner").textContent = text;
  $("banner").hidden = !text;
}

// -- the server and its collections ------------------------------------------------------------------

async function poll() {
  if (document.hidden || polling) return;
  polling = true;
  try {
    status = (await call("GET", "shoal/v1/status")).result;
    await lookAtCluster();
    await lookAtChanges();
    await showServer();
  } catch (failure) {
    if (failure.code === 401 || failure.code === 403) return askForKey(failure);
    if (failure.code === 0) {
      showHealth("red", "no answer");
      return banner(`${failure.message} Trying again every ${POLL_MS / 1000} seconds.`);
    }
    if (!(failure instanceof Refused)) throw failure;
    banner(sentence(failure.message));
  } finally {
    polling = false;
  }
}

async function lookAtCluster() {
  if (Date.now() - clusterAt < CLUSTER_POLL_MS) return;
  clusterAt = Date.now();
  try {
    cluster = (await call("GET", "shoal/v1/cluster")).result;
    if (cluster.mode !== "cluster") clusterAt = Infinity; // and it will not become one
  } catch (failure) {
    if (!(failure instanceof Refused) || failure.code === 401 || failure.code === 0) throw failure;
    cluster = sentence(failure.message);
  }
}

// Of this collection. One that has just ended answers 404.
async function lookAtChanges() {
  const vectors = Object.entries(collectionStatus()?.vectors ?? {}).filter(([, vector]) => vector.migration);
  const found = await Promise.all(
    vectors.map(async ([name]) => {
      const path = pathOf(view.collection, `/vectors/${encodeURIComponent(name || "-")}/migrate`);
      try {
        return [name, (await call("GET", path)).result];
      } catch (failure) {
        if (!(failure instanceof Refused) || [401, 403, 0].includes(failure.code)) throw failure;
        return [name, null];
      }
    }),
  );
  changes = Object.fromEntries(found);
}

async function showServer() {
  banner(status.state === "red" ? status.reasons.map(sentence).join(" ") : "");
  $("version").textContent = `Shoal ${status.version}`;
  showCollections();
  showState();
  const current = collectionStatus();
  if (!current) {
    const first = !opened;
    if (first || view.collection || status.collections.length) {
      opened = true;
      await open(preferredCollection(), first);
    }
  } else if (facets && current.points !== facets.points && Date.now() - facets.at > FACET_REFRESH_MS) {
    await loadFacets(facets.key);
  }
}

const collectionStatus = () => status?.collections.find((each) => each.name === view.collection);

function preferredCollection() {
  const names = status.collections.map((each) => each.name);
  const wanted = new URLSearchParams(location.search).get("collection");
  if (names.includes(wanted)) return wanted;
  const withText = status.collections.find((each) => targetOf(each, {}));
  return (withText ?? status.collections[0])?.name ?? "";
}

// The vector that a question in words can search: one that is bound to a model, or as long as the
// vectors of a model here. `asks` is what a question names: nothing where the vector knows its model,
// which may be changed at any time.
function targetOf(collection, metadata) {
  for (const [name, vector] of Object.entries(collection?.vectors ?? {})) {
    if (vector.multivector) continue;
    const fitting = status.models.filter((model) => model.dim === vector.size);
    if (vector.model) {
      if (!fitting.some((each) => each.name === vector.model)) continue;
      return { using: name, distance: vector.distance, model: vector.model, asks: "" };
    }
    const model = fitting.find((each) => each.name === metadata.text_model) ?? fitting[0];
    if (model) return { using: name, distance: vector.distance, model: model.name, asks: model.name };
  }
  return null;
}

async function open(name, keepView = false) {
  view.collection = name;
  if (!keepView) view.chosen.clear();
  view.limit = PAGE_SIZE;
  facets = null;
  target = null;
  $("facets").hidden = true;
  $("hits").replaceChildren();
  showCollections();
  showState();
  if (!name) return search();
  try {
    const metadata = (await call("GET", pathOf(name))).result.config.metadata ?? {};
    if (view.collection !== name) return;
    target = targetOf(collectionStatus(), metadata);
    showAsk(metadata);
    showState();
    const finding = findFacets(metadata);
    if (view.chosen.size) await finding; // a filter from the address needs its key
    await Promise.all([search(), finding]);
  } catch (failure) {
    complain(failure);
  }
}

function showAsk(metadata) {
  const title = typeof metadata.title === "string" ? metadata.title : view.collection;
  $("question").disabled = !target;
  $("box").hidden = !target;
  $("ask").hidden = false;
  $("question").placeholder = "in your own words";
  $("question-label").textContent = target ? `Ask ${title}` : title;
  document.title = `${view.collection} · Shoal`;
  const examples = Array.isArray(metadata.examples)
    ? metadata.examples.filter((each) => typeof each === "string").slice(0, 8)
    : [];
  $("welcome").replaceChildren(
    el("h2", { textContent: examples.length ? "For example" : "Write what you look for" }),
    examples.length
      ? el("div", { className: "examples" }, ...examples.map(exampleButton))
      : el("p", {
          textContent:
            "A sentence or a few words will do: the server compares their meaning, not their letters.",
        }),
  );
}

function exampleButton(text) {
  const use = () => {
    $("question").value = view.question = text;
    view.limit = PAGE_SIZE;
    search();
  };
  return el("button", { type: "button", textContent: text, onclick: use });
}

function showCollections() {
  const chooser = $("collection");
  const names = status?.collections.map((each) => each.name) ?? [];
  if (names.join("\n") !== [...chooser.options].map((option) => option.value).join("\n")) {
    chooser.replaceChildren(...names.map((name) => new Option(name, name)));
  }
  chooser.value = view.collection;
  chooser.disabled = names.length < 2;
  $("chooser").hidden = !names.length;
}

function migrationText({ model, migration }, far) {
  const short = (name) => name.split("/").pop();
  if (migration.phase === "dropping") return `${short(model)}; ${short(migration.other)} is being removed`;
  const what = migration.switched
    ? `${short(model)}; ${short(migration.other)} kept for a rollback`
    : `${short(model)}, being changed to ${short(migration.other)}`;
  const many = far?.left ? `: ${count(far.done)} of ${count(far.points)} points` : "";
  return `${what}${many}${far?.error ? `. It waits: ${far.error}` : ""}`;
}

const HEALTH = { green: "settled", yellow: "working", red: "in trouble" };

function showHealth(state, text) {
  $("health").dataset.state = state;
  $("health").lastElementChild.textContent = text;
}

function showState() {
  if (!status) return;
  const current = collectionStatus();
  const state = current?.status ?? status.state;
  showHealth(state, HEALTH[state] ?? state);
  if (target && current?.vectors[target.using]) target.model = current.vectors[target.using].model ?? target.model;
  const model = status.models.find((each) => each.name === target?.model);
  const lines = [];
  if (current) {
    const vectors = Object.entries(current.vectors).map(
      ([name, vector]) => `${name ? `${name} ` : ""}${vector.size} ${vector.distance}`,
    );
    lines.push(
      ["Points", count(current.points)],
      ["Indexed", count(current.indexed_vectors)],
      ["Segments", current.pending ? `${current.segments}, ${current.pending} in work` : count(current.segments)],
      ["Shards", count(current.shards)],
      ["Vectors", [...vectors, ...current.sparse_vectors.map((name) => `${name} sparse`)].join(", ") || "none"],
      ["On disk", bytes(current.bytes_on_disk)],
      ...Object.entries(current.vectors)
        .filter(([, vector]) => vector.migration)
        .map(([name, vector]) => [name ? `Change of ${name}` : "Change", migrationText(vector, changes[name])]),
    );
  }
  if (status.disk) lines.push(["Disk free", bytes(status.disk.free_bytes)]);
  if (model) {
    lines.push(
      ["Model", model.name.split("/").pop()],
      ["Encoder", model.loaded ? `ready, ${model.precision}` : "not loaded yet"],
    );
  }
  $("state").replaceChildren(
    ...lines.flatMap(([name, value]) => [el("dt", { textContent: name }), el("dd", { textContent: value })]),
  );
  $("state-reasons").textContent = status.state === "yellow" ? status.reasons.map(sentence).join(" ") : "";
  showCluster();
}

// -- the cluster -------------------------------------------------------------------------------------

const SHARD_STATES = { ok: "green", "under-replicated": "yellow", "no primary": "red", unavailable: "red" };

// Its state stands in words as well: a dot alone says nothing to many.
function part(state, title, text) {
  const item = el(
    "li",
    {},
    el("i", { "aria-hidden": "true" }),
    el("span", {}, el("b", { textContent: title }), el("small", { textContent: text })),
  );
  item.dataset.state = state;
  return item;
}

function nodePart(node) {
  const words = [node.zone && `zone ${node.zone}`];
  let state = "green";
  if (!node.registered || node.unreachable) {
    state = "red";
    words.push(node.registered ? "does not answer" : "lost");
  } else if (node.draining) {
    state = "yellow";
    words.push("draining");
  }
  if (node.replicas) words.push(`${node.replicas} shards, primary of ${node.primaries}`);
  if (node.id === cluster.leader) words.push("leads");
  return part(state, `${node.id} · ${node.role}`, words.filter(Boolean).join(", ") || "up");
}

function shardPart(shard) {
  const replicas = shard.replicas.map((replica) => {
    const words = [];
    if (replica.node === shard.primary) words.push("primary");
    if (replica.part !== "in_sync") words.push(replica.part);
    if (replica.lost) words.push("lost");
    return words.length ? `${replica.node} (${words.join(", ")})` : replica.node;
  });
  const state = shard.state === "ok" ? "" : `${shard.state}: `;
  return part(SHARD_STATES[shard.state], `Shard ${shard.shard} · term ${shard.term}`, state + replicas.join(", "));
}

function showCluster() {
  const failed = typeof cluster === "string";
  $("cluster").hidden = !cluster || (!failed && cluster.mode !== "cluster");
  $("cluster-note").textContent = failed ? cluster : "";
  if (!cluster || failed) return;
  const current = cluster.collections.find((each) => each.name === view.collection);
  $("cluster-nodes").replaceChildren(...cluster.nodes.map(nodePart));
  $("cluster-shards").replaceChildren(...(current?.shards ?? []).map(shardPart));
}

const count = (number) => number.toLocaleString("en");

function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (number >= 1024 && power < units.length - 1) {
    number /= 1024;
    power += 1;
  }
  return `${number < 10 && power ? number.toFixed(1) : Math.round(number)} ${units[power]}`;
}

// -- facets ------------------------------------------------------------------------------------------

async function findFacets(metadata) {
  let key = typeof metadata.filter_key === "string" ? metadata.filter_key : null;
  if (!key) {
    const body = { limit: SAMPLE_POINTS, with_payload: true };
    const sample = (await call("POST", pathOf(view.collection, "/points/scroll"), body)).result.points;
    key = guessKey(sample.map((point) => point.payload ?? {}));
  }
  if (key) await loadFacets(key);
}

// A key whose few, short values come back again and again in the sample.
function guessKey(payloads) {
  const values = new Map();
  for (const payload of payloads) {
    for (const [key, value] of Object.entries(payload)) {
      if ((typeof value === "string" && value.length <= 40) || typeof value === "boolean") {
        values.set(key, [...(values.get(key) ?? []), value]);
      }
    }
  }
  let best = null;
  for (const [key, seen] of values) {
    const distinct = new Set(seen).size;
    if (/[.[\]"]/.test(key) || seen.length < payloads.length / 2 || distinct < 2) continue;
    if (distinct <= seen.length / 3 && (!best || distinct > best.distinct)) best = { key, distinct };
  }
  return best?.key ?? null;
}

async function loadFacets(key) {
  const collection = view.collection;
  const body = { limit: FACET_POINTS_MAX, with_payload: [key] };
  const { points, next_page_offset: next } = (
    await call("POST", pathOf(collection, "/points/scroll"), body)
  ).result;
  if (view.collection !== collection) return;
  const counts = new Map();
  for (const point of points) {
    const value = point.payload?.[key];
    if (typeof value === "string" || typeof value === "boolean") {
      counts.set(value, (counts.get(value) ?? 0) + 1);
    }
  }
  for (const value of [...view.chosen]) {
    const meant = counts.has(value) ? value : { true: true, false: false }[value];
    if (meant !== value && counts.has(meant)) {
      view.chosen.delete(value); // the address knows only text
      view.chosen.add(meant);
    } else if (!counts.has(value)) {
      counts.set(value, 0);
    }
  }
  facets = { key, counts, partial: next !== null, points: collectionStatus()?.points, at: Date.now() };
  $("facets").hidden = counts.size < 2;
  showFacets();
}

function showFacets() {
  if (!facets) return;
  const { key, counts, partial } = facets;
  const name = key.replaceAll("_", " ");
  $("facets-title").textContent = `Filter by ${name}`;
  $("facets-chosen").textContent = view.chosen.size ? `${view.chosen.size} chosen` : "";
  $("facet-search").placeholder = `Find a ${name}`;
  $("facet-search").setAttribute("aria-label", `Find a ${name} in the list`);
  $("facet-search").hidden = counts.size < 12;
  $("facet-clear").hidden = !view.chosen.size;
  $("facet-note").textContent = partial
    ? `Counted in the first ${count(FACET_POINTS_MAX)} points.`
    : "";
  const wanted = $("facet-search").value.trim().toLowerCase();
  const rows = [...counts]
    .filter(([value]) => String(value).toLowerCase().includes(wanted))
    .sort(([a, m], [b, n]) => view.chosen.has(b) - view.chosen.has(a) || n - m || (a < b ? -1 : 1));
  $("facet-list").replaceChildren(...rows.map(facetRow));
  if (!rows.length) $("facet-list").append(el("li", { className: "note", textContent: "None has this in its name." }));
}

function facetRow([value, points]) {
  const choose = (event) => {
    if (event.target.checked) view.chosen.add(value);
    else view.chosen.delete(value);
    view.limit = PAGE_SIZE;
    const id = event.target.id;
    showFacets();
    $(id)?.focus();
    search();
  };
  const box = el("input", {
    type: "checkbox",
    id: `facet-${String(value)}`,
    checked: view.chosen.has(value),
    onchange: choose,
  });
  return el(
    "li",
    {},
    el("label", {}, box, el("span", { textContent: String(value) }), el("small", { textContent: count(points) })),
  );
}

// -- search ------------------------------------------------------------------------------------------

async function search() {
  clearTimeout(typing);
  running?.abort();
  const mine = (running = new AbortController());
  remember();
  $("outcome").classList.remove("failed");
  if (!view.collection) return showNothing();
  const asking = target && view.question;
  $("welcome").hidden = !target || Boolean(view.question) || view.chosen.size > 0;
  if (target && !asking && !view.chosen.size) {
    $("hits").replaceChildren();
    $("outcome").textContent = "";
    $("more").hidden = true;
    return;
  }
  $("hits").classList.add("stale");
  const slow = setTimeout(() => {
    const model = status?.models.find((each) => each.name === target?.model);
    $("outcome").textContent =
      asking && model && !model.loaded
        ? "Loading the model; the first question takes a few seconds…"
        : "Searching…";
  }, SLOW_MS);
  const began = performance.now();
  try {
    const answer = await call("POST", ...request(asking), mine.signal);
    const took = performance.now() - began;
    const points = answer.result.points;
    showHits(points, asking);
    showOutcome(points.length, asking, took, answer.time * 1000);
    const all = asking ? points.length < view.limit : answer.result.next_page_offset === null;
    $("more").hidden = all || view.limit >= RESULTS_MAX;
  } catch (failure) {
    if (failure.name !== "AbortError") $("hits").replaceChildren();
    complain(failure);
  } finally {
    clearTimeout(slow);
    if (running === mine) $("hits").classList.remove("stale");
  }
}

function request(asking) {
  const body = { limit: view.limit, with_payload: true };
  if (view.chosen.size && facets) {
    const any = [...view.chosen];
    // Booleans have no `any`; each is a condition of its own.
    body.filter = any.every((value) => typeof value === "string")
      ? { must: [{ key: facets.key, match: { any } }] }
      : { should: any.map((value) => ({ key: facets.key, match: { value } })) };
  }
  if (!asking) return [pathOf(view.collection, "/points/scroll"), body];
  body.query = { text: view.question, model: target.asks };
  if (target.using) body.using = target.using;
  return [pathOf(view.collection, "/points/query"), body];
}

function showNothing() {
  $("question").disabled = true;
  $("ask").hidden = true;
  $("more").hidden = true;
  $("hits").replaceChildren();
  $("outcome").textContent = "";
  $("welcome").hidden = false;
  $("welcome").replaceChildren(
    el("h2", { textContent: "There is no collection yet" }),
    el(
      "p",
      {},
      "Make one with any Qdrant client, load a file with ",
      el("code", { textContent: "shoal import" }),
      ", or run ",
      el("code", { textContent: "shoal demo" }),
      ". It appears here by itself.",
    ),
  );
}

function showOutcome(number, asking, tookMs, serverMs) {
  if (!number) {
    $("outcome").textContent = view.chosen.size
      ? "Nothing here matches the filter."
      : "This collection has no points yet.";
    return;
  }
  const what = asking ? `${number === 1 ? "answer" : "answers"}, best first` : number === 1 ? "point" : "points by id";
  $("outcome").replaceChildren(
    el("b", { textContent: count(number) }),
    ` ${what}, in `,
    el("b", { textContent: `${milliseconds(tookMs)} ms` }),
    ` (${milliseconds(serverMs)} ms in the server)`,
  );
}

const milliseconds = (value) => (value < 10 ? value.toFixed(1) : value.toFixed(0));

// -- results -----------------------------------------------------------------------------------------

const TITLE_KEYS = ["name", "title", "label", "subject", "filename", "path", "url"];
const SUMMARY_KEYS = ["summary", "description", "abstract", "text", "page_content", "content", "document", "body"];
const LONG_KEYS = ["doc", "text", "page_content", "content", "document", "body"];

function showHits(points, asking) {
  const scores = points.map((point) => point.score);
  $("hits").replaceChildren(
    ...points.map((point, at) => hit(point, at + 1, asking ? share(scores, at) : null)),
  );
}

// How full the bar is, 0 to 1: the cosine itself, else the score relative to the best.
function share(scores, at) {
  const score = scores[at];
  if (target.distance === "Cosine") return Math.max(0, Math.min(1, score));
  if (target.distance === "Dot") return scores[0] > 0 ? Math.max(0, score / scores[0]) : 0;
  return score > 0 ? Math.min(1, scores[0] / score) : 1; // a distance: the smallest is best
}

function hit(point, rank, filled) {
  const payload = point.payload ?? {};
  const text = (keys) => keys.find((key) => typeof payload[key] === "string" && payload[key]);
  const titleKey = text(TITLE_KEYS);
  const summaryKey = text(SUMMARY_KEYS.filter((key) => key !== titleKey));
  const longKey = text(LONG_KEYS);
  const summary = summaryKey ? shortened(payload[summaryKey], 300) : "";
  const kind = typeof payload.kind === "string" ? payload.kind : "";
  return el(
    "li",
    { className: "hit" },
    el("span", { className: "rank", textContent: String(rank), "aria-hidden": "true" }),
    el(
      "article",
      {},
      el(
        "h3",
        {},
        titleKey ? payload[titleKey] : `Point ${point.id}`,
        kind && " ",
        kind && el("span", { className: "tag", textContent: kind }),
      ),
      typeof payload.signature === "string" && payload.signature
        ? el("code", { className: "signature", textContent: payload.signature })
        : "",
      summary && el("p", { className: "summary", textContent: summary }),
      more(point, payload, longKey && payload[longKey] !== summary ? longKey : null),
    ),
    filled === null ? "" : scoreOf(point.score, filled),
  );
}

function scoreOf(score, filled) {
  const fill = el("i");
  fill.style.width = `${(filled * 100).toFixed(1)}%`;
  const word = target.distance === "Euclid" || target.distance === "Manhattan" ? "distance" : "score";
  return el(
    "div",
    { className: "score", title: `${target.distance} ${word} ${score}` },
    el("span", { textContent: score.toFixed(3), "aria-label": `${word} ${score.toFixed(3)}` }),
    el("div", { className: "bar", "aria-hidden": "true" }, fill),
  );
}

function more(point, payload, longKey) {
  const details = el(
    "details",
    {},
    el("summary", { textContent: longKey === "doc" ? "Documentation" : longKey ? "Full text" : "All fields" }),
  );
  // Filled when opened: most never are.
  details.addEventListener("toggle", () => {
    if (!details.open || details.childElementCount > 1) return;
    if (longKey) details.append(el("pre", { className: "doc", tabIndex: 0, textContent: payload[longKey] }));
    const rest = Object.entries(payload).filter(([key, value]) => key !== longKey && value !== null);
    details.append(
      el(
        "dl",
        { className: "fields" },
        ...[["id", point.id], ...rest].flatMap(([key, value]) => [
          el("dt", { textContent: key }),
          el("dd", { textContent: typeof value === "string" ? value : json(value) }),
        ]),
      ),
    );
  });
  return details;
}

function json(value) {
  const line = JSON.stringify(value);
  return line.length <= 72 ? line : JSON.stringify(value, null, 1);
}

const shortened = (text, length) => (text.length <= length ? text : `${text.slice(0, length - 1)}…`);

// -- the address, keys, and the start ----------------------------------------------------------------

function remember() {
  const address = new URLSearchParams();
  if (view.collection) address.set("collection", view.collection);
  if (view.question) address.set("q", view.question);
  for (const value of view.chosen) address.append("only", value);
  history.replaceState(null, "", `?${address}`);
}

$("question").addEventListener("input", () => {
  view.question = $("question").value.trim();
  view.limit = PAGE_SIZE;
  clearTimeout(typing);
  typing = setTimeout(search, SEARCH_DELAY_MS);
});

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});

$("collection").addEventListener("change", () => open($("collection").value));

$("more").addEventListener("click", () => {
  view.limit = Math.min(RESULTS_MAX, view.limit + 2 * PAGE_SIZE);
  search();
});

$("facet-search").addEventListener("input", showFacets);

$("facet-clear").addEventListener("click", () => {
  view.chosen.clear();
  showFacets();
  $("facet-search").focus();
  search();
});

document.addEventListener("keydown", (event) => {
  const writing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "");
  if (event.key === "/" && !writing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    $("question").focus();
    $("question").select();
  }
});

document.addEventListener("visibilitychange", poll);

async function start() {
  const address = new URLSearchParams(location.search);
  $("question").value = view.question = address.get("q") ?? "";
  view.chosen = new Set(address.getAll("only"));
  status = null;
  await poll();
}

$("facets").open = matchMedia("(min-width: 761px)").matches;
setInterval(poll, POLL_MS);
start();
