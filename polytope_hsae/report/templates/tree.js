// The tree: parents as closed rows that are filled when they are opened. All text goes through textContent.
(() => {
  const ROWS_AT_ONCE = 12;
  const OWN_WORDS = 2;
  const data = JSON.parse(document.getElementById("tree-data").textContent);
  const byId = (id) => document.getElementById(id);
  const list = byId("tree-list");
  const more = byId("tree-more");
  let shown = []; // parents that match and are not drawn yet
  let query = ""; // what is searched for, in lower case
  let largest = 1; // firing rate of the parent that fires most often

  function element(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children.filter((child) => child !== null));
    return made;
  }
  const percent = (share) => `${share >= 0.0995 ? Math.round(100 * share) : +(100 * share).toPrecision(2)}\u00a0%`;
  const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "→") || "∅";
  // Text with what was searched for marked.
  function marked(text) {
    const parts = [];
    let from = 0;
    if (query && !/^#?\d+$/.test(query)) {
      const lower = text.toLowerCase();
      for (let at = lower.indexOf(query); at >= 0; at = lower.indexOf(query, from)) {
        parts.push(text.slice(from, at), element("mark", "", text.slice(at, at + query.length)));
        from = at + query.length;
      }
    }
    return [...parts, text.slice(from)];
  }
  const textOf = (tokens) => tokens.map((token) => visible(data.tokens[token])).join("");
  // A word by itself: without its leading space, or with a dot where it has none.
  const word = (token) => (data.tokens[token].startsWith(" ") ? visible(data.tokens[token].slice(1)) : `·${visible(data.tokens[token])}`);
  const parentName = (parent) => (parent.concept === null ? null : data.concepts[parent.concept].name);

  function childName(row) {
    if (row === null) return null;
    let p = data.first_child.length - 1;
    while (data.first_child[p] > row) p -= 1;
    return data.concepts[p].children[row - data.first_child[p]];
  }

  // What a search looks through: names and words of the parent and of its children, in lower case.
  function text(parent) {
    if (parent.text === undefined) {
      const words = (one) => [...one.reads, ...one.writes, ...one.fires].map((pair) => data.tokens[pair[0]]);
      const parts = [parentName(parent) || "", ...words(parent)];
      for (const child of parent.children) parts.push(childName(child.concept) || "", ...words(child));
      parent.text = parts.join(" ").toLowerCase();
    }
    return parent.text;
  }

  function matches(parent) {
    return /^#?\d+$/.test(query) ? parent.latent === Number(query.replace("#", "")) : text(parent).includes(query);
  }

  function words(title, pairs, describe) {
    if (!pairs.length) return null;
    const items = pairs.map((pair) => {
      const item = element("li", "", ...marked(word(pair[0])));
      item.title = describe(pair);
      return item;
    });
    return element("div", "words", element("h3", "small", title), element("ul", "tokens", ...items));
  }

  function wordLists(latent) {
    const score = (pair) => `score ${pair[1]}`;
    return element(
      "div",
      "lists",
      words("Reads", latent.reads, score),
      words("Writes", latent.writes, score),
      words("Fires on", latent.fires, (one) => `mean activation ${one[1]} on ${one[2]} rows`),
    );
  }

  function contexts(found) {
    if (!found.length) return null;
    const items = found.map((context) => {
      const values = new Map(context.values);
      const top = Math.max(...values.values());
      const line = element("p", "context");
      context.tokens.forEach((token, place) => {
        const [space, rest] = visible(data.tokens[token]).match(/^(\s*)(.*)$/s).slice(1);
        const value = values.get(place);
        if (place || space.length > 1) line.append(space);
        const shownToken = element("span", value === top ? "top" : "", rest);
        if (value) {
          shownToken.style.setProperty("--heat", `${Math.round((75 * value) / top)}%`);
          shownToken.title = `activation ${value}`;
        }
        line.append(shownToken);
      });
      line.append(element("span", "place", ` document ${context.doc}, token ${context.pos}, activation ${top}`));
      return element("li", "", line);
    });
    return element("div", "contexts", element("h3", "small", "Contexts"), element("ul", "", ...items));
  }

  function nextWords(title, pairs) {
    const top = Math.max(...pairs.map((pair) => pair[1]));
    const rows = pairs.map(([token, probability]) => {
      const bar = element("span", "probability");
      bar.style.width = `${Math.round((100 * probability) / top)}%`;
      return element("tr", "", element("th", "", word(token)), element("td", "", percent(probability)), element("td", "bars", bar));
    });
    return element("table", "next", element("caption", "", title), element("tbody", "", ...rows));
  }

  function steering(found) {
    if (found === null) return null;
    const box = element("div", "steering", element("h3", "small", "Steering"));
    if (found.alpha === null) {
      box.append(element("p", "", `Steering with this parent did not raise its concept's log-odds by ${data.nats} nats.`));
      return box;
    }
    const chance = found.chance === null ? "" : ` (along another concept's direction: ${found.chance})`;
    box.append(
      element("p", "", `Adding ${found.alpha} of its write direction raises the concept's log-odds by ${found.effect} nats. Other words shift by ${found.leakage} nats${chance}.`),
    );
    if (found.example) {
      box.append(
        element("p", "context", `${textOf(found.example.context)} `, element("b", "", "▁")),
        element("div", "pair", nextWords("Next word before", found.example.before), nextWords("after", found.example.after)),
      );
    }
    return box;
  }

  const firstWords = (latent) => (latent.reads.length ? latent.reads : latent.fires).slice(0, 8);
  const joined = (pairs) => marked(pairs.map((pair) => word(pair[0])).join(", "));
  // A latent without a concept goes by its first words; the others follow.
  const ownName = (latent) => (firstWords(latent).length ? joined(firstWords(latent).slice(0, OWN_WORDS)) : ["dead"]);

  function preview(latent, named, before = []) {
    return element("span", "preview", ...before, ...joined(firstWords(latent).slice(named ? 0 : OWN_WORDS)));
  }

  // Where a match is that a closed parent does not show: "writes: music; child .3: song".
  function hidden(parent) {
    if (!query || /^#?\d+$/.test(query)) return [];
    const has = (text) => text.toLowerCase().includes(query);
    if (has(parentName(parent) || "") || firstWords(parent).some((pair) => has(data.tokens[pair[0]]))) return [];
    const among = (pairs) => pairs.map((pair) => word(pair[0])).filter(has);
    const places = [["reads", parent.reads], ["writes", parent.writes], ["fires on", parent.fires]].map(([where, pairs]) => [where, among(pairs)]);
    for (const child of parent.children) {
      places.push([`child .${child.index}`, [...new Set([childName(child.concept) || "", ...among([...child.reads, ...child.writes, ...child.fires])])].filter(has)]);
    }
    const found = places.find((place) => place[1].length);
    return found ? [`${found[0]}: `, ...marked(found[1].slice(0, 3).join(", ")), " · "] : [];
  }

  // A row that builds its contents when it is first opened.
  function row(className, summary, fill) {
    const details = element("details", className, summary);
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(element("div", "inside", ...fill().filter(Boolean)));
    });
    return details;
  }

  function childRow(child) {
    const name = childName(child.concept);
    const summary = element(
      "summary",
      "",
      element("span", "number", `.${child.index}`),
      element("span", "name", ...(name ? ["started as ", ...marked(name)] : ownName(child))),
      element("span", "use", child.share === null ? "" : percent(child.share)),
      preview(child, name),
    );
    return row("child", summary, () => [wordLists(child), contexts(child.contexts)]);
  }

  function parentRow(parent) {
    const name = parentName(parent);
    const bar = element("span", "meter", element("span", ""));
    bar.firstChild.style.width = `${(100 * parent.share) / largest}%`;
    const summary = element(
      "summary",
      "",
      element("span", "number", `${parent.latent}`),
      element("span", parent.mapped ? `name ${parent.purity > data.chance ? "concept" : "mapped"}` : "name", ...(name === null ? ownName(parent) : marked(name))),
      element("span", "use", bar, percent(parent.share)),
      element("span", "purity", parent.purity !== null ? parent.purity.toFixed(2) : parent.mapped ? "too few rows" : ""),
      preview(parent, name, hidden(parent)),
    );
    return row("parent", summary, () => [
      numbers(parent),
      wordLists(parent),
      contexts(parent.contexts),
      steering(parent.steering),
      parent.children.length ? element("div", "children", element("h3", "small", "Children: firing rate where the parent is on, and what they read"), ...parent.children.map(childRow)) : null,
    ]);
  }

  function numbers(parent) {
    const parts = [];
    if (parent.concept !== null) parts.push(parent.mapped ? "fits this concept best on training rows" : "initialised from this concept; another parent fits it better");
    parts.push(`firing rate ${percent(parent.share)}`);
    if (parent.mean !== null) parts.push(`mean activation ${parent.mean} where on`);
    if (parent.mapped && parent.purity === null) parts.push(`purity not measured: fewer than ${data.min_rows} held-out rows`);
    for (const key of ["purity", "leakage", "recall"]) if (parent[key] !== null) parts.push(`${key} ${parent[key].toFixed(2)}`);
    return element("p", "muted", parts.join(" · "));
  }

  function showMore() {
    const next = shown.splice(0, ROWS_AT_ONCE);
    list.append(...next.map(parentRow));
    more.hidden = !shown.length;
  }

  const named = (parent) => 2 * parent.mapped + (parent.concept !== null);
  const byShare = (a, b) => b.share - a.share || a.latent - b.latent;
  const ORDERS = {
    purity: (a, b) => (b.purity ?? -1) - (a.purity ?? -1) || named(b) - named(a) || byShare(a, b),
    share: byShare,
    concept: (a, b) => named(b) - named(a) || (parentName(a) ?? "").localeCompare(parentName(b) ?? "") || byShare(a, b),
    latent: (a, b) => a.latent - b.latent,
  };

  function update() {
    const chosen = document.querySelector("input[name=arm]:checked");
    if (!chosen) return;
    const arm = data.arms[chosen.value];
    query = byId("tree-search").value.trim().toLowerCase();
    const found = query ? arm.parents.filter((parent) => matches(parent)) : [...arm.parents];
    shown = found.sort(ORDERS[byId("tree-order").value]);
    const kind = arm.n_children ? "parents" : "latents";
    const held = arm.parents.length;
    const all = held < arm.n_parents ? `${held} of ${arm.n_parents} ${kind}: those with a concept, then the highest firing rates.` : `All ${held} ${kind}.`;
    byId("tree-count").textContent = query ? `${found.length} of ${held} ${kind} match.` : all;
    largest = Math.max(...arm.parents.map((parent) => parent.share));
    list.replaceChildren();
    showMore();
  }

  for (const input of document.querySelectorAll("input[name=arm], #tree-order")) input.addEventListener("change", update);
  byId("tree-search").addEventListener("input", update);
  more.addEventListener("click", showMore);
  byId("tree-controls").hidden = false;
  update();
  const first = list.querySelector("details");
  if (first) first.open = true; // shows what a parent holds
})();
