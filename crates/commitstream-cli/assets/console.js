"use strict";
const two = (number) => String(number).padStart(2, "0");
const day = (at) => `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
const clock = (at) => `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;

// Times in the viewer's zone; the title keeps what the server said.
for (const time of document.querySelectorAll("time[datetime]")) {
  const at = new Date(time.dateTime);
  if (isNaN(at)) continue;
  time.title = time.dateTime;
  const millis = time.className === "precise" ? `.${String(at.getMilliseconds()).padStart(3, "0")}` : "";
  time.textContent = `${day(at)} ${clock(at)}${millis}`;
}

// Times that are searched for, too: the server is told UTC.
for (const input of document.querySelectorAll("input[type=datetime-local]")) {
  const label = input.labels[0];
  label.textContent = label.textContent.replace(" (UTC)", "");
  const at = new Date(input.value + "Z");
  if (!isNaN(at)) input.value = `${day(at)}T${clock(at)}`;
  input.form.addEventListener("formdata", (event) => {
    const local = new Date(input.value);
    if (!isNaN(local)) event.formData.set(input.name, local.toISOString().slice(0, 19));
  });
}

// On a narrow screen each cell stands on a line of its own, behind the name of its column.
for (const table of document.querySelectorAll(".wide table")) {
  const names = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, i) => (cell.dataset.name = names[i]));
  table.classList.add("named");
}

// What doctor says: it takes some seconds, so it comes after the page.
const doctor = document.getElementById("doctor");
if (doctor) {
  const ask = async () => {
    if (document.hidden) return;
    const answer = await fetch(doctor.dataset.source, { redirect: "error" }).catch(() => null);
    if (!answer || !answer.ok) return;
    const line = await answer.json();
    doctor.className = line.tone;
    doctor.querySelector(".sign").textContent = line.sign;
    doctor.querySelector(".text").textContent = line.text;
  };
  ask();
  setInterval(ask, 60000);
}

// The overview's live numbers: one object a second.
const live = document.getElementById("live");
const charts = [];
if (live && window.EventSource) {
  // Asked for with each drawing: day and night may change.
  const color = (name) => () => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const chart = (id, labels, digits) => {
    const box = document.getElementById(id);
    const axis = { stroke: color("--quiet"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), width: 1 } };
    const strokes = [color("--stroke"), color("--stroke2")];
    // Of the time that is pointed at, or else the latest.
    const at = (plot, i, place) => plot.data[i][place ?? plot.data[i].length - 1];
    const form = { minimumFractionDigits: digits, maximumFractionDigits: digits };
    const value = (plot, _, i, place) => at(plot, i, place)?.toLocaleString("en", form) ?? "–";
    const series = labels.map((label, i) => ({ label, stroke: strokes[i], width: 2, value, points: { show: false } }));
    const size = () => ({ width: Math.max(200, box.clientWidth - 20), height: 175 });
    const data = [[], ...labels.map(() => [])];
    const times = (plot, ticks) => ticks.map((t) => clock(new Date(t * 1000)));
    const scales = {
      // A minute at least, so that the first points do not race across the chart.
      x: { range: (plot, min, max) => [Math.min(min, max - 60), max] },
      y: { range: (plot, min, max) => [0, Math.max(max || 0, 1) * 1.1] },
    };
    const time = (plot, _, i, place) => { const t = at(plot, 0, place); return t ? clock(new Date(t * 1000)) : "–"; };
    const axes = [{ ...axis, values: times, space: 90 }, { ...axis, size: 56 }];
    const plot = new uPlot({ ...size(), series: [{ label: "at", value: time }, ...series], axes, scales }, data, box);
    charts.push(plot);
    addEventListener("resize", () => plot.setSize(size()));
    return (t, values) => {
      data[0].push(t);
      values.forEach((value, i) => data[i + 1].push(value));
      if (data[0].length > 300) data.forEach((list) => list.shift());
      plot.setData(data);
    };
  };
  const rates = chart("chart-rates", ["through the outbox", "all entries"], 0);
  const latency = chart("chart-latency", ["median", "99 % within"], 1);
  let source = null;
  let entries = null;
  // A finding in one line, as the page has it.
  const line = ({ tone, sign, text, href }) => {
    const item = document.createElement("li");
    const [mark, link] = [document.createElement("span"), document.createElement("a")];
    item.className = tone;
    mark.className = "sign";
    mark.textContent = sign;
    link.href = href;
    link.textContent = "Look";
    item.append(mark, ` ${text} `, link);
    return item;
  };
  const show = (event) => {
    const now = JSON.parse(event.data);
    for (const [name, text] of Object.entries(now.texts)) {
      const place = document.getElementById(name);
      if (place) place.textContent = text;
    }
    document.getElementById("verdict").className = "verdict " + now.tone;
    const look = document.getElementById("look");
    look.hidden = !now.look;
    if (now.look) look.href = now.look;
    document.getElementById("findings").replaceChildren(...now.findings.map(line));
    const all = entries && now.entries !== null ? Math.max(0, (now.entries - entries.n) / (now.t - entries.t)) : null;
    if (now.entries !== null) entries = { n: now.entries, t: now.t };
    rates(now.t, [now.rate, all]);
    latency(now.t, [now.p50, now.p99]);
  };
  const lost = () => {
    document.getElementById("verdict").className = "verdict warn";
    document.getElementById("sign").textContent = "!";
    document.getElementById("sentence").textContent = "The connection to the console is lost; it is tried again.";
    // The browser does not try again by itself after a refusal: the session is over, or too many look on.
    if (source.readyState === EventSource.CLOSED) setTimeout(() => location.reload(), 5000);
  };
  // Nobody looks at a hidden page, and a browser has few connections to one server.
  const follow = () => {
    if (source) source.close();
    source = null;
    if (document.hidden) return;
    source = new EventSource(live.dataset.source);
    source.addEventListener("figures", show);
    source.onerror = lost;
  };
  document.addEventListener("visibilitychange", follow);
  follow();
}
