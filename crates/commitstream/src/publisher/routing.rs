use crate::config::{PublishingSettings, Route, Settings, Strategy};
use crate::event::Lane;

/// Which way an event takes. In this order: a disabled outbox, the override for its type, the strategy, its lane.
#[must_use]
pub fn route(settings: &Settings, event_type: &str, lane: Lane) -> Route {
    let PublishingSettings { default_strategy, overrides, .. } = &settings.publishing;
    match (settings.outbox.enabled, overrides.get(event_type), default_strategy, lane) {
        (false, ..) => Route::Streams,
        (_, Some(route), ..) => *route,
        (_, None, Strategy::Outbox, _) | (_, None, Strategy::Hybrid, Lane::Critical) => Route::Outbox,
        (_, None, Strategy::Streams, _) | (_, None, Strategy::Hybrid, Lane::HighFrequency) => Route::Streams,
    }
}

/// Whether some event may go to streams.
pub(super) fn leads_to_streams(settings: &Settings) -> bool {
    let PublishingSettings { default_strategy, overrides, .. } = &settings.publishing;
    let is_override = overrides.values().any(|route| *route == Route::Streams);
    !settings.outbox.enabled || *default_strategy != Strategy::Outbox || is_override
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_is_decided_in_order() {
        let mut settings = Settings::default();
        settings.publishing.overrides.insert("MetricUpdated".into(), Route::Outbox);
        let way = |settings: &Settings, event_type, lane| route(settings, event_type, lane);
        assert_eq!(way(&settings, "UserCreated", Lane::Critical), Route::Outbox);
        assert_eq!(way(&settings, "SessionStarted", Lane::HighFrequency), Route::Streams);
        assert_eq!(way(&settings, "MetricUpdated", Lane::HighFrequency), Route::Outbox);
        settings.publishing.default_strategy = Strategy::Streams;
        assert_eq!(way(&settings, "UserCreated", Lane::Critical), Route::Streams);
        assert_eq!(way(&settings, "MetricUpdated", Lane::HighFrequency), Route::Outbox);
        settings.publishing.default_strategy = Strategy::Outbox;
        assert_eq!(way(&settings, "SessionStarted", Lane::HighFrequency), Route::Outbox);
        settings.outbox.enabled = false;
        assert_eq!(way(&settings, "MetricUpdated", Lane::Critical), Route::Streams);
    }

    #[test]
    fn what_leads_to_streams_is_what_routes_an_event_there() {
        let mut settings = Settings::default();
        for enabled in [true, false] {
            settings.outbox.enabled = enabled;
            for strategy in [Strategy::Hybrid, Strategy::Outbox, Strategy::Streams] {
                settings.publishing.default_strategy = strategy;
                for named in [None, Some(Route::Outbox), Some(Route::Streams)] {
                    settings.publishing.overrides = named.map(|route| ("Named".to_owned(), route)).into_iter().collect();
                    let lanes = [Lane::Critical, Lane::HighFrequency];
                    let mut ways = ["Named", "Other"].into_iter().flat_map(|name| lanes.map(|lane| route(&settings, name, lane)));
                    let expected = ways.any(|way| way == Route::Streams);
                    assert_eq!(leads_to_streams(&settings), expected, "{enabled} {:?}", settings.publishing);
                }
            }
        }
    }
}
