// The page of a study: shows one question after another and keeps the answers.
//
// What it shows stands as JSON in the page (page.py writes it). Each answer is an entry of its own in localStorage,
// named after study, rater and question: a closed tab loses nothing, two tabs do not undo each other, and several raters
// may use one browser. The file that it saves is what answers.py reads.
"use strict";

(() => {
  const element = (id) => document.getElementById(id);
  const study = JSON.parse(element("study").textContent);
  const questions = study.questions;
  const choices = ["left", "right", "not_sure"];
  const bar = document.querySelector("header .bar");

  let rater = "";
  let answers = new Map(); // id of a question -> {choice, seconds, at}
  let position = 0; // of the question in sight
  let inSight = false; // may it be answered? not before both images are there
  let since = 0; // when they appeared
  let shown = 0; // counts what was shown, so that images that come late are known
  let kept = true; // does this browser keep answers?
  let unsaved = false; // are there answers that no file has?

  // What the browser keeps.

  const prefix = () => `human-study/${study.study}/${encodeURIComponent(rater)}/`;

  function recall() {
    answers = new Map();
    try {
      for (const question of questions) {
        const text = localStorage.getItem(prefix() + question.id);
        if (text !== null) answers.set(question.id, JSON.parse(text));
      }
      localStorage.setItem(`human-study/${study.study}`, rater);
    } catch {
      keepsNothing();
    }
  }

  function keep(id, answer) {
    answers.set(id, answer);
    unsaved = true;
    try {
      localStorage.setItem(prefix() + id, JSON.stringify(answer));
    } catch {
      keepsNothing();
    }
  }

  function keepsNothing() {
    kept = false;
    element("not_kept").hidden = false;
  }

  window.addEventListener("storage", (event) => {
    if (!rater || !event.key?.startsWith(prefix()) || event.newValue === null) return;
    answers.set(Number(event.key.slice(prefix().length)), JSON.parse(event.newValue));
    progress();
    mark();
  });

  window.addEventListener("beforeunload", (event) => {
    if (!kept && unsaved) event.preventDefault();
  });

  // The file.

  function save() {
    const rows = questions.filter(({ id }) => answers.has(id)).map(({ id }) => ({ question: id, ...answers.get(id) }));
    const content = { format: study.format, study: study.study, rater, answers: rows };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1) + "\n"], { type: "application/json" }));
    link.download = `answers-${study.study.slice(0, 6)}-${rater.replace(/[^\p{L}\p{N}]+/gu, "_")}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    unsaved = false;
    element("end_note").textContent = `Saved as ${link.download}, where your browser puts what it downloads.`;
  }

  async function load(file) {
    let content;
    try {
      content = JSON.parse(await file.text());
    } catch {
      content = {};
    }
    if (content.study !== study.study || !Array.isArray(content.answers)) {
      element("load_note").textContent = `${file.name} holds no answers to these questions.`;
      return;
    }
    element("name").value = rater = String(content.rater);
    recall();
    const ids = new Set(questions.map(({ id }) => id));
    for (const { question, ...answer } of content.answers) {
      const newer = !answers.has(question) || answers.get(question).at < answer.at;
      if (ids.has(question) && choices.includes(answer.choice) && newer) keep(question, answer);
    }
    named();
    element("load_note").textContent = `${answers.size} answers are there. Go on when you are ready.`;
  }

  // What is on the page.

  function only(id) {
    for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== id;
    document.querySelector("header").hidden = id === "welcome";
    inSight = false;
    shown += 1;
  }

  function progress() {
    const percent = (100 * answers.size) / questions.length;
    bar.firstElementChild.style.width = `${percent}%`;
    bar.setAttribute("aria-valuenow", Math.floor(percent));
    element("done").textContent = `${answers.size.toLocaleString()} of ${questions.length.toLocaleString()} answered`;
  }

  const firstOpen = () => questions.findIndex(({ id }) => !answers.has(id));
  const ofKind = (kind) => questions.filter((question) => question.kind === kind);

  function instruct() {
    const { kind } = questions[position];
    const { title, question, instructions, not_sure } = study.kinds[kind];
    const names = [...new Set(questions.map((question) => question.kind))];
    only("instructions");
    progress();
    element("place").textContent = title;
    element("part").textContent = `Part ${names.indexOf(kind) + 1} of ${names.length}, ${ofKind(kind).length.toLocaleString()} questions`;
    element("ask").textContent = question;
    element("paragraphs").replaceChildren(...instructions.map((text) => {
      const paragraph = document.createElement("p");
      paragraph.textContent = text;
      return paragraph;
    }));
    element("not_sure_key").hidden = element("not_sure_text").hidden = !not_sure;
    element("start").focus();
  }

  function show() {
    const question = questions[position];
    const kind = study.kinds[question.kind];
    const own = ofKind(question.kind);
    only("question");
    progress();
    document.activeElement?.blur();
    element("place").textContent = `${kind.title} ${own.indexOf(question) + 1} of ${own.length.toLocaleString()}`;
    element("asked").textContent = kind.question;
    element("caption").hidden = !kind.shows_caption;
    element("caption").textContent = question.caption ?? "";
    element("not_sure").hidden = !kind.not_sure;
    element("back").disabled = position === 0;
    element("broken").hidden = true;
    mark();

    // Both images appear at once: which of them came first says something about its file.
    const section = element("question");
    const turn = shown;
    section.classList.add("loading");
    const images = ["left", "right"].map((side) => {
      const image = element(side).querySelector("img");
      image.src = question[side];
      return image.decode();
    });
    Promise.all(images).then(
      () => {
        if (turn !== shown) return;
        section.classList.remove("loading");
        since = performance.now();
        inSight = true;
        ahead();
      },
      () => {
        if (turn === shown) element("broken").hidden = false;
      },
    );
  }

  function ahead() {
    for (const question of questions.slice(position + 1, position + 3)) {
      for (const side of ["left", "right"]) new Image().src = question[side];
    }
  }

  function mark() {
    const answer = answers.get(questions[position].id);
    for (const choice of choices) element(choice).classList.toggle("chosen", answer?.choice === choice);
    element("forward").disabled = !answer;
  }

  function finish() {
    const open = questions.length - answers.size;
    only("end");
    progress();
    element("place").textContent = "";
    element("end_title").textContent = open ? `${open.toLocaleString()} questions are open` : "That was the last question. Thank you!";
    element("end_text").textContent = open
      ? "You passed over them, or skipped back and forth. Answer them if you can, then save."
      : "Save your answers to a file now, and send it to whoever gave you this page.";
    element("open").hidden = !open;
    element("end_note").textContent = "";
    element("end_save").focus();
  }

  // Moving about.

  function go(to, { introduce = false } = {}) {
    const before = questions[position]?.kind;
    if (to >= questions.length) return finish();
    position = to;
    return introduce || questions[to].kind !== before ? instruct() : show();
  }

  const forward = () => go(position + 1);

  const back = () => {
    if (position === 0) return;
    position -= 1; // not by go: nobody who goes back wants the instructions again
    show();
  };

  function choose(choice) {
    const question = questions[position];
    if (!inSight || (choice === "not_sure" && !study.kinds[question.kind].not_sure)) return;
    inSight = false;
    const seconds = Math.round(performance.now() - since) / 1000;
    keep(question.id, { choice, seconds, at: new Date().toISOString() });
    progress();
    mark();
    const turn = shown;
    setTimeout(() => turn === shown && forward(), 140); // long enough to see what was chosen
  }

  function named() {
    const name = element("name").value.trim();
    element("begin").disabled = !name;
    if (name !== rater) {
      rater = name;
      if (name) recall();
    }
    element("begin").textContent = name && answers.size ? `Go on (${answers.size.toLocaleString()} answered)` : "Begin";
  }

  function begin() {
    if (!rater) return;
    const open = firstOpen();
    if (open < 0) {
      position = questions.length - 1;
      finish();
    } else {
      go(open, { introduce: true });
    }
  }

  const inSection = (id) => !element(id).hidden;
  const keys = {
    ArrowLeft: () => choose("left"),
    ArrowRight: () => choose("right"),
    ArrowDown: () => choose("not_sure"),
    Backspace: back,
    Enter: () => (answers.has(questions[position].id) || !element("broken").hidden) && forward(),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.tagName === "INPUT") {
      if (event.key !== "Enter") return;
      event.preventDefault(); // or the same key would press the button that has the focus by then
      return begin();
    }
    if (event.key.toLowerCase() === "s" && !inSection("welcome") && !event.repeat) return save();
    if (!inSection("question") || !(event.key in keys)) return;
    if (event.key === "Enter" && event.target.tagName === "BUTTON") return; // the button's own click
    event.preventDefault();
    if (!event.repeat) keys[event.key](); // a key held down is one answer
  });

  for (const choice of choices) element(choice).addEventListener("click", () => choose(choice));
  element("name").addEventListener("input", named);
  element("begin").addEventListener("click", begin);
  element("start").addEventListener("click", show);
  element("back").addEventListener("click", back);
  element("forward").addEventListener("click", forward);
  element("save").addEventListener("click", save);
  element("end_save").addEventListener("click", save);
  element("review").addEventListener("click", show);
  element("open").addEventListener("click", () => go(firstOpen(), { introduce: true }));
  element("load").addEventListener("click", () => element("file").click());
  element("file").addEventListener("change", (event) => load(event.target.files[0]));

  // The beginning.

  element("count").textContent = questions.length.toLocaleString();
  try {
    element("name").value = localStorage.getItem(`human-study/${study.study}`) ?? "";
  } catch {
    keepsNothing();
  }
  named();
  element("name").focus();
})();
