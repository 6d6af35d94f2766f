//! From fields to values: later fields win, objects merge, references are looked up. Only what is asked for is looked at,
//! so a reference in the application's own part of the file never keeps our settings from loading.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use super::hocon::{Item, Place, Value};
use super::{ConfigError, Source};

/// Values looked at for one file. Far beyond any real one; stops references that multiply.
const MAX_STEPS: u32 = 10_000;

/// References that lead to references; bounds the recursion.
const MAX_OPEN: usize = 64;

/// What a path means in the end.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Meaning {
    Object,
    List,
    Null,
    Text(String),
}

/// One value that was assigned to a path. A later layer covers an earlier one, unless both are objects.
#[derive(Clone)]
enum Layer<'a> {
    Value(&'a Value, &'a Place),
    /// The path goes on: an object with at least this field.
    Field(&'a str, &'a Place),
}

pub(super) struct Document<'a> {
    items: &'a [Item],
    env: &'a dyn Fn(&str) -> Option<String>,
    /// Values being looked at, by address. One whose references lead back to itself means the value before it.
    open: RefCell<Vec<*const Value>>,
    steps: Cell<u32>,
}

impl<'a> Document<'a> {
    pub fn new(items: &'a [Item], env: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { items, env, open: RefCell::default(), steps: Cell::new(0) }
    }

    /// What `path` means and where that was said; `None` if nothing is said.
    pub fn meaning(&self, path: &[String]) -> Result<Option<(Meaning, Place)>, ConfigError> {
        for layer in self.layers(path)?.into_iter().rev() {
            let (meaning, place) = match layer {
                Layer::Field(_, place) => (Some(Meaning::Object), place),
                Layer::Value(value, place) => (self.once(value, place, || self.meaning_of(value, place))?.flatten(), place),
            };
            // An optional reference to nothing, or one to itself, leaves the value before it.
            if let Some(meaning) = meaning {
                return Ok(Some((meaning, place.clone())));
            }
        }
        Ok(None)
    }

    /// The names of the fields of the object at `path`.
    pub fn names(&self, path: &[String]) -> Result<BTreeSet<String>, ConfigError> {
        let mut names = BTreeSet::new();
        for layer in self.layers(path)? {
            match layer {
                Layer::Field(name, _) => {
                    names.insert(name.to_owned());
                }
                Layer::Value(value, place) => self.names_of(value, place, &mut names)?,
            }
        }
        Ok(names)
    }

    fn meaning_of(&self, value: &'a Value, place: &'a Place) -> Result<Option<Meaning>, ConfigError> {
        Ok(Some(match value {
            Value::Object(_) => Meaning::Object,
            Value::List => Meaning::List,
            Value::Null => Meaning::Null,
            Value::Text(text) => Meaning::Text(text.clone()),
            Value::Reference { path, optional } => return self.look_up(path, *optional, place),
            Value::Joined(pieces) => return self.join(pieces, place),
        }))
    }

    fn join(&self, pieces: &'a [Value], place: &'a Place) -> Result<Option<Meaning>, ConfigError> {
        let mut joined = String::new();
        let mut said = false;
        for piece in pieces {
            let is_blank = matches!(piece, Value::Text(text) if text.trim().is_empty());
            match self.meaning_of(piece, place)? {
                None => continue,
                Some(Meaning::Text(text)) => joined.push_str(&text),
                Some(Meaning::Null) => joined.push_str("null"),
                Some(other) => return Ok(Some(other)),
            }
            said = said || !is_blank;
        }
        Ok(said.then_some(Meaning::Text(joined)))
    }

    /// The file first, then the environment.
    fn look_up(&self, path: &[String], optional: bool, place: &Place) -> Result<Option<Meaning>, ConfigError> {
        let in_file = self.meaning(path)?.map(|(meaning, _)| meaning);
        let name = path.join(".");
        match in_file.or_else(|| (self.env)(&name).map(Meaning::Text)) {
            None if !optional => Err(ConfigError::Unresolved { name, origin: Source::from(place) }),
            found => Ok(found),
        }
    }

    /// Runs `look` with the value marked as open; `None` if it is open already.
    fn once<T>(
        &self,
        value: &Value,
        place: &Place,
        look: impl FnOnce() -> Result<T, ConfigError>,
    ) -> Result<Option<T>, ConfigError> {
        let address = std::ptr::from_ref(value);
        if self.open.borrow().contains(&address) {
            return Ok(None);
        }
        if self.steps.get() == MAX_STEPS || self.open.borrow().len() == MAX_OPEN {
            return Err(ConfigError::TooManyReferences { origin: Source::from(place) });
        }
        self.steps.set(self.steps.get() + 1);
        self.open.borrow_mut().push(address);
        let result = look();
        self.open.borrow_mut().pop();
        result.map(Some)
    }

    fn names_of(&self, value: &'a Value, place: &Place, names: &mut BTreeSet<String>) -> Result<(), ConfigError> {
        match value {
            Value::Object(items) => names.extend(items.iter().filter_map(|item| match item {
                Item::Field(field) => field.path.first().cloned(),
                Item::Include(_) => None,
            })),
            Value::Reference { path, .. } => names.extend(self.once(value, place, || self.names(path))?.unwrap_or_default()),
            Value::Joined(pieces) => {
                for piece in pieces.iter().filter(|piece| !matches!(piece, Value::Text(_))) {
                    self.names_of(piece, place, names)?;
                }
            }
            Value::List | Value::Null | Value::Text(_) => names.clear(),
        }
        Ok(())
    }

    /// Everything assigned to `path`, oldest first.
    fn layers(&self, path: &[String]) -> Result<Vec<Layer<'a>>, ConfigError> {
        let mut layers = Vec::new();
        self.layers_in(self.items, path, &mut layers)?;
        Ok(layers)
    }

    fn layers_in(&self, items: &'a [Item], path: &[String], layers: &mut Vec<Layer<'a>>) -> Result<(), ConfigError> {
        for item in items {
            let Item::Field(field) = item else { continue };
            if let Some(rest) = path.strip_prefix(field.path.as_slice()) {
                self.layers_within(&field.value, rest, &field.place, layers)?;
            } else if let Some([next, ..]) = field.path.strip_prefix(path) {
                layers.push(Layer::Field(next, &field.place));
            }
        }
        Ok(())
    }

    fn layers_within(
        &self,
        value: &'a Value,
        path: &[String],
        place: &'a Place,
        layers: &mut Vec<Layer<'a>>,
    ) -> Result<(), ConfigError> {
        if path.is_empty() {
            layers.push(Layer::Value(value, place));
            return Ok(());
        }
        match value {
            Value::Object(items) => self.layers_in(items, path, layers)?,
            Value::Reference { path: target, .. } => {
                let path = [target.as_slice(), path].concat();
                layers.extend(self.once(value, place, || self.layers(&path))?.unwrap_or_default());
            }
            Value::Joined(pieces) => {
                for piece in pieces.iter().filter(|piece| !matches!(piece, Value::Text(_))) {
                    self.layers_within(piece, path, place, layers)?;
                }
            }
            // No object any more, so what was said about its fields is void.
            Value::List | Value::Null | Value::Text(_) => layers.clear(),
        }
        Ok(())
    }
}
