// The page of a server: sends prompts, follows what becomes of them, and keeps the images until it is closed.
//
// Whatever a server or a person wrote is put into the page as text, never as HTML.
"use strict";

(() => {
  const element = (id) => document.getElementById(id);
  const [form, prompt, seed, list] = ["form", "prompt", "seed", "images"].map(element);
  const mostSeed = Number(list.dataset.mostSeed);
  const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
  const silent = "The server does not answer. Is it still running?";

  // Milliseconds between two looks at a request, and how often in a row a server may not answer.
  const pace = 400;
  const patience = 20;

  function seconds(value) {
    const whole = Math.max(1, Math.ceil(value));
    return whole < 100 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
  }

  // What the server says, and what it says is wrong. Throws only where nobody answers.
  async function ask(path, options = {}) {
    const answer = await fetch(path, { cache: "no-store", ...options });
    const content = await answer.json().catch(() => ({}));
    return { ok: answer.ok, status: answer.status, ...content };
  }

  function tell(words) {
    element("news").textContent = words;
  }

  function complain(words, field = null) {
    element("problem").textContent = words;
    for (const one of [prompt, seed]) one.setAttribute("aria-invalid", String(one === field));
    field?.focus();
  }

  // The seed in the field: null where it is empty, undefined where it is none.
  function seedGiven() {
    const text = seed.value.trim();
    if (!text) return null;
    return /^\d+$/.test(text) && Number(text) <= mostSeed ? Number(text) : undefined;
  }

  async function submit() {
    complain("");
    const wanted = { prompt: prompt.value };
    const number = seedGiven();
    if (number === undefined) return complain(`The seed is a whole number from 0 to ${mostSeed}, or empty.`, seed);
    if (number !== null) wanted.seed = number;
    const body = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(wanted) };
    let found;
    try {
      found = await ask("/api/images", body);
    } catch {
      return complain(silent);
    }
    if (found.ok) return follow(new Card(found));
    const sentence = found.error ?? `The server answered with status ${found.status}.`;
    complain(`${sentence[0].toUpperCase()}${sentence.slice(1)}.`, found.status === 422 ? prompt : null);
  }

  // One request on the page.
  class Card {
    constructor({ id, prompt: words, seed: number }) {
      this.path = `/api/images/${id}`;
      this.words = words;
      this.open = true; // is anything still to come?
      this.item = element("card").content.cloneNode(true).firstElementChild;
      this.part = (selector) => this.item.querySelector(selector);
      this.part(".words").textContent = words;
      this.part(".seed").textContent = `Seed ${number}`;
      this.part("progress").setAttribute("aria-label", `Progress of: ${words}`);
      this.part(".back").addEventListener("click", () => this.takeBack());
      this.part(".again").addEventListener("click", () => {
        [prompt.value, seed.value] = [words, number];
        prompt.focus();
        prompt.scrollIntoView({ block: "center" });
      });
      list.prepend(this.item);
      element("images_title").hidden = false;
    }

    // Where it stands, for the eye each time; for the ear where it is something new.
    show(words, share, spoken) {
      const bar = this.part("progress");
      if (share === null) bar.removeAttribute("value");
      else bar.value = Math.max(share, bar.hasAttribute("value") ? bar.value : 0);
      this.part(".state").textContent = words;
      if (spoken !== this.spoken) tell((this.spoken = spoken));
    }

    wait({ position, starting, left, waited }) {
      const line = position === 1 ? "next in line" : `place ${position} in line`;
      const first = starting ? "The server is still getting ready; " : "Waiting: ";
      const words = `${first}${line}${left === null ? "" : `, about ${seconds(left)}`}`;
      this.show(words, left === null ? null : waited / (waited + left + 0.01), `${first}${line}`);
    }

    draw({ step, left, waited, drawn }) {
      const words = `Drawing, step ${step.number} of ${step.of} (${step.part.replaceAll("_", " ")})`;
      const time = left === null ? `${seconds(drawn)} so far` : left < 0.5 ? "almost done" : `about ${seconds(left)} left`;
      const past = waited + drawn;
      const share = left === null ? (step.number - 0.5) / step.of : Math.min(0.97, past / (past + left + 0.01));
      this.part(".back").hidden = true; // it is too late to take it back
      this.show(`${words}: ${time}`, share, words);
    }

    // Shows the image; false where the server no longer has it.
    async finish({ drawn }) {
      const answer = await fetch(`${this.path}.png`, { cache: "no-store" });
      if (!answer.ok) return this.fail("The server no longer has this image. Draw it again.");
      const url = URL.createObjectURL(await answer.blob());
      const named = /filename="([^"]+)"/.exec(answer.headers.get("Content-Disposition") ?? "");
      const image = this.part("img");
      image.src = url;
      image.alt = `Drawn by a program: ${this.words}`;
      await image.decode().catch(() => {});
      image.classList.toggle("small", image.naturalWidth < 256);
      image.hidden = false;
      const link = this.part(".download");
      [link.href, link.download, link.hidden] = [url, named?.[1] ?? "image.png", false];
      link.setAttribute("aria-label", `Download: ${this.words}`);
      this.end(`Drawn in ${seconds(drawn)}.`, `Your image is ready: ${this.words}`);
    }

    fail(words) {
      this.part(".state").classList.add("bad");
      this.end(words, `No image: ${words}`);
    }

    end(words, spoken) {
      this.open = false;
      this.item.classList.remove("open");
      this.part("progress").hidden = this.part(".back").hidden = true;
      this.part(".again").hidden = false;
      this.part(".state").textContent = words;
      tell(spoken);
    }

    async takeBack() {
      await ask(this.path, { method: "DELETE" }).catch(() => {}); // how it ended is seen at the next look
    }
  }

  async function follow(card) {
    cards.add(card);
    let missed = 0;
    while (card.open) {
      let found = null;
      try {
        found = await ask(card.path);
        if (found.state === "done") await card.finish(found);
        missed = 0;
      } catch {
        if ((missed += 1) > patience) card.fail(silent);
        else card.part(".state").textContent = `${silent} Trying again …`;
      }
      if (found?.state === "waiting") card.wait(found);
      else if (found?.state === "drawing") card.draw(found);
      else if (found?.error) card.fail(`${found.error[0].toUpperCase()}${found.error.slice(1)}.`);
      if (card.open) await pause(pace * Math.min(5, 1 + missed));
    }
    cards.delete(card);
  }

  const cards = new Set(); // those that are followed

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!event.repeat) form.requestSubmit();
  });
  // Nobody will look at what a closed page asked for.
  window.addEventListener("pagehide", (event) => {
    if (!event.persisted) for (const { path } of cards) fetch(path, { method: "DELETE", keepalive: true }).catch(() => {});
  });
})();
