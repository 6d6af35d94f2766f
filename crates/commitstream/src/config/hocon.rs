//! The syntax of HOCON: text to fields. References and includes are kept as they are written; see `resolve` and `file`.
//!
//! Our own, because the crates at hand are not safe for settings that people write by hand. `hocon-rs` 0.2 takes
//! `app { a = 1` without the closing brace for an empty file, lets `${?UNSET}` erase the value before it, refuses a comment
//! that contains a backslash, reads the process environment itself, and logs what it read, passwords included. `hocon` 0.9
//! cannot read `a."b.c" = 1`. Neither says in which line an error is.
//!
//! Not read: what is inside lists (no setting is one), and `+=` counts as a list.

use std::path::Path;
use std::sync::Arc;

/// Objects and lists inside one another; bounds the recursion.
const MAX_DEPTH: u32 = 64;

/// A line of a file, counted from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub file: Arc<Path>,
    pub line: u32,
}

#[derive(Debug)]
pub(super) enum Item {
    Field(Assignment),
    Include(Include),
}

/// `path = value`
#[derive(Debug)]
pub(super) struct Assignment {
    pub path: Vec<String>,
    pub value: Value,
    pub place: Place,
}

/// `include "target"`
#[derive(Debug)]
pub(super) struct Include {
    pub target: String,
    pub required: bool,
    /// `file`, `url` or `classpath`, where it is said.
    pub location: Option<&'static str>,
    pub line: u32,
}

#[derive(Debug)]
pub(super) enum Value {
    Object(Vec<Item>),
    List,
    Null,
    Text(String),
    /// `${path}` or `${?path}`
    Reference {
        path: Vec<String>,
        optional: bool,
    },
    /// Values side by side, with the blanks between them.
    Joined(Vec<Value>),
}

/// What is wrong with the text, and in which line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SyntaxError {
    pub line: u32,
    pub reason: String,
}

type Parsed<T> = Result<T, SyntaxError>;

/// The fields of a file.
pub(super) fn parse(file: &Arc<Path>, text: &str) -> Parsed<Vec<Item>> {
    let mut parser = Parser { file, rest: text, line: 1, depth: 0 };
    parser.skip_blank();
    let items = if parser.eat("{") { parser.items_until_brace()? } else { parser.items()? };
    parser.skip_blank();
    match parser.peek() {
        None => Ok(items),
        Some('}') => Err(parser.error("a closing } too many")),
        Some(c) => Err(parser.error(format!("expected the end of the file, found {c}"))),
    }
}

struct Parser<'a> {
    file: &'a Arc<Path>,
    rest: &'a str,
    line: u32,
    depth: u32,
}

/// Blanks within a line. A byte order mark counts as one, as the specification says.
fn is_blank(c: char) -> bool {
    (c.is_whitespace() && c != '\n') || c == '\u{feff}'
}

/// Characters that unquoted text cannot contain.
fn is_reserved(c: char) -> bool {
    "$\"{}[]:=,+#`^?!@*&\\".contains(c)
}

