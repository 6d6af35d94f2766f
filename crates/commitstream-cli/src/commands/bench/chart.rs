//! The figures as bars, in one SVG file without fonts or scripts of its own.
//!
//! Rates are drawn as multiples of their baselines, latencies in milliseconds. What fits neither is in the table only.

use super::figure::{Aim, Figure, number};
use super::report::Report;

const WIDTH: f64 = 860.0;
/// Where bars begin, and the longest one.
const LEFT: f64 = 230.0;
const LONGEST: f64 = 400.0;
const BAR: f64 = 14.0;
const STEP: f64 = 24.0;

/// `b` is a figure that met its aim, `m` one that missed it, `n` one without an aim, `l` a baseline, `a` an aim.
const STYLE: &str = "\
<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.h { font-weight: 600; font-size: 15px }
.q { fill: #59636e; font-size: 12px }
.b { fill: #1a7f5a } .m { fill: #c4690f } .n { fill: #3b6fb6 } .l { fill: #afb8c1 }
.a { stroke: #1f2328; stroke-width: 2 } .o { stroke: #59636e; stroke-dasharray: 3 3 }
.g { fill: #ffffff }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .q { fill: #9198a1 }
.b { fill: #3fb68b } .m { fill: #e5923f } .n { fill: #6ea8f0 } .l { fill: #59636e }
.a { stroke: #e6edf3 } .o { stroke: #9198a1 } .g { fill: #0d1117 }
}
</style>
";

struct Chart {
    body: String,
    /// Where the next line goes.
    y: f64,
}

pub fn svg(report: &Report) -> String {
    let mut chart = Chart { body: String::new(), y: 32.0 };
    let rates: Vec<_> = report.figures().filter(|figure| matches!(figure.aim, Some(Aim::RatioAtLeast(_)))).collect();
    // A page of the console takes so much longer than an event that both in one scale would hide the events.
    let is_drawn = |figure: &&Figure| figure.unit == "ms" && !figure.name.starts_with("console");
    let latencies: Vec<_> = report.figures().filter(is_drawn).collect();
    chart.rates(&rates);
    chart.latencies(&latencies);
    chart.legend(&report.machine.describe());
    let Chart { body, y: height } = chart;
    let title = "Figures of commitstream bench beside their baselines";
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n\
         <title>{title}</title>\n{STYLE}<rect class=\"g\" width=\"{WIDTH}\" height=\"{height}\"/>\n{body}</svg>\n"
    )
}

impl Chart {
    fn rates(&mut self, figures: &[&Figure]) {
        let ends = figures.iter().flat_map(|figure| [figure.ratio(), figure.aim.map(aim_value), Some(1.0)]);
        let Some(scale) = scale(ends) else { return };
        self.heading("Times the baseline (longer is better)");
        let top = self.y - BAR;
        for figure in figures {
            let Some(ratio) = figure.ratio() else { continue };
            self.label(&figure.name);
            self.bar(class(figure), self.y - BAR + 2.0, BAR, ratio * scale);
            self.aim(figure, scale);
            self.value(figure, ratio.max(1.0), scale, &format!("{} ×  ({})", number(ratio), figure.figure_text()));
            self.y += STEP;
        }
        let x = LEFT + scale;
        self.add(&format!("<line class=\"o\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{:.1}\"/>", self.y - STEP + 6.0));
        self.y += STEP;
    }

    fn latencies(&mut self, figures: &[&Figure]) {
        let ends = figures.iter().flat_map(|figure| [Some(figure.figure()), figure.baseline(), figure.aim.map(aim_value)]);
        let Some(scale) = scale(ends) else { return };
        self.heading("Milliseconds (shorter is better)");
        for figure in figures {
            let (value, baseline) = (figure.figure(), figure.baseline().unwrap_or(0.0));
            self.label(&figure.name);
            self.bar(class(figure), self.y - BAR + 2.0, BAR / 2.0, value * scale);
            self.bar("l", self.y - BAR / 2.0 + 2.0, BAR / 2.0, baseline * scale);
            self.aim(figure, scale);
            self.value(figure, value.max(baseline), scale, &figure.figure_text());
            self.y += STEP;
        }
        self.y += STEP;
    }

    fn legend(&mut self, machine: &str) {
        let meaning = "Green: the aim is met. Orange: it is missed. Blue: there is none. Upright stroke: the aim. Grey, or dashed: the baseline.";
        for line in [meaning].into_iter().chain(machine.split("; ")) {
            self.add(&format!("<text class=\"q\" x=\"20\" y=\"{:.1}\">{}</text>", self.y, escaped(line)));
            self.y += 18.0;
        }
    }

    fn heading(&mut self, text: &str) {
        self.add(&format!("<text class=\"h\" x=\"20\" y=\"{:.1}\">{text}</text>", self.y));
        self.y += STEP + 4.0;
    }

    fn label(&mut self, text: &str) {
        self.add(&format!("<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>", LEFT - 10.0, self.y, escaped(text)));
    }

    fn bar(&mut self, class: &str, top: f64, height: f64, width: f64) {
        let (x, width) = (LEFT, width.max(0.0));
        self.add(&format!(
            "<rect class=\"{class}\" x=\"{x}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{height}\" rx=\"2\"/>"
        ));
    }

    fn aim(&mut self, figure: &Figure, scale: f64) {
        let Some(x) = figure.aim.map(|aim| LEFT + aim_value(aim) * scale) else { return };
        let (top, bottom) = (self.y - BAR - 1.0, self.y + 5.0);
        self.add(&format!("<line class=\"a\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\"/>"));
    }

    /// Behind everything else on the line, which ends at `end` or at the aim.
    fn value(&mut self, figure: &Figure, end: f64, scale: f64, text: &str) {
        let x = LEFT + end.max(figure.aim.map_or(0.0, aim_value)) * scale + 10.0;
        self.add(&format!("<text x=\"{x:.1}\" y=\"{:.1}\">{}</text>", self.y, escaped(text)));
    }

    fn add(&mut self, element: &str) {
        self.body += element;
        self.body.push('\n');
    }
}

/// Of one unit, so that the longest of these fits. `None` where there is nothing to draw.
fn scale(ends: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let most = ends.flatten().filter(|end| end.is_finite()).fold(0.0, f64::max);
    (most > 0.0).then(|| LONGEST / most)
}

fn aim_value(aim: Aim) -> f64 {
    match aim {
        Aim::RatioAtLeast(value) | Aim::AtLeast(value) | Aim::AtMost(value) => value,
    }
}

fn class(figure: &Figure) -> &'static str {
    match figure.is_met() {
        Some(true) => "b",
        Some(false) => "m",
        None => "n",
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::report::tests::report;

    #[test]
    fn bars_ticks_and_values_stand_where_they_belong() {
        let chart = svg(&report());
        let (_, body) = chart.split_once("</style>").unwrap();
        insta::assert_snapshot!(body, @r#"
        <rect class="g" width="860" height="304"/>
        <text class="h" x="20" y="32.0">Times the baseline (longer is better)</text>
        <text x="220.0" y="60.0" text-anchor="end">drain</text>
        <rect class="b" x="230" y="48.0" width="400.0" height="14" rx="2"/>
        <line class="a" x1="560.2" x2="560.2" y1="45.0" y2="65.0"/>
        <text x="640.0" y="60.0">1.57 ×  (63,000 events/s)</text>
        <text x="220.0" y="84.0" text-anchor="end">drain, retention 0</text>
        <rect class="m" x="230" y="72.0" width="317.5" height="14" rx="2"/>
        <line class="a" x1="585.6" x2="585.6" y1="69.0" y2="89.0"/>
        <text x="595.6" y="84.0">1.25 ×  (50,000 events/s)</text>
        <line class="o" x1="484.0" x2="484.0" y1="46.0" y2="90.0"/>
        <text class="h" x="20" y="132.0">Milliseconds (shorter is better)</text>
        <text x="220.0" y="160.0" text-anchor="end">latency 500/s p50</text>
        <rect class="b" x="230" y="148.0" width="66.7" height="7" rx="2"/>
        <rect class="l" x="230" y="155.0" width="42.7" height="7" rx="2"/>
        <line class="a" x1="310.0" x2="310.0" y1="145.0" y2="165.0"/>
        <text x="320.0" y="160.0">1.25 ms</text>
        <text x="220.0" y="184.0" text-anchor="end">latency 500/s p99</text>
        <rect class="m" x="230" y="172.0" width="400.0" height="7" rx="2"/>
        <rect class="l" x="230" y="179.0" width="106.7" height="7" rx="2"/>
        <line class="a" x1="496.7" x2="496.7" y1="169.0" y2="189.0"/>
        <text x="640.0" y="184.0">7.50 ms</text>
        <text class="q" x="20" y="232.0">Green: the aim is met. Orange: it is missed. Blue: there is none. Upright stroke: the aim. Grey, or dashed: the baseline.</text>
        <text class="q" x="20" y="250.0">2 cores of Some &lt;CPU&gt;, 16 GiB</text>
        <text class="q" x="20" y="268.0">PostgreSQL 15.18 with fsync on</text>
        <text class="q" x="20" y="286.0">Redis 7.0.15 with an append-only file</text>
        </svg>
        "#);
    }
}
