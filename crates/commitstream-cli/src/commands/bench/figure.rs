//! Figures, their baselines and their aims. No I/O.

use serde::{Serialize, Serializer};

use crate::output::count;

/// What one benchmark came to.
#[derive(Debug, Clone)]
pub struct Measured {
    /// As on the command line.
    pub name: &'static str,
    /// The headline comes first. None where the benchmark could not run, and then a note says why.
    pub figures: Vec<Figure>,
    /// What else must be known to read the figures.
    pub notes: Vec<String>,
}

/// One figure, measured in several rounds beside its baseline.
#[derive(Debug, Clone)]
pub struct Figure {
    pub name: String,
    pub unit: &'static str,
    pub aim: Option<Aim>,
    /// At least one.
    pub rounds: Vec<Round>,
}

/// Both sides of one round. Each was measured once, on the same servers, one after the other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Round {
    pub figure: f64,
    /// `None` for a figure that is compared with nothing.
    pub baseline: Option<f64>,
}

/// What a figure should come to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Aim {
    RatioAtLeast(f64),
    AtLeast(f64),
    AtMost(f64),
}

impl Round {
    pub fn new(figure: f64, baseline: f64) -> Self {
        Self { figure, baseline: Some(baseline) }
    }

    pub fn alone(figure: f64) -> Self {
        Self { figure, baseline: None }
    }

    fn ratio(&self) -> Option<f64> {
        self.baseline.filter(|baseline| *baseline > 0.0).map(|baseline| self.figure / baseline)
    }
}

impl Figure {
    pub fn new(name: impl Into<String>, unit: &'static str, aim: Option<Aim>, rounds: Vec<Round>) -> Self {
        Self { name: name.into(), unit, aim, rounds }
    }

    /// The median of the rounds.
    pub fn figure(&self) -> f64 {
        median(self.rounds.iter().map(|round| round.figure)).unwrap_or(f64::NAN)
    }

    /// The median of the rounds.
    pub fn baseline(&self) -> Option<f64> {
        median(self.rounds.iter().filter_map(|round| round.baseline))
    }

    /// The median of the rounds' ratios: the sides of one round have most in common.
    pub fn ratio(&self) -> Option<f64> {
        median(self.rounds.iter().filter_map(Round::ratio))
    }

    /// `None` where there is no aim, or nothing to compare with it.
    pub fn is_met(&self) -> Option<bool> {
        let (figure, ratio) = (self.figure(), self.ratio());
        Some(match self.aim? {
            Aim::RatioAtLeast(least) => ratio? >= least,
            Aim::AtLeast(least) => figure >= least,
            Aim::AtMost(most) => figure <= most,
        })
    }

    /// The figure with its unit, as people read it.
    pub fn figure_text(&self) -> String {
        self.with_unit(self.figure())
    }

    pub fn baseline_text(&self) -> String {
        self.baseline().map_or_else(|| "-".to_owned(), |baseline| self.with_unit(baseline))
    }

    pub fn ratio_text(&self) -> String {
        self.ratio().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"))
    }

    pub fn aim_text(&self) -> String {
        match self.aim {
            None => "-".to_owned(),
            Some(Aim::RatioAtLeast(least)) => format!("ratio ≥ {least}"),
            Some(Aim::AtLeast(least)) => format!("≥ {least} {}", self.unit).trim_end().to_owned(),
            Some(Aim::AtMost(most)) => format!("≤ {most} {}", self.unit).trim_end().to_owned(),
        }
    }

    fn with_unit(&self, value: f64) -> String {
        format!("{} {}", number(value), self.unit).trim_end().to_owned()
    }
}

/// Three digits or more: `0.42`, `15.9`, `57,123`.
pub fn number(value: f64) -> String {
    match value.abs() {
        // What is measured is not negative, and far from the limits of u64.
        100.0.. => count(value.round() as u64),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The one in the middle, or the mean of the two. `None` of nothing.
pub fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = values.get(middle).copied()?;
    Some(if values.len().is_multiple_of(2) { f64::midpoint(values[middle - 1], upper) } else { upper })
}

/// The form of a figure for programs.
#[derive(Serialize)]
struct Json<'a> {
    name: &'a str,
    figure: Option<f64>,
    baseline: Option<f64>,
    ratio: Option<f64>,
    unit: Option<&'a str>,
    aim: Option<String>,
    met: Option<bool>,
    rounds: Vec<JsonRound>,
    #[serde(skip_serializing_if = "Option::is_none")]
    figures: Option<&'a [Figure]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    notes: Option<&'a [String]>,
}

#[derive(Serialize)]
struct JsonRound {
    figure: f64,
    baseline: Option<f64>,
    ratio: Option<f64>,
}

