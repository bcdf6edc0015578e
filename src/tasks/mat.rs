//! MAT-Coding's row format (`MAT-Benchmark/MAT-Coding.json` of the published data): a JSON list of rows, images beside it.

use std::path::Path;
use std::sync::Arc;

use image::RgbImage;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{Degradation, Example, Split, read_image};
use crate::input::{PictureLimits, picture_size};
use crate::{Error, Result};

/// One row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Identifies the row in its file.
    pub id: u64,
    /// What is asked. A crop's question names a box `[x_min, y_min, x_max, y_max]`, normalised to 0..1000.
    pub question: String,
    /// What counts as right; any of them.
    pub answers: Vec<String>,
    /// The image before degradation, relative to the image folder.
    pub ori_image_path: String,
    /// The image after it, relative to the image folder.
    pub processed_image_path: String,
    /// What was done to the image, in order.
    #[serde(rename = "type")]
    pub kinds: Vec<Degradation>,
    /// Which half of the benchmark the row belongs to.
    pub split: Split,
}

const FIELDS: [&str; 7] = ["id", "question", "answers", "ori_image_path", "processed_image_path", "type", "split"];

/// Reads a file of rows.
///
/// # Errors
/// [`Error::Io`] where the file cannot be read; [`Error::Input`] naming file, row (by index and `id`) and field where it does not
/// hold what it should: a missing, misspelt or wrongly typed field, no answer, an unknown degradation, an `id` that occurs twice.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<Row>> {
    let path = path.as_ref();
    let text = crate::files::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let value: Value = serde_json::from_str(&text).map_err(|e| {
        Error::input(
            format!("{}: not JSON: {e}", path.display()),
            "the file must hold a JSON list of rows (MAT-Coding's format)",
        )
    })?;
    let Value::Array(items) = value else {
        return Err(Error::input(
            format!("{}: holds one JSON {} where a list of rows is needed", path.display(), type_name(&value)),
            "wrap the rows in [ and ]",
        ));
    };
    let mut rows = Vec::with_capacity(items.len());
    let mut seen = std::collections::HashMap::new();
    for (index, item) in items.iter().enumerate() {
        let row = Reader { path, index, item }.row()?;
        if let Some(first) = seen.insert(row.id, index) {
            return Err(Error::input(
                format!("{}: rows {first} and {index} both have id {}", path.display(), row.id),
                "give every row its own id",
            ));
        }
        rows.push(row);
    }
    Ok(rows)
}

/// Writes rows in the same format, through a temporary file, so that a reader never sees half of them.
///
/// # Errors
/// [`Error::Io`] where the file cannot be written.
pub fn write(path: impl AsRef<Path>, rows: &[Row]) -> Result<()> {
    let path = path.as_ref();
    let mut text = Vec::new();
    let mut json =
        serde_json::Serializer::with_formatter(&mut text, serde_json::ser::PrettyFormatter::with_indent(b"    "));
    rows.serialize(&mut json).map_err(|e| Error::internal(format!("rows to JSON: {e}")))?;
    let part = path.with_extension("json.part");
    std::fs::write(&part, &text).map_err(|e| Error::io("write", &part, e))?;
    std::fs::rename(&part, path).map_err(|e| Error::io("write", path, e))
}

impl Row {
    /// Loads the row's images from `folder`.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Input`], naming the row and the image file.
    pub fn load(&self, folder: impl AsRef<Path>) -> Result<Example> {
        let folder = folder.as_ref();
        Ok(Example {
            id: self.id,
            question: self.question.clone(),
            answers: self.answers.clone(),
            kinds: self.kinds.clone(),
            split: self.split,
            original: Arc::new(self.image(folder, &self.ori_image_path)?),
            processed: Arc::new(self.image(folder, &self.processed_image_path)?),
        })
    }

    /// The size (height, width) of the image that the agent is given ([`Example::input`]), from the head of its file.
    ///
    /// # Errors
    /// As [`load`](Self::load), as far as the head of the file tells.
    pub(super) fn input_size(&self, folder: &Path) -> Result<(usize, usize)> {
        let crop = self.kinds.first() == Some(&Degradation::Crop);
        let name = if crop { &self.ori_image_path } else { &self.processed_image_path };
        picture_size(&folder.join(name), &self.image_name(), &PictureLimits::default())
    }