impl Parser<'_> {
    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    /// Takes `token` if it comes next.
    fn eat(&mut self, token: &str) -> bool {
        let found = self.rest.strip_prefix(token);
        self.rest = found.unwrap_or(self.rest);
        found.is_some()
    }

    /// Takes `length` bytes, which must end between two characters.
    fn take(&mut self, length: usize) -> String {
        let (taken, rest) = self.rest.split_at(length);
        self.line += taken.bytes().filter(|byte| *byte == b'\n').count() as u32;
        self.rest = rest;
        taken.to_owned()
    }

    fn take_while(&mut self, belongs: impl Fn(char) -> bool) -> String {
        self.take(self.rest.find(|c| !belongs(c)).unwrap_or(self.rest.len()))
    }

    fn at_comment(&self) -> bool {
        self.rest.starts_with('#') || self.rest.starts_with("//")
    }

    /// Skips blanks, line ends and comments.
    fn skip_blank(&mut self) {
        loop {
            self.take_while(|c| is_blank(c) || c == '\n');
            if !self.at_comment() {
                return;
            }
            self.take_while(|c| c != '\n');
        }
    }

    fn error(&self, reason: impl Into<String>) -> SyntaxError {
        SyntaxError { line: self.line, reason: reason.into() }
    }

    fn unexpected(&self, expected: &str) -> SyntaxError {
        match self.peek() {
            None => self.error(format!("expected {expected}, but the file ends here")),
            Some('\n') => self.error(format!("expected {expected}, but the line ends here")),
            Some(c) => self.error(format!("expected {expected}, found {c}")),
        }
    }

    fn descend<T>(&mut self, read: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        if self.depth == MAX_DEPTH {
            return Err(self.error(format!("more than {MAX_DEPTH} objects or lists inside one another")));
        }
        self.depth += 1;
        let result = read(self);
        self.depth -= 1;
        result
    }

    /// After the opening brace.
    fn items_until_brace(&mut self) -> Parsed<Vec<Item>> {
        let opened = self.line;
        let items = self.descend(Self::items)?;
        if self.eat("}") { Ok(items) } else { Err(SyntaxError { line: opened, reason: "this { is never closed".to_owned() }) }
    }

    /// Up to a closing brace or the end of the file, which is left.
    fn items(&mut self) -> Parsed<Vec<Item>> {
        let mut items = Vec::new();
        loop {
            self.skip_blank();
            if matches!(self.peek(), None | Some('}')) {
                return Ok(items);
            }
            items.push(match self.include()? {
                Some(include) => Item::Include(include),
                None => Item::Field(self.assignment()?),
            });
            self.skip_blank();
            self.eat(",");
        }
    }

    fn assignment(&mut self) -> Parsed<Assignment> {
        let line = self.line;
        let path = self.path()?;
        self.skip_blank();
        let adds = self.eat("+=");
        if !adds && !self.eat("=") && !self.eat(":") && self.peek() != Some('{') {
            return Err(self.unexpected(&format!("= or {{ after {}", path.join("."))));
        }
        let value = self.value()?;
        let place = Place { file: Arc::clone(self.file), line };
        Ok(Assignment { path, value: if adds { Value::List } else { value }, place })
    }

    /// `a.b."c.d"`
    fn path(&mut self) -> Parsed<Vec<String>> {
        let mut path = Vec::new();
        loop {
            self.take_while(is_blank);
            let mut segment = String::new();
            let mut quoted = false;
            loop {
                if self.peek() == Some('"') {
                    segment.push_str(&self.quoted()?);
                    quoted = true;
                } else {
                    let plain = self.take_while(|c| !is_reserved(c) && c != '.' && c != '\n');
                    if plain.is_empty() {
                        break;
                    }
                    segment.push_str(if matches!(self.peek(), Some('"')) { &plain } else { plain.trim_end() });
                }
            }
            if segment.is_empty() && !quoted {
                return Err(self.unexpected("a name"));
            }
            path.push(segment);
            if !self.eat(".") {
                return Ok(path);
            }
        }
    }

    /// One value, or several side by side, up to the end of the line, a comma or a closing bracket.
    fn value(&mut self) -> Parsed<Value> {
        self.skip_blank();
        let mut pieces = Vec::new();
        loop {
            let blank = self.take_while(is_blank);
            if matches!(self.peek(), None | Some('\n' | ',' | '}' | ']')) || self.at_comment() {
                break;
            }
            if !blank.is_empty() && !pieces.is_empty() {
                pieces.push(Value::Text(blank));
            }
            pieces.push(self.piece()?);
        }
        match pieces.len() {
            0 => Err(self.unexpected("a value")),
            1 => Ok(pieces.remove(0)),
            _ => Ok(Value::Joined(pieces)),
        }
    }

    fn piece(&mut self) -> Parsed<Value> {
        if self.eat("{") {
            return Ok(Value::Object(self.items_until_brace()?));
        }
        if self.eat("[") {
            return self.descend(Self::list_until_bracket);
        }
        if self.rest.starts_with('"') {
            return Ok(Value::Text(self.quoted()?));
        }
        if self.eat("${") {
            let optional = self.eat("?");
            let path = self.path()?;
            return if self.eat("}") { Ok(Value::Reference { path, optional }) } else { Err(self.unexpected("} after ${")) };
        }
        let end = self.rest.find(|c: char| is_reserved(c) || c.is_whitespace()).unwrap_or(self.rest.len());
        let end = self.rest[..end].find("//").unwrap_or(end);
        match self.take(end).as_str() {
            "" => Err(self.unexpected("a value (text with any of $ { } [ ] : = , + # ` ^ ? ! @ * & \\ needs double quotes)")),
            "null" => Ok(Value::Null),
            text => Ok(Value::Text(text.to_owned())),
        }
    }

    fn list_until_bracket(&mut self) -> Parsed<Value> {
        loop {
            self.skip_blank();
            if self.eat("]") {
                return Ok(Value::List);
            }
            self.value()?;
            self.skip_blank();
            self.eat(",");
        }
    }

    fn include(&mut self) -> Parsed<Option<Include>> {
        let Some(after) = self.rest.strip_prefix("include") else { return Ok(None) };
        let after = after.trim_start_matches(is_blank);
        if !["\"", "required(", "file(", "url(", "classpath("].iter().any(|start| after.starts_with(start)) {
            return Ok(None);
        }
        self.rest = after;
        let line = self.line;
        let required = self.eat("required(");
        self.take_while(is_blank);
        let location = ["file", "url", "classpath"].into_iter().find(|name| self.eat(&format!("{name}(")));
        self.take_while(is_blank);
        if self.peek() != Some('"') {
            return Err(self.unexpected("a quoted file name after include"));
        }
        let target = self.quoted()?;
        for _ in 0..usize::from(required) + usize::from(location.is_some()) {
            self.take_while(is_blank);
            if !self.eat(")") {
                return Err(self.unexpected("a closing ) after include"));
            }
        }
        Ok(Some(Include { target, required, location, line }))
    }

    /// `"text"` or `"""text"""`
    fn quoted(&mut self) -> Parsed<String> {
        if self.eat("\"\"\"") {
            let Some(end) = self.rest.find("\"\"\"") else { return Err(self.error("this \"\"\" is never closed")) };
            // Quotes beyond three belong to the text.
            let extra = self.rest[end + 3..].bytes().take_while(|byte| *byte == b'"').count();
            let text = self.take(end + extra);
            self.eat("\"\"\"");
            return Ok(text);
        }
        self.eat("\"");
        let mut text = String::new();
        loop {
            text.push_str(&self.take_while(|c| !matches!(c, '"' | '\\' | '\n')));
            if self.eat("\"") {
                return Ok(text);
            }
            if !self.eat("\\") {
                return Err(self.error("this \" is never closed"));
            }
            text.push(self.escaped()?);
        }
    }

    /// After the backslash.
    fn escaped(&mut self) -> Parsed<char> {
        if self.eat("u") {
            let first = self.code_unit()?;
            let second = if (0xd800..0xdc00).contains(&first) && self.eat("\\u") { Some(self.code_unit()?) } else { None };
            let decoded = char::decode_utf16([first].into_iter().chain(second)).next();
            return decoded.and_then(Result::ok).ok_or_else(|| self.error("\\u must name a character"));
        }
        const ESCAPES: &[(&str, char)] =
            &[("\"", '"'), ("\\", '\\'), ("/", '/'), ("b", '\u{8}'), ("f", '\u{c}'), ("n", '\n'), ("r", '\r'), ("t", '\t')];
        let found = ESCAPES.iter().find(|(token, _)| self.eat(token));
        found.map(|(_, c)| *c).ok_or_else(|| self.error("after \\ comes one of \" \\ / b f n r t u"))
    }

    fn code_unit(&mut self) -> Parsed<u16> {
        let digits = self.rest.get(..4).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let unit = digits.and_then(|digits| u16::from_str_radix(digits, 16).ok());
        let unit = unit.ok_or_else(|| self.error("\\u needs four hexadecimal digits"))?;
        self.take(4);
        Ok(unit)
    }
}
