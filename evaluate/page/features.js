"use strict";
// What draws the feature pages. Data comes from scripts that call granary.words, .index and .latents with JSON. Text
// from data goes into the document by textContent alone, so none of it can become markup.
const granary = (() => {
  let words = [], index = null, latents = {};
  const PAGE = 100, VISIBLE = { "\n": "⏎", "\r": "␍", "\t": "⇥" };

  function make(tag, className, ...children) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    node.append(...children);  // strings become text nodes
    return node;
  }
  const number = (value) => value === null || value === undefined ? "–" : Number(value.toPrecision(3)).toString();
  const percent = (value) => value === null || value === undefined ? "–" : `${number(100 * value)} %`;
  const visible = (text) => text.replace(/[\n\r\t]/g, (c) => VISIBLE[c]);

  // Bars [count, title] over a line of labels [share of the width, text].
  function histogram(node, bars, labels) {
    const most = Math.max(1, ...bars.map((bar) => bar[0]));
    const row = make("div", "columns");
    for (const [count, title, className] of bars) {
      const bar = make("i", className || "");
      bar.style.height = count ? `${Math.max(2, 100 * count / most)}%` : "0";
      bar.title = title;
      row.append(make("span", "", bar));
      row.lastChild.title = title;
    }
    const axis = make("div", "ticks");
    for (const [share, text] of labels) {
      const tick = make("span", "", text);
      tick.style.left = `${100 * share}%`;
      tick.classList.toggle("first", share <= 0);
      tick.classList.toggle("last", share >= 1);
      axis.append(tick);
    }
    node.append(row, axis);
  }

  // ---- one latent

  function sparse(list) {
    const found = new Map();
    for (let i = 0; i < list.length; i += 2) found.set(list[i], list[i + 1]);
    return found;
  }

  function text(label, tokens, values, replaced, centre, most, readout) {
    const line = make("p", "text", make("b", "which", label));
    const run = make("span", "run");
    tokens.forEach((token, i) => {
      const shown = replaced.has(i) ? replaced.get(i) : token, value = values.get(i) || 0;
      const node = make("span", "token", visible(words[shown]));
      if (value > 0) {
        node.style.setProperty("--v", Math.min(1, value / most).toFixed(3));
        node.classList.add("on");
      }
      if (i === centre) node.classList.add("centre");
      if (replaced.has(i)) node.classList.add("replaced");
      const was = replaced.has(i) ? `, in place of “${visible(words[token])}”` : "";
      node.title = `“${visible(words[shown])}” ${number(value)}${was}`;
      node.addEventListener("click", () => { readout.textContent = node.title; });
      run.append(node);
    });
    line.append(run);
    return line;
  }

  function example(line, most) {
    const [doc, window_, position, heldOut, centre, tokens, values, maskedValues, replaced] = line;
    const clean = sparse(values), value = clean.get(centre) || 0, readout = make("span", "readout");
    const head = make("header", "", make("b", "", number(value)));
    const pair = make("div", "pair", text("clean", tokens, clean, new Map(), centre, most, readout));
    if (maskedValues) {
      const masked = sparse(maskedValues), beside = masked.get(centre) || 0;
      head.append(" clean, ", make("b", "", number(beside)), " masked");
      pair.append(text("masked", tokens, masked, sparse(replaced), centre, most, readout));
    }
    const place = `document ${doc}, window ${window_}, position ${position}${heldOut ? ", held out" : ""}`;
    head.append(make("small", "", place), readout);
    return make("article", "example", head, pair);
  }

  function section(title, hint, ...children) {
    const node = make("section", "", make("h2", "", title));
    if (hint) node.append(make("p", "hint", hint));
    node.append(...children);
    return node;
  }

  function facts(data) {
    const list = make("dl", "facts");
    const add = (term, value) => list.append(make("dt", "", term), make("dd", "", value));
    if (data.masked !== undefined) add("in masked text", `fires on ${data.masked.toLocaleString("en")} rows`);
    if (data.masked !== undefined && data.count) {
      add("kept when masked", `${percent(data.kept[0])} where the row's own token is not replaced, ${percent(data.kept[1])} where it is`);
    }
    return list;
  }

  function bins(data) {
    const [edges, counts] = data.bins, node = make("div", "histogram");
    node.setAttribute("role", "img");
    node.setAttribute("aria-label", "How often the latent has which value");
    const bars = counts.map((count, i) => [count, `${number(edges[i])} to ${number(edges[i + 1])}: ${count.toLocaleString("en")}`]);
    histogram(node, bars, [[0, number(edges[0])], [1, number(edges[edges.length - 1])]]);
    return node;
  }

  function lens(title, pairs) {
    const body = make("tbody", "");
    for (const [token, logit] of pairs) {
      const name = make("th", "", make("span", "token", visible(words[token])));
      name.scope = "row";
      body.append(make("tr", "", name, make("td", "", number(logit))));
    }
    return make("figure", "", make("figcaption", "", title), make("table", "slim", body));
  }

  function near(pairs) {
    const list = make("ul", "near");
    for (const [other, cosine, hasPage] of pairs) {
      const link = make(hasPage ? "a" : "span", "", String(other));
      if (hasPage) link.href = `${other}.html`;
      list.append(make("li", "", link, make("small", "", cosine.toFixed(2))));
    }
    return list;
  }

  function showLatent(latent) {
    const data = latents[latent], node = document.getElementById("latent");
    document.addEventListener("keydown", onArrow);
    node.append(facts(data));
    const most = data.top.length ? Math.max(...data.top.map((line) => sparse(line[6]).get(line[4]) || 0)) : 1;
    if (data.bins) node.append(section("Values", "How often each value was seen, on a scale that doubles every eight bars.", bins(data)));
    if (data.top.length) {
      const hint = "Shade is the latent's value, on one scale for the whole page; the framed token is the example's own. Touch a token for its value.";
      node.append(section("Top examples", `The largest value of each window, best windows first. ${hint}`, ...data.top.map((line) => example(line, most))));
    }
    if (data.bands.length) {
      const parts = data.bands.flatMap(([low, high, lines]) => [make("h3", "", `${number(low)} to ${number(high)}`), ...lines.map((line) => example(line, most))]);
      node.append(section("Quantile examples", "From each fifth of its firings by value, highest first: drawn evenly, so this is what the latent mostly does.", ...parts));
    }
    if (data.up) {
      const hint = "The decoder row through the model's final norm and unembedding: logits, less their mean over the vocabulary.";
      node.append(section("Logit lens", hint, make("div", "lens", lens("raises", data.up), lens("lowers", data.down))));
    }
    node.append(section("Nearest latents", "By the cosine of their decoder rows.", near(data.near)));
  }

  function onArrow(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    const link = event.key === "/" || event.key === "Escape" ? document.getElementById("home") : rel && document.querySelector(`a[rel=${rel}]`);
    if (link) { event.preventDefault(); location.href = link.href; }
  }

  // ---- the index

  function tokens(list, label) {
    const cell = make("td", "tokens");
    cell.dataset.label = label;
    for (const token of list) cell.append(make("span", "token", visible(words[token])), " ");
    return cell;
  }

  function row(i) {
    const link = make("a", "", String(index.latent[i])), head = make("th", "", link);
    link.href = `latents/${index.latent[i]}.html`;
    head.scope = "row";
    const line = make("tr", index.count[i] ? "" : "dead", head);
    line.append(make("td", "", index.count[i] ? percent(index.count[i] / index.rows) : "dead"), make("td", "", number(index.max[i])));
    if (index.kept) line.append(make("td", "", percent(index.kept[i])));
    line.append(tokens(index.peaks[i], "at"));
    if (index.up) line.append(tokens(index.up[i], "raises"));
    return line;
  }

  function matches(query) {
    const all = index.latent.map((_, i) => i), asked = query.trim().toLowerCase();
    if (!asked) return all;
    if (/^\d+$/.test(asked)) return all.filter((i) => String(index.latent[i]).startsWith(asked) || hasToken(i, asked));
    return all.filter((i) => hasToken(i, asked));
  }
  const hasToken = (i, asked) => [...index.peaks[i], ...(index.up ? index.up[i] : [])].some((token) => words[token].toLowerCase().includes(asked));

  function sorted(found, by) {
    const name = by.replace("-", ""), sign = by.startsWith("-") ? 1 : -1, column = index[name];
    if (name === "latent") return found;
    const value = (i) => column[i] === null ? (sign > 0 ? Infinity : -Infinity) : column[i];
    return found.sort((a, b) => value(a) === value(b) ? a - b : sign * (value(a) < value(b) ? -1 : 1));
  }

  function densities() {
    const low = Math.floor(Math.log10(1 / index.rows) * 2), bars = [];
    const counts = new Array(-low + 1).fill(0), dead = index.count.filter((count) => !count).length;
    for (const count of index.count) if (count) counts[Math.min(counts.length - 1, Math.floor(Math.log10(count / index.rows) * 2) - low)]++;
    bars.push([dead, `dead: ${dead.toLocaleString("en")}`, "dead"]);
    counts.forEach((count, i) => bars.push([count, `${percent(10 ** ((i + low) / 2))} to ${percent(10 ** ((i + low + 1) / 2))} of rows: ${count.toLocaleString("en")} latents`]));
    histogram(document.getElementById("density"), bars, [[0, "dead"], [1 / bars.length, percent(10 ** (low / 2))], [1, "every row"]]);
  }

  function showIndex() {
    const search = document.getElementById("search"), sort = document.getElementById("sort");
    const body = document.querySelector("#latents tbody"), more = document.getElementById("more");
    let found = [], n = 0;
    const fill = () => {
      body.append(...found.slice(n, n + PAGE).map(row));
      n = Math.min(n + PAGE, found.length);
      more.hidden = n >= found.length;
      document.getElementById("n").textContent = `${found.length.toLocaleString("en")} latents`;
    };
    const update = () => {
      found = sorted(matches(search.value), sort.value);
      const asked = found.findIndex((i) => String(index.latent[i]) === search.value.trim());
      if (asked > 0) found.unshift(...found.splice(asked, 1));  // the very latent, for Enter to open
      body.replaceChildren();
      n = 0;
      fill();
      history.replaceState(null, "", `#${new URLSearchParams({ q: search.value, sort: sort.value })}`);
    };
    const state = new URLSearchParams(location.hash.slice(1));
    search.value = state.get("q") || "";
    if ([...sort.options].some((option) => option.value === state.get("sort"))) sort.value = state.get("sort");
    search.addEventListener("input", update);
    sort.addEventListener("change", update);
    more.addEventListener("click", fill);
    document.getElementById("find").addEventListener("submit", (event) => {
      event.preventDefault();
      const first = body.querySelector("a");
      if (first) location.href = first.href;
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && document.activeElement !== search) { event.preventDefault(); search.focus(); }
    });
    densities();
    update();
  }

  return {
    words: (list) => { words = list; },
    index: (columns) => { index = columns; },
    latents: (found) => { latents = found; },
    showIndex,
    showLatent,
  };
})();
