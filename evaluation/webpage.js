"use strict";
// Each tile shows the image of one run. Flipping a tile shows, in its place, the image of the same sample that the
// chosen run made, so that the eye sees what moves.
(() => {
  const $ = (id) => document.getElementById(id);
  const cards = [...document.querySelectorAll(".card")];
  const tilesOf = (card) => [...card.querySelectorAll(".tile")];
  const tileOf = (card, run) => card.querySelector(`.tile[data-run="${run}"]`);
  const labels = [...$("against").options].map((option) => option.textContent);
  const colour = (run) => `var(--run-${run % 8})`;
  document.documentElement.classList.add("js");
  for (const image of document.querySelectorAll(".tile img")) image.own = image.src;

  function flip(tile, on) {
    const other = on && tileOf(tile.closest(".card"), $("against").value);
    const image = tile.querySelector("img");
    image.src = (other || tile).querySelector("img").own;
    tile.classList.toggle("flipped", Boolean(other) && other !== tile);
    tile.style.setProperty("--shown", colour($("against").value));
  }

  let all = false;
  function flipAll(on) {
    all = on;
    $("flip").setAttribute("aria-pressed", String(on));
    $("said").textContent = on ? `All tiles show ${labels[$("against").value]}.` : "Each tile shows its own run.";
    for (const card of cards) for (const tile of tilesOf(card)) flip(tile, on);
  }

  for (const card of cards) {
    for (const tile of tilesOf(card)) {
      tile.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && flip(tile, !all));
      tile.addEventListener("pointerleave", () => flip(tile, all));
      tile.addEventListener("click", () => {
        flip(tile, all); // the mouse stays above the tile
        open(card, Number(tile.dataset.run));
      });
    }
  }
  $("flip").addEventListener("click", () => flipAll(!all));
  $("against").addEventListener("change", () => flipAll(all));
  $("sharp").addEventListener("change", (event) => document.body.classList.toggle("sharp", event.target.checked));
  $("order").addEventListener("change", (event) => {
    const run = event.target.value;
    const value = (card) => {
      if (run === "index") return Number(card.dataset.index);
      const ratios = JSON.parse(card.dataset.psnr);
      return (run === "all" ? Math.min(...Object.values(ratios)) : ratios[run]) ?? Infinity;
    };
    cards.sort((a, b) => value(a) - value(b));
    $("cards").append(...cards);
  });

  // The large view: one sample of one run, against the chosen one.
  const dialog = $("view");
  let at = null;
  let flipped = false;

  function open(card, run) {
    at = { card, run };
    flipped = false;
    draw();
    if (!dialog.open) dialog.showModal();
  }

  function draw() {
    const against = Number($("against").value);
    const [own, other] = [at.run, against].map((run) => tileOf(at.card, run));
    const shown = flipped && other ? against : at.run;
    const badge = own.querySelector(".badge").cloneNode(true);
    $("view-title").replaceChildren(badge, `${labels[at.run]}, ${at.card.dataset.name}`);
    $("view-image").src = (shown === at.run ? own : other).querySelector("img").own;
    $("view-image").alt = `${at.card.dataset.name} of ${labels[shown]}`;
    $("view-flip").classList.toggle("flipped", shown !== at.run);
    $("view-flip").style.setProperty("--shown", colour(against));
    $("view-shown").textContent = `Shown: ${labels[shown]}. Press the image or the space bar to flip.`;
    $("view-difference").hidden = !other || other === own;
    if (!$("view-difference").hidden) {
      $("view-one").src = own.querySelector("img").own;
      $("view-other").src = other.querySelector("img").own;
      const ratio = own.querySelector(".db");
      const pairs = labels[$("against").dataset.pairs];
      const measured = ratio ? ` PSNR to ${pairs}: ${ratio.textContent}.` : "";
      $("view-ratio").textContent = `Difference to ${labels[against]}, four times as bright.${measured}`;
    }
  }

  function move(samples, runs) {
    const card = cards[(cards.indexOf(at.card) + samples + cards.length) % cards.length];
    const there = tilesOf(card).map((tile) => Number(tile.dataset.run));
    const place = Math.max(0, there.indexOf(at.run));
    at = { card, run: there[(place + runs + there.length) % there.length] };
    draw();
  }

  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  for (const button of dialog.querySelectorAll("[data-move]")) {
    button.addEventListener("click", () => move(...moves[button.dataset.move]));
  }
  $("view-flip").addEventListener("click", () => { flipped = !flipped; draw(); });
  $("view-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => tileOf(at.card, at.run).focus());

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input")) return;
    if (dialog.open) {
      if (event.key === " ") { flipped = !flipped; draw(); event.preventDefault(); }
      if (event.key in moves) { move(...moves[event.key]); event.preventDefault(); }
    } else if (event.key.toLowerCase() === "f") flipAll(!all);
  });
})();