impl<'a> Json<'a> {
    fn of(name: &'a str, figure: Option<&'a Figure>) -> Self {
        let rounds = figure.map_or(&[][..], |figure| &figure.rounds);
        let round = |round: &Round| JsonRound { figure: round.figure, baseline: round.baseline, ratio: round.ratio() };
        Self {
            name,
            figure: figure.map(Figure::figure),
            baseline: figure.and_then(Figure::baseline),
            ratio: figure.and_then(Figure::ratio),
            unit: figure.map(|figure| figure.unit),
            aim: figure.filter(|figure| figure.aim.is_some()).map(Figure::aim_text),
            met: figure.and_then(Figure::is_met),
            rounds: rounds.iter().map(round).collect(),
            figures: None,
            notes: None,
        }
    }
}

impl Serialize for Figure {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Json::of(&self.name, Some(self)).serialize(serializer)
    }
}

/// The headline, and with it all figures.
impl Serialize for Measured {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let headline = Json::of(self.name, self.figures.first());
        Json { figures: Some(&self.figures), notes: Some(&self.notes), ..headline }.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(aim: Aim, rounds: &[(f64, f64)]) -> Figure {
        Figure::new("drain", "events/s", Some(aim), rounds.iter().map(|(a, b)| Round::new(*a, *b)).collect())
    }

    #[test]
    fn the_median_is_the_one_in_the_middle_or_the_mean_of_two() {
        for (values, expected) in [(&[][..], None), (&[3.0], Some(3.0)), (&[9.0, 1.0], Some(5.0)), (&[9.0, 1.0, 2.0], Some(2.0))]
        {
            assert_eq!(median(values.iter().copied()), expected);
        }
    }

    #[test]
    fn the_ratio_is_the_median_of_the_rounds_ratios() {
        // The medians are 20 and 10, the ratios 1, 4 and 2.
        let drain = figure(Aim::RatioAtLeast(1.3), &[(10.0, 10.0), (40.0, 10.0), (20.0, 10.0)]);
        assert_eq!((drain.figure(), drain.baseline(), drain.ratio()), (20.0, Some(10.0), Some(2.0)));
        let other = figure(Aim::RatioAtLeast(1.3), &[(10.0, 20.0), (30.0, 10.0), (20.0, 25.0)]);
        assert_eq!((other.figure(), other.baseline(), other.ratio()), (20.0, Some(20.0), Some(0.8)));
    }

    #[test]
    fn an_aim_is_met_or_missed() {
        let rounds = &[(12.0, 10.0)];
        for (aim, met) in [
            (Aim::RatioAtLeast(1.2), true),
            (Aim::RatioAtLeast(1.3), false),
            (Aim::AtLeast(12.0), true),
            (Aim::AtLeast(13.0), false),
            (Aim::AtMost(12.0), true),
            (Aim::AtMost(5.0), false),
        ] {
            assert_eq!(figure(aim, rounds).is_met(), Some(met), "{aim:?}");
        }
        let alone = Figure::new("idle", "%", Some(Aim::RatioAtLeast(1.0)), vec![Round::alone(1.0)]);
        assert_eq!((alone.is_met(), alone.ratio()), (None, None));
    }

    #[test]
    fn numbers_have_three_digits() {
        let texts = [0.0, 0.4237, 9.5, 15.94, 421.7, 57_123.4].map(number);
        assert_eq!(texts, ["0.00", "0.42", "9.50", "15.9", "422", "57,123"]);
    }

    #[test]
    fn json_has_the_headline_and_all_figures() {
        let alone = Figure::new("backlog", "%", None, vec![Round::alone(0.5)]);
        let figures = vec![figure(Aim::RatioAtLeast(1.3), &[(12.0, 10.0)]), alone];
        let measured = Measured { name: "drain", figures, notes: vec!["a note".to_owned()] };
        insta::assert_snapshot!(serde_json::to_string(&measured).unwrap(), @r#"{"name":"drain","figure":12.0,"baseline":10.0,"ratio":1.2,"unit":"events/s","aim":"ratio ≥ 1.3","met":false,"rounds":[{"figure":12.0,"baseline":10.0,"ratio":1.2}],"figures":[{"name":"drain","figure":12.0,"baseline":10.0,"ratio":1.2,"unit":"events/s","aim":"ratio ≥ 1.3","met":false,"rounds":[{"figure":12.0,"baseline":10.0,"ratio":1.2}]},{"name":"backlog","figure":0.5,"baseline":null,"ratio":null,"unit":"%","aim":null,"met":null,"rounds":[{"figure":0.5,"baseline":null,"ratio":null}]}],"notes":["a note"]}"#);
    }
}
