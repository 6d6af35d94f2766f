//! What an error says to people.

/// The error and its causes on one line, without repeating what is said already.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let (message, cause) = match error.downcast_ref() {
            // In PostgreSQL's own words: the driver adds the line of the server's source code, and below it is only the same again.
            Some(sqlx::Error::Database(refusal)) => (refusal.message().to_owned(), None),
            _ => (error.to_string(), error.source()),
        };
        if text.is_empty() {
            text = message;
        } else if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        next = cause;
    }
    text
}
