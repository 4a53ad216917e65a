"use strict";
// Text of the dataset reaches the page as text alone (textContent); no markup is ever made of it.
(() => {
  const $ = (id) => document.getElementById(id);
  const make = (name, className, text) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const data = JSON.parse($("data").textContent);
  const several = data.folders.length > 1;
  const masked = data.folders[0].kind === "masked";
  const state = { example: 0, list: [], colour: "", pane: 0, unit: -1, pinned: false };
  let panes = [];

  // ---- theme
  const theme = $("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const showTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.hidden = false;
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
  });
  dark.addEventListener("change", showTheme);
  showTheme();

  // ---- what a token can be coloured by
  const colours = [];
  const score = data.keys.find((key) => key.key === "score");
  if (score) colours.push(score);
  if (masked) colours.push({ key: "keep", label: "Kept or dropped", meaning: "Kept tokens are blue.", steps: [] });
  if (data.examples.some((e) => e.weight.some(Boolean))) {
    colours.push({ key: "weight", label: "Weight", unit: "", meaning: "What the token's loss is multiplied by.", signed: true, steps: [-1, -0.5, -0.01, 0.01, 0.5, 1] });
  }
  colours.push(...data.keys.filter((key) => key.key !== "score"));
  if (!masked && !colours.length) colours.push({ key: "keep", label: "Trained", meaning: "Trained tokens are blue.", steps: [] });
  for (const [title, keys] of [["Selection", ["score", "keep", "weight"]], ["Signals", null]]) {
    const group = make("optgroup");
    group.label = title;
    for (const colour of colours) {
      if (["score", "keep", "weight"].includes(colour.key) !== Boolean(keys)) continue;
      const option = make("option", "", colour.label);
      option.value = colour.key;
      group.append(option);
    }
    if (group.children.length) $("colour").append(group);
  }
  state.colour = colours[0].key;
  const colourOf = (key) => colours.find((colour) => colour.key === key);

  // ---- examples: what stands together on the screen
  const boundaries = (text) => {
    const found = new Set([text.length]);
    if (!("Segmenter" in Intl)) {
      for (let i = 0; i < text.length; i++) found.add(i);
      return found;
    }
    for (const { index } of new Intl.Segmenter("en", { granularity: "grapheme" }).segment(text)) found.add(index);
    return found;
  };
  // Tokens that share a character, as emoji and accents do, are one unit: it is never torn apart.
  const unitsOf = (example) => {
    if (example.units) return example.units;
    const whole = boundaries(example.text.join(""));
    const units = [];
    let end = 0;
    let first = 0;
    example.text.forEach((text, i) => {
      end += text.length;
      const last = i + 1 === example.text.length;
      const sameSide = last || example.response[i] === example.response[i + 1];
      if ((text === "" || !whole.has(end)) && sameSide && !last) return;
      units.push({ first, after: i + 1, text: example.text.slice(first, i + 1).join("") });
      first = i + 1;
    });
    example.place = [];
    let place = 0;
    for (const bit of example.response) example.place.push(bit === "1" ? place++ : -1);
    example.responses = place;
    return (example.units = units);
  };
  const valuesOf = (example, key, pane) => {
    if (key === "score") return example.score[pane];
    if (key === "weight") return example.weight[pane];
    return example.signals[key] || null;
  };
  const valueAt = (example, key, pane, i) => {
    const values = valuesOf(example, key, pane);
    return values && example.place[i] >= 0 ? values[example.place[i]] : null;
  };
  const kept = (example, pane, i) => Boolean(example.keep[pane]) && example.keep[pane][i] === "1";
  const joined = (example) => (example.whole ??= example.text.join(""));
  const answer = (example) => {
    if (example.answer === undefined) {
      let text = "";
      example.text.forEach((t, i) => { if (example.response[i] === "1") text += t; });
      example.answer = text.trim();
    }
    return example.answer;
  };

  // ---- the list
  const percent = (share) => (share === null ? "–" : `${Math.round(100 * share)} %`);
  const sorts = [["row", "order in the dataset", (e) => e.row]];
  if (data.examples.some((e) => e.surprise !== null)) sorts.push(["surprise", "most surprising: signals disagree", (e) => -(e.surprise ?? -1)]);
  if (several) sorts.push(["differ", "most disagreeing folders", (e) => -e.differ]);
  if (masked) sorts.push(["low", "least kept", (e) => e.kept[0] ?? 2], ["high", "most kept", (e) => -(e.kept[0] ?? -1)]);
  sorts.push(["long", "longest", (e) => -e.tokens]);
  for (const [value, label] of sorts) {
    const option = make("option", "", label);
    option.value = value;
    $("sort").append(option);
  }
  if (!masked) $("range").hidden = true;
  const matches = (example) => {
    const wanted = $("search").value.toLowerCase();
    const inside = !wanted || joined(example).toLowerCase().includes(wanted) || example.id.toLowerCase().includes(wanted);
    const share = 100 * (example.kept[0] ?? 0);
    const low = Number($("low").value || 0);
    const high = $("high").value === "" ? 100 : Number($("high").value);
    return inside && (!masked || (share >= low - 0.5 && share <= high + 0.5));
  };
  const showList = () => {
    const [, , key] = sorts.find(([value]) => value === $("sort").value);
    state.list = data.examples.map((e, i) => i).filter((i) => matches(data.examples[i]));
    state.list.sort((a, b) => key(data.examples[a]) - key(data.examples[b]) || a - b);
    $("found").textContent = `${state.list.length} of ${data.examples.length} examples`;
    $("list").replaceChildren(...state.list.map((i) => {
      const example = data.examples[i];
      const item = make("li");
      const button = make("button");
      button.type = "button";
      button.dataset.example = i;
      const snippet = make("bdi", "snippet", (answer(example) || joined(example)).slice(0, 90));
      const facts = make("span", "facts");
      facts.append(make("span", "", `row ${example.row}`));
      const more = { surprise: `surprise ${example.surprise}`, differ: `${percent(example.differ)} differ`, long: `${example.tokens} tokens` };
      facts.append(make("span", "", more[$("sort").value] || (masked ? `${percent(example.kept[0])} kept` : `${example.tokens} tokens`)));
      button.append(snippet, facts);
      item.append(button);
      return item;
    }));
    mark();
  };
  const mark = () => {
    for (const button of $("list").querySelectorAll("button")) {
      button.setAttribute("aria-current", String(Number(button.dataset.example) === state.example));
    }
    const at = state.list.indexOf(state.example);
    $("previous").disabled = at <= 0;
    $("next").disabled = at < 0 ? !state.list.length : at + 1 >= state.list.length;
  };
  const step = (by) => {
    const at = state.list.indexOf(state.example);
    const next = state.list[at < 0 ? 0 : at + by];
    if (next !== undefined) {
      show(next);
      const button = $("list").querySelector(`button[data-example="${next}"]`);
      if (button) button.scrollIntoView({ block: "nearest" });
    }
  };

  // ---- the text
  const stepOf = (value, colour) => {
    let at = 0;
    while (at < colour.steps.length && value > colour.steps[at]) at++;
    return at;
  };
  const ramp = (colour) => (colour.signed ? "d" : "s");
  const paint = () => {
    const example = data.examples[state.example];
    const colour = colourOf(state.colour);
    const strike = $("strike").checked;
    panes.forEach((pane, number) => {
      pane.text.classList.toggle("strike", strike);
      pane.units.forEach((element, u) => {
        const { first, after } = example.units[u];
        const response = example.response[after - 1] === "1";
        const keep = kept(example, number, after - 1);
        let step = "";
        if (response && (keep || $("all").checked)) {
          if (colour.key === "keep") step = keep ? "s2" : "";
          else {
            const value = valueAt(example, colour.key, number, after - 1);
            if (value !== null) step = ramp(colour) + stepOf(value, colour);
          }
        }
        const differs = several && $("differ").checked && response && example.keep.some((bits) => bits && example.keep[0] && bits.slice(first, after) !== example.keep[0].slice(first, after));
        element.className = ["t", step, response ? (keep ? "kept" : "dropped") : "prompt", element.dataset.special ? "special" : "", differs ? "differs" : ""].filter(Boolean).join(" ");
      });
    });
    point(state.pane, state.unit, false);
  };
  const write = (element, text) => {
    text.split("\n").forEach((line, i) => {
      if (i) {
        element.append(make("span", "nl"), "\n");
      }
      if (line) element.append(line);
    });
  };
  const show = (index) => {
    state.example = index;
    state.unit = -1;
    state.pinned = false;
    const example = data.examples[index];
    const units = unitsOf(example);
    const why = example.why.map((name) => data.why[name]).join(", ");
    $("heading").replaceChildren(`Row ${example.row} `, make("span", "", `${example.id} · ${example.tokens} tokens · shown as: ${why}`));
    panes = data.folders.map((folder, number) => {
      const pane = make("div", "pane");
      if (several) {
        const title = make("h4", "", folder.name);
        title.append(make("span", "", example.keep[number] ? `${percent(example.kept[number])} kept` : "does not have this example"));
        pane.append(title);
      }
      const text = make("div", "text");
      text.tabIndex = 0;
      text.dir = "auto";
      text.setAttribute("role", "group");
      text.setAttribute("aria-label", several ? `Tokens of row ${example.row}, ${folder.name}` : `Tokens of row ${example.row}`);
      text.dataset.pane = number;
      const elements = units.map((unit, u) => {
        const response = example.response[unit.after - 1] === "1";
        const element = make(response && !kept(example, number, unit.after - 1) ? "s" : "span", "t");
        element.dataset.unit = u;
        if (example.special[unit.after - 1] === "1") element.dataset.special = "1";
        write(element, unit.text);
        return element;
      });
      text.append(...elements);
      if (!example.keep[number]) text.hidden = true;
      pane.append(text);
      return { pane, text, units: elements };
    });
    if (example.first) panes[0].pane.prepend(make("p", "muted small", `${example.first} earlier tokens are not shown`));
    $("panes").replaceChildren(...panes.map((pane) => pane.pane));
    closeDetails();
    paint();
    mark();
    highlight($("search").value);
  };
  const highlight = (wanted) => {
    if (!window.CSS || !CSS.highlights) return;
    CSS.highlights.delete("found");
    if (!wanted) return;
    const ranges = [];
    for (const pane of panes) {
      const walker = document.createTreeWalker(pane.text, NodeFilter.SHOW_TEXT);
      const nodes = [];
      let text = "";
      while (walker.nextNode()) {
        nodes.push([text.length, walker.currentNode]);
        text += walker.currentNode.data;
      }
      const lower = text.toLowerCase();
      const locate = (at) => {
        let found = nodes[0];
        for (const node of nodes) if (node[0] <= at) found = node; else break;
        return [found[1], Math.min(at - found[0], found[1].length)];
      };
      for (let at = lower.indexOf(wanted.toLowerCase()); at >= 0 && ranges.length < 500; at = lower.indexOf(wanted.toLowerCase(), at + wanted.length)) {
        const range = new Range();
        range.setStart(...locate(at));
        range.setEnd(...locate(at + wanted.length - 1));
        range.setEnd(range.endContainer, Math.min(range.endOffset + 1, range.endContainer.length));
        ranges.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  };
  const number = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(3)).toString());
  const showLegend = () => {
    const colour = colourOf(state.colour);
    const legend = $("legend");
    legend.replaceChildren();
    const unit = colour.unit ? ` ${colour.unit}` : "";
    if (colour.steps.length && colour.steps[0] === colour.steps[5]) {
      legend.append(make("span", "", `${number(colour.steps[0])}${unit} for nearly all tokens`));
    } else if (colour.steps.length) {
      const bar = make("span", "ramp");
      bar.setAttribute("aria-hidden", "true");
      for (let i = 0; i < 7; i++) bar.append(make("i", ramp(colour) + i));
      legend.append(make("span", "", `${number(colour.steps[0])} or less`), bar, make("span", "", `more than ${number(colour.steps[5])}${unit}`));
    } else {
      legend.append(make("span", "t s2", " kept "));
    }
    if (masked) {
      const dropped = make("span", $("strike").checked ? "strike" : "");
      dropped.append(make("s", "t dropped", "dropped"));
      legend.append(dropped, make("span", "t prompt", "prompt"));
    }
    legend.append(make("p", "", colour.meaning));
  };

  // ---- one token
  const quoted = (text) => `“${text.replaceAll("\n", "⏎")}”`;
  const rankOf = (example, key, pane, i) => {
    const values = valuesOf(example, key, pane);
    const value = valueAt(example, key, pane, i);
    if (!values || value === null) return "";
    const known = values.filter((v) => v !== null);
    return `${known.filter((v) => v > value).length + 1} of ${known.length}`;
  };
  const row = (table, name, value, rank) => {
    const line = make("tr");
    const heading = make("th", "", name);
    heading.scope = "row";
    const cell = make("td", "", value);
    line.append(heading, cell, make("td", "rank", rank || ""));
    table.append(line);
  };
  const describe = (example, pane, unit) => {
    const aside = $("details");
    const { first, after, text } = example.units[unit];
    const close = make("button", "close", "✕");
    close.type = "button";
    close.setAttribute("aria-label", "Close");
    close.addEventListener("click", () => point(pane, -1, false));
    aside.replaceChildren(close, make("p", "what", text.replaceAll("\n", "⏎\n").replaceAll(" ", "␣") || "∅"));
    for (let i = first; i < after; i++) {
      const response = example.response[i] === "1";
      const position = example.first + i;
      aside.append(make("p", "state", after - first > 1 ? `part ${i - first + 1} of ${after - first} of this character` : response ? `token ${example.place[i] + 1} of ${example.responses} of the response` : "prompt: never trained"));
      const table = make("table");
      row(table, "id", String(example.ids[i]));
      row(table, "position", String(position));
      if (response) {
        data.folders.forEach((folder, number) => {
          const name = several ? `, ${folder.name}` : "";
          if (masked) row(table, `mask${name}`, example.keep[number] ? (kept(example, number, i) ? "kept" : "dropped") : "not there");
          for (const key of ["score", "weight"]) {
            if (valuesOf(example, key, number)) row(table, key + name, numberText(valueAt(example, key, number, i)), rankOf(example, key, number, i));
          }
        });
        let checkpoint = null;
        for (const key of data.keys) {
          if (key.key === "score" || !example.signals[key.key]) continue;
          if (key.checkpoint && key.checkpoint !== checkpoint) {
            checkpoint = key.checkpoint;
            const line = make("tr", "group");
            const heading = make("th", "", checkpoint);
            heading.colSpan = 3;
            line.append(heading);
            table.append(line);
          }
          const unit = ["", "share", "probability", "tokens"].includes(key.unit) ? "" : ` (${key.unit})`;
          row(table, key.short + unit, numberText(valueAt(example, key.key, pane, i)), rankOf(example, key.key, pane, i));
        }
      }
      aside.append(table);
    }
    if (example.response[after - 1] === "1" && data.keys.length) aside.append(make("p", "state", "“3 of 66”: the third highest of this answer."));
    aside.classList.add("open");
  };
  const numberText = (value) => (value === null ? "none" : number(value));
  const closeDetails = () => {
    $("details").classList.remove("open");
    $("details").replaceChildren(make("p", "muted", "Point at a token, tap it, or move with the arrow keys, to see everything that is known of it."));
    $("spoken").textContent = "";
  };
  const point = (pane, unit, spoken) => {
    for (const old of $("panes").querySelectorAll(".now")) old.classList.remove("now");
    const example = data.examples[state.example];
    state.pane = pane;
    state.unit = unit;
    if (unit < 0) {
      state.pinned = false;
      closeDetails();
      return;
    }
    for (const each of panes) each.units[unit].classList.add("now");
    describe(example, pane, unit);
    if (spoken) {
      const last = example.units[unit].after - 1;
      const value = valueAt(example, state.colour, pane, last);
      const label = colourOf(state.colour).label;
      const what = example.response[last] === "1" ? (kept(example, pane, last) ? "kept" : "dropped") : "prompt";
      $("spoken").textContent = `${quoted(example.units[unit].text)}, ${what}${value === null ? "" : `, ${label} ${number(value)}`}`;
      panes[pane].units[unit].scrollIntoView({ block: "nearest" });
    }
  };

  // ---- events
  $("list").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) show(Number(button.dataset.example));
  });
  for (const id of ["search", "low", "high"]) $(id).addEventListener("input", () => {
    showList();
    if (state.list.length && !state.list.includes(state.example)) show(state.list[0]);
    highlight($("search").value);
  });
  $("sort").addEventListener("change", () => {
    showList();
    if (state.list.length) show(state.list[0]);
  });
  $("colour").addEventListener("change", () => {
    state.colour = $("colour").value;
    showLegend();
    paint();
  });
  for (const id of ["strike", "all", "differ"]) $(id).addEventListener("change", () => {
    showLegend();
    paint();
  });
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  const target = (event) => {
    const element = event.target.closest && event.target.closest(".t[data-unit]");
    return element ? [Number(element.closest(".text").dataset.pane), Number(element.dataset.unit)] : null;
  };
  $("panes").addEventListener("pointerover", (event) => {
    const found = target(event);
    if (found && !state.pinned && event.pointerType === "mouse") point(...found, false);
  });
  $("panes").addEventListener("click", (event) => {
    const found = target(event);
    if (!found || String(getSelection())) return;
    const same = state.pinned && state.unit === found[1] && state.pane === found[0];
    state.pinned = !same;
    point(found[0], same ? -1 : found[1], false);
    if (!same) state.pinned = true;
  });
  $("panes").addEventListener("keydown", (event) => {
    const text = event.target.closest(".text");
    if (!text || event.ctrlKey || event.metaKey || event.altKey) return;
    const pane = Number(text.dataset.pane);
    const example = data.examples[state.example];
    const firstAnswer = example.units.findIndex((unit) => example.response[unit.first] === "1");
    const last = example.units.length - 1;
    const moves = {
      ArrowRight: state.unit < 0 ? firstAnswer : state.unit + 1,
      ArrowLeft: state.unit < 0 ? firstAnswer : state.unit - 1,
      Home: firstAnswer,
      End: last,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    state.pinned = true;
    const unit = Math.max(0, Math.min(last, moves[event.key]));
    state.pinned = true;
    point(pane, unit, true);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && state.unit >= 0) point(state.pane, -1, false);
    if (!$("shortcuts").checked || event.target.closest("input, select, textarea")) return;
    const actions = {
      j: () => step(1),
      k: () => step(-1),
      c: () => {
        const at = colours.findIndex((colour) => colour.key === state.colour);
        $("colour").value = state.colour = colours[(at + 1) % colours.length].key;
        showLegend();
        paint();
        $("spoken").textContent = `coloured by ${colourOf(state.colour).label}`;
      },
      d: () => {
        $("strike").checked = !$("strike").checked;
        paint();
      },
      "/": () => $("search").focus(),
    };
    if (actions[event.key]) {
      event.preventDefault();
      actions[event.key]();
    }
  });
  const follow = () => {
    const found = /^#row-(\d+)$/.exec(location.hash);
    if (!found) return;
    const index = data.examples.findIndex((example) => example.row === Number(found[1]));
    if (index < 0) return;
    show(index);
    $("tokens").scrollIntoView();
    $("heading").focus({ preventScroll: true });
  };
  window.addEventListener("hashchange", follow);
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#row-"]');
    if (!link) return;
    if (link.getAttribute("href") === location.hash) follow();
    const cell = link.closest("[data-find]");
    if (cell) setTimeout(() => highlight(cell.dataset.find));
  });

  $("differ-label").hidden = !several;
  $("colour").value = state.colour;
  $("viewer").hidden = false;
  if (matchMedia("(max-width: 760px)").matches) $("chooser").open = false;
  showList();
  showLegend();
  if (data.examples.length) show(state.list[0]);
  follow();
})();
