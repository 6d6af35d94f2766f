"use strict";
// Times in the viewer's zone; the title keeps what the server said.
for (const time of document.querySelectorAll("time[datetime]")) {
  const at = new Date(time.dateTime);
  if (isNaN(at)) continue;
  time.title = time.dateTime;
  time.textContent = at.toLocaleString(undefined, { dateStyle: "short", timeStyle: "medium" });
}

// The overview's live numbers: one object a second.
const live = document.getElementById("live");
if (live && window.EventSource) {
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const chart = (id, labels) => {
    const box = document.getElementById(id);
    const axis = { stroke: color("--quiet"), grid: { stroke: color("--line"), width: 1 } };
    const strokes = [color("--stroke"), color("--stroke2")];
    const series = labels.map((label, i) => ({ label, stroke: strokes[i], width: 2 }));
    const size = () => ({ width: Math.max(200, box.clientWidth - 10), height: 165 });
    const data = [[], ...labels.map(() => [])];
    const plot = new uPlot({ ...size(), series: [{}, ...series], axes: [axis, axis], scales: { y: { range: (u, min, max) => [0, Math.max(max || 0, 1) * 1.1] } } }, data, box);
    addEventListener("resize", () => plot.setSize(size()));
    return (t, values) => {
      data[0].push(t);
      values.forEach((value, i) => data[i + 1].push(value));
      if (data[0].length > 300) data.forEach((list) => list.shift());
      plot.setData(data);
    };
  };
  const rates = chart("chart-rates", ["outbox/s", "all entries/s"]);
  const latency = chart("chart-latency", ["median ms", "99 % ms"]);
  let source = null;
  let entries = null;
  const show = (event) => {
    const now = JSON.parse(event.data);
    for (const [name, text] of Object.entries(now.texts)) {
      const place = document.getElementById(name);
      if (place) place.textContent = text;
    }
    document.getElementById("verdict").className = "verdict " + now.tone;
    const all = entries && now.entries !== null ? Math.max(0, (now.entries - entries.n) / (now.t - entries.t)) : null;
    if (now.entries !== null) entries = { n: now.entries, t: now.t };
    rates(now.t, [now.rate, all]);
    latency(now.t, [now.p50, now.p99]);
  };
  const lost = () => {
    document.getElementById("verdict").className = "verdict warn";
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
