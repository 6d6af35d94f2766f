//! Texts as they are in the database: where its encoding is SQL_ASCII, they may be no UTF-8.

use sqlx::postgres::PgRow;
use sqlx::{ColumnIndex, Row, ValueRef};

/// The text of a column of a text type; `None` for NULL. The inner error is a text that is no UTF-8, readable as far as it goes.
pub(super) fn text(row: &PgRow, column: impl ColumnIndex<PgRow>) -> Result<Option<Result<String, String>>, sqlx::Error> {
    let value = row.try_get_raw(column)?;
    if value.is_null() {
        return Ok(None);
    }
    let bytes = value.as_bytes().map_err(sqlx::Error::Decode)?;
    Ok(Some(std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| String::from_utf8_lossy(bytes).into_owned())))
}

/// The text of a column, for people; empty for NULL.
pub(super) fn readable(row: &PgRow, column: &str) -> Result<String, sqlx::Error> {
    Ok(readable_or_null(row, column)?.unwrap_or_default())
}

/// The same of a column that may be NULL.
pub(super) fn readable_or_null(row: &PgRow, column: &str) -> Result<Option<String>, sqlx::Error> {
    Ok(text(row, column)?.map(|text| text.unwrap_or_else(|lossy| lossy)))
}
