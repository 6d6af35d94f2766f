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
}