    fn image_name(&self) -> String {
        format!("an image of the row with id {}", self.id)
    }

    fn image(&self, folder: &Path, name: &str) -> Result<RgbImage> {
        read_image(&folder.join(name), &self.image_name())
    }
}

/// The box `[x_min, y_min, x_max, y_max]` that a crop's question names, normalised to 0..1000: the first list of four whole numbers
/// in it. `None` where there is none, or where it is empty or reaches past 1000.
pub fn crop_box(question: &str) -> Option<[u32; 4]> {
    question
        .split('[')
        .skip(1)
        .find_map(|rest| {
            let numbers: Option<Vec<u32>> = rest.split_once(']')?.0.split(',').map(|n| n.trim().parse().ok()).collect();
            <[u32; 4]>::try_from(numbers?).ok()
        })
        .filter(|[left, top, right, bottom]| left < right && top < bottom && *right <= 1000 && *bottom <= 1000)
}

/// Reads one row, saying where it is when it is wrong.
struct Reader<'a> {
    path: &'a Path,
    index: usize,
    item: &'a Value,
}

impl Reader<'_> {
    fn row(&self) -> Result<Row> {
        let Value::Object(map) = self.item else {
            return Err(self.bad(
                format!("is a JSON {}", type_name(self.item)),
                format!("a row is an object with the fields {}", FIELDS.join(", ")),
            ));
        };
        if let Some(unknown) = map.keys().find(|k| !FIELDS.contains(&k.as_str())) {
            let mend = format!("remove or rename it; the fields are {}", FIELDS.join(", "));
            return Err(self.bad(format!("has an unknown field `{unknown}`"), mend));
        }
        let answers = self.strings(map, "answers")?;
        if answers.is_empty() {
            return Err(self.bad("field `answers` is empty".into(), "give at least one answer".into()));
        }
        let names = Degradation::ALL.map(Degradation::name).join(", ");
        let mut kinds = Vec::new();
        for name in self.strings(map, "type")? {
            kinds.push(Degradation::from_name(&name).ok_or_else(|| {
                self.bad(format!("field `type` names an unknown degradation `{name}`"), format!("use {names}"))
            })?);
        }
        if kinds.is_empty() {
            return Err(self.bad("field `type` is empty".into(), format!("use one or two of {names}")));
        }
        let split = match self.string(map, "split")?.as_str() {
            "simple" => Split::Simple,
            "hard" => Split::Hard,
            other => return Err(self.bad(format!("field `split` is `{other}`"), "use simple or hard".into())),
        };
        Ok(Row {
            id: self
                .field(map, "id")?
                .as_u64()
                .ok_or_else(|| self.bad_type("id", &map["id"], "a whole number from 0 up"))?,
            question: self.string(map, "question")?,
            answers,
            ori_image_path: self.string(map, "ori_image_path")?,
            processed_image_path: self.string(map, "processed_image_path")?,
            kinds,
            split,
        })
    }

    fn field<'m>(&self, map: &'m Map<String, Value>, name: &str) -> Result<&'m Value> {
        map.get(name).ok_or_else(|| self.bad(format!("has no field `{name}`"), format!("add `{name}` to the row")))
    }

    fn string(&self, map: &Map<String, Value>, name: &str) -> Result<String> {
        let value = self.field(map, name)?;
        value.as_str().map(str::to_owned).ok_or_else(|| self.bad_type(name, value, "a string"))
    }

    fn strings(&self, map: &Map<String, Value>, name: &str) -> Result<Vec<String>> {
        let value = self.field(map, name)?;
        let wrong = || self.bad_type(name, value, "a list of strings");
        value.as_array().ok_or_else(wrong)?.iter().map(|v| v.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
    }

    fn bad_type(&self, name: &str, value: &Value, wanted: &str) -> Error {
        self.bad(format!("field `{name}` is a JSON {}", type_name(value)), format!("`{name}` must be {wanted}"))
    }

    fn bad(&self, what: String, mend: String) -> Error {
        let id = match self.item.get("id").and_then(Value::as_u64) {
            Some(id) => format!(" (id {id})"),
            None => String::new(),
        };
        Error::input(format!("{}: row {}{id}: {what}", self.path.display(), self.index), mend)
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "list",
        Value::Object(_) => "object",
    }
}
