use super::synthetic::{Subset, Synthetic};
use super::{Example, mat};
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Questions by number: a data set, made as it goes or read from files.
pub trait Examples: Send + Sync {
    /// How many there are; at least 1.
    fn len(&self) -> u64;
    /// Whether there are none, which no source should say.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The `i`-th, from 0; the same at every call.
    ///
    /// # Errors
    /// When its image cannot be read or made.
    fn get(&self, i: u64) -> Result<Arc<Example>>;
    /// What decides how long the prompt of the `i`-th is, without its image where that is quicker.
    ///
    /// # Errors
    /// As [`get`](Self::get), as far as it is looked at.
    fn outline(&self, i: u64) -> Result<Outline> {
        self.get(i).map(|e| Outline::of(&e))
    }
}

/// What decides how long an item's prompt is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outline {
    /// Names the item in errors.
    pub name: String,
    /// What is asked; of a source that makes its questions, one as long as any of this item's kind.
    pub question: String,
    /// (height, width) of the image that the agent is given, in pixels.
    pub size: (usize, usize),
}

impl Outline {
    /// That of an example in memory.
    pub fn of(example: &Example) -> Outline {
        let (width, height) = example.input().dimensions();
        Outline {
            name: format!("item {}", example.id),
            question: example.question.clone(),
            size: (height as usize, width as usize),
        }
    }
}

/// Rows of a file in MAT-Coding's format; images are read when a row is asked for.
pub struct MatExamples {
    file: PathBuf,
    rows: Vec<mat::Row>,
    images: PathBuf,
}

impl MatExamples {
    /// Reads the rows of `file`; image paths start from `images`.
    ///
    /// # Errors
    /// When the file cannot be read, a row is malformed, or there is none.
    pub fn open(file: &Path, images: &Path) -> Result<MatExamples> {
        let rows = mat::read(file)?;
        if rows.is_empty() {
            return Err(Error::input(format!("{} has no rows", file.display()), "give a file with at least one row"));
        }
        Ok(MatExamples { file: file.to_path_buf(), rows, images: images.to_path_buf() })
    }
}

impl Examples for MatExamples {
    fn len(&self) -> u64 {
        self.rows.len() as u64
    }
    fn get(&self, i: u64) -> Result<Arc<Example>> {
        self.rows[i as usize].load(&self.images).map(Arc::new)
    }
    fn outline(&self, i: u64) -> Result<Outline> {
        let row = &self.rows[i as usize];
        let name = format!("{}: row {i} (id {})", self.file.display(), row.id);
        Ok(Outline { name, question: row.question.clone(), size: row.input_size(&self.images)? })
    }
}

/// The first examples of a subset of the synthetic task; each is made when it is asked for.
pub struct SyntheticExamples {
    /// Makes them.
    pub task: Arc<Synthetic>,
    /// To learn from, or held out.
    pub subset: Subset,
    /// How many; at least 1.
    pub items: u64,
}

impl Examples for SyntheticExamples {
    fn len(&self) -> u64 {
        self.items
    }
    fn get(&self, i: u64) -> Result<Arc<Example>> {
        Ok(Arc::new(self.task.example(self.subset, i)))
    }
    fn outline(&self, i: u64) -> Result<Outline> {
        let (question, size) = self.task.outline(self.subset, i);
        Ok(Outline { name: format!("item {i} of the synthetic task"), question, size })
    }
}
