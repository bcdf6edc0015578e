//! Data sets on disk, synthetic examples, and that their ideal repairs repair.

mod pictures;

use std::path::Path;
use std::sync::OnceLock;

use image::{Rgb, RgbImage};
use varft::tasks::synthetic::{Config, Content, Strengths, Subset, Synthetic, teacher};
use varft::tasks::{Degradation, Example, Split, mat, scorer};
use varft::tools::python::environment;
use varft::tools::{Outcome, PythonOptions, PythonTool, Tool, ToolCall};

fn only(kinds: &[Degradation]) -> Config {
    Config { degradations: kinds.to_vec(), pairs: 0.0, ..Config::default() }
}

fn task(config: Config) -> Synthetic {
    Synthetic::new(config, 11).unwrap()
}

// ---- rows on disk

const ROWS: &str = r#"[
    {"id": 3, "question": "这是什么?", "answers": ["{'号码': '12'}", "b"], "ori_image_path": "dark_1_ori.png",
     "processed_image_path": "dark_1_proc.png", "type": ["dark"], "split": "simple"},
    {"id": 4, "question": "q", "answers": ["a\nb"], "ori_image_path": "x.png",
     "processed_image_path": "y.png", "type": ["rotation90", "overexposure"], "split": "hard"}
]"#;

#[test]
fn rows_survive_reading_and_writing() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("a.json"), dir.path().join("b.json"));
    std::fs::write(&first, ROWS).unwrap();
    let rows = mat::read(&first).unwrap();
    assert_eq!((rows[0].id, rows[0].question.as_str(), rows[0].split), (3, "这是什么?", Split::Simple));
    assert_eq!(rows[1].kinds, [Degradation::Rotation90, Degradation::Overexposure]);
    mat::write(&second, &rows).unwrap();
    assert_eq!(mat::read(&second).unwrap(), rows);
    let (a, b): (serde_json::Value, serde_json::Value) = (
        serde_json::from_str(ROWS).unwrap(),
        serde_json::from_str(&std::fs::read_to_string(&second).unwrap()).unwrap(),
    );
    assert_eq!(a, b, "the same fields under the same names");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
}

#[test]
fn errors_name_file_row_and_field() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.json");
    let broken = |from: &str, to: &str| {
        assert!(ROWS.contains(from), "{from}");
        std::fs::write(&path, ROWS.replacen(from, to, 1)).unwrap();
        mat::read(&path).unwrap_err().to_string()
    };
    for (from, to, wanted) in [
        ("\"id\": 4", "\"id\": \"4\"", vec!["row 1:", "`id` is a JSON string", "whole number"]),
        ("\"id\": 4", "\"id\": 3", vec!["rows 0 and 1", "id 3"]),
        ("\"id\": 4", "\"id\": -1", vec!["row 1", "`id`"]),
        ("\"answers\": [\"a\\nb\"]", "\"answers\": \"a\"", vec!["row 1 (id 4)", "`answers`", "list of strings"]),
        ("\"answers\": [\"a\\nb\"]", "\"answers\": []", vec!["row 1 (id 4)", "`answers` is empty"]),
        ("\"answers\": [\"a\\nb\"]", "\"answers\": [1]", vec!["row 1 (id 4)", "`answers`"]),
        ("\"overexposure\"", "\"bright\"", vec!["row 1 (id 4)", "`type`", "`bright`", "overexposure"]),
        ("[\"dark\"]", "[]", vec!["row 0 (id 3)", "`type` is empty"]),
        ("\"hard\"", "\"difficult\"", vec!["row 1", "`split` is `difficult`"]),
        ("\"split\": \"hard\"", "\"splits\": \"hard\"", vec!["row 1", "unknown field `splits`", "split"]),
        ("\"question\": \"q\", ", "", vec!["row 1 (id 4)", "no field `question`"]),
        ("{\"id\": 3", "{\"id\": 3,,", vec!["not JSON", "line 2"]),
        ("[\n", "7", vec!["not JSON"]),
    ] {
        let e = broken(from, to);
        assert!(e.contains("rows.json") && wanted.iter().all(|w| e.contains(w)), "{from} -> {to}: {e}");
    }
    std::fs::write(&path, "{}").unwrap();
    assert!(mat::read(&path).unwrap_err().to_string().contains("list of rows"));
    std::fs::write(&path, "[3]").unwrap();
    assert!(mat::read(&path).unwrap_err().to_string().contains("row 0: is a JSON number"));
    let e = mat::read(dir.path().join("none.json")).unwrap_err().to_string();
    assert!(e.contains("none.json") && e.contains("check the path"), "{e}");
}

#[test]
fn images_of_rows_are_loaded_or_named_in_the_error() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("rows.json"), ROWS).unwrap();
    let row = &mat::read(dir.path().join("rows.json")).unwrap()[0];
    let e = row.load(dir.path()).unwrap_err().to_string();
    assert!(e.contains("dark_1_ori.png") && e.contains("id 3"), "{e}");
    std::fs::write(dir.path().join("dark_1_ori.png"), b"\x89PNG\r\n\x1a\nbroken").unwrap();
    let e = row.load(dir.path()).unwrap_err().to_string();
    assert!(e.contains("dark_1_ori.png") && e.contains("decoded"), "{e}");
    std::fs::write(dir.path().join("dark_1_ori.png"), pictures::png_that_claims(30_000, 30_000)).unwrap();
    let e = row.load(dir.path()).unwrap_err().to_string();
    assert!(e.contains("dark_1_ori.png") && e.contains("id 3") && e.contains("30000x30000"), "{e}");
    for name in ["dark_1_ori.png", "dark_1_proc.png"] {
        RgbImage::from_pixel(3, 2, Rgb([1, 2, 3])).save(dir.path().join(name)).unwrap();
    }
    let example = row.load(dir.path()).unwrap();
    assert_eq!((example.input().dimensions(), example.answers.len()), ((3, 2), 2));
}

#[test]
fn boxes_are_read_from_questions() {
    let read = mat::crop_box;
    assert_eq!(read("Recognize the text within the [366, 723, 506, 851] of the image."), Some([366, 723, 506, 851]));
    assert_eq!(read("[a] of [1,2,3,1000] or [0, 0, 1, 1]"), Some([1, 2, 3, 1000]));
    for none in ["", "[1, 2, 3]", "[5, 5, 5, 9]", "[9, 0, 1, 9]", "[0, 0, 1, 1001]", "[0, 0, 1, 1", "[-1, 0, 1, 1]"] {
        assert_eq!(read(none), None, "{none}");
    }
}

// ---- published figures' arithmetic, on rows of our own

#[test]
fn a_file_of_predictions_scores_as_worked_out_by_hand() {
    let rows: [(Option<&str>, &[&str]); 5] = [
        (Some("It is March 14, 2017."), &["March 14th, 2017", "March 14, 2017"]), // 3 of 5 words, all 3 of gold
        (Some("the Red fox"), &["red fox"]),
        (Some("发票"), &["发票号码"]),
        (Some("go go"), &["go"]), // one word in common: 1/2 and 1/1; as multisets the same
        (None, &["x"]),
    ];
    let all: Vec<_> = rows.iter().map(|(answer, golds)| scorer::reference(*answer, golds)).collect();
    let mean = scorer::Score::mean(&all);
    let wanted = (0.75 + 1.0 + 2.0 / 3.0 + 2.0 / 3.0 + 0.0) / 5.0;
    assert!((mean.f1 - wanted).abs() < 1e-12 && (mean.em - 0.2).abs() < 1e-12, "{mean:?} {wanted}");
}

// ---- synthetic examples

#[test]
fn an_example_depends_on_its_seed_subset_and_index_alone() {
    let a = task(Config::default());
    let fifth = a.example(Subset::Train, 5);
    a.example(Subset::Train, 9);
    assert_eq!(a.example(Subset::Train, 5), fifth);
    assert_eq!(task(Config::default()).example(Subset::Train, 5), fifth);
    assert_ne!(a.example(Subset::HeldOut, 5).original, fifth.original);
    assert_ne!(a.example(Subset::Train, 6).original, fifth.original);
    assert_ne!(Synthetic::new(Config::default(), 12).unwrap().example(Subset::Train, 5).original, fifth.original);
}

#[test]
fn all_kinds_come_about_as_often_as_asked() {
    let small = Config { width: [64, 80], height: [56, 70], letters: [3, 4], digits: [2, 4], ..Config::default() };
    let task = task(small);
    let examples: Vec<Example> = (0..600).map(|i| task.example(Subset::Train, i)).collect();
    let pairs = examples.iter().filter(|e| e.kinds.len() == 2).count();
    assert!((110..190).contains(&pairs), "{pairs} of 600");
    for kind in Degradation::ALL {
        let n = examples.iter().filter(|e| e.kinds == [kind]).count();
        assert!((30..90).contains(&n), "{kind}: {n}");
    }
    for e in &examples {
        assert_eq!(e.split, Split::of(&e.kinds));
        assert_eq!(e.split == Split::Hard, e.kinds.len() == 2 || e.kinds == [Degradation::Crop]);
        assert!(e.answers.len() == 1 && !e.answers[0].is_empty() && e.question.ends_with(['?', '.']));
        assert!((64..=80).contains(&e.original.width()) && (56..=70).contains(&e.original.height()));
        if e.kinds.len() == 2 {
            assert!(matches!(e.kinds[0], Degradation::Rotation90 | Degradation::Rotation180));
            assert!(!matches!(e.kinds[1], Degradation::Crop | Degradation::None | Degradation::Rotation90));
        }
        let is_crop = e.kinds == [Degradation::Crop];
        assert_eq!(mat::crop_box(&e.question).is_some(), is_crop);
        assert_eq!(std::ptr::eq(e.input(), &e.original), is_crop);
    }
    for words in
        ["What word", "What number", "What color is the circle", "What color is the triangle", "inside the box"]
    {
        assert!(examples.iter().any(|e| e.question.starts_with(words) || e.question.contains(words)), "{words}");
    }
}

#[test]
fn held_out_answers_are_never_trained_on() {
    for letters in (3..=7).map(|n| [n, n]) {
        let content = vec![Content::Word, Content::Digits];
        let config = Config { letters, content, width: [200, 200], height: [60, 60], ..only(&[Degradation::None]) };
        let task = task(Config { grain: 0.0, clutter: [0, 0], ..config });
        let answers = |subset| -> std::collections::HashSet<String> {
            (0..150).map(|i| task.example(subset, i).answers[0].clone()).collect()
        };
        let (train, held_out) = (answers(Subset::Train), answers(Subset::HeldOut));
        assert!(held_out.len() >= 20 && train.is_disjoint(&held_out), "{letters:?} {held_out:?}");
    }
}

#[test]
fn tiny_and_large_images() {
    let tiny = Config { width: [56, 56], height: [56, 56], letters: [3, 3], digits: [2, 3], ..Config::default() };
    let tiny = task(tiny);
    for i in 0..200 {
        assert_eq!(tiny.example(Subset::Train, i).original.dimensions(), (56, 56));
    }
    let large = Config { width: [1400, 1400], height: [1000, 1000], font_scale: [4, 20], ..Config::default() };
    assert_eq!(task(large).example(Subset::Train, 0).original.dimensions(), (1400, 1000));
}

#[test]
fn a_configuration_that_cannot_work_is_refused_by_name() {
    let good = Config::default;
    let strong = |strengths: Strengths| Config { strengths, ..good() };
    for (config, wanted) in [
        (Config { width: [90, 80], ..good() }, "`width`"),
        (Config { height: [0, 80], ..good() }, "`height`"),
        (Config { letters: [2, 3], ..good() }, "`letters`"),
        (Config { digits: [1, 3], ..good() }, "`digits`"),
        (Config { font_scale: [0, 3], ..good() }, "`font_scale`"),
        (Config { width: [30, 80], ..good() }, "smallest image"),
        (Config { content: vec![], ..good() }, "`content`"),
        (Config { degradations: vec![], ..good() }, "`degradations`"),
        (Config { degradations: vec![Degradation::Crop], ..good() }, "`pairs`"),
        (Config { pairs: 1.5, ..good() }, "`pairs`"),
        (Config { grain: f32::NAN, ..good() }, "`grain`"),
        (strong(Strengths { dark: [0.0, 0.2], ..Strengths::default() }), "`strengths.dark`"),
        (strong(Strengths { noise: [0.1, f32::NAN], ..Strengths::default() }), "`strengths.noise`"),
        (strong(Strengths { blur: [2.0, 1.0], ..Strengths::default() }), "`strengths.blur`"),
    ] {
        let e = Synthetic::new(config, 0).err().unwrap().to_string();
        assert!(e.contains(wanted) && e.contains("to mend it"), "{wanted}: {e}");
    }
    let empty = tempfile::tempdir().unwrap();
    let config = Config { photographs: Some(empty.path().into()), ..good() };
    assert!(Synthetic::new(config, 0).err().unwrap().to_string().contains("no photographs"));
    std::fs::write(empty.path().join("flat.png"), pictures::png_that_claims(0, 9)).unwrap();
    let config = Config { photographs: Some(empty.path().into()), ..good() };
    let e = Synthetic::new(config, 0).err().unwrap().to_string();
    assert!(e.contains("flat.png (a photograph)") && e.contains("0x9") && e.contains("to mend it"), "{e}");
}

#[test]
fn a_data_set_on_disk_is_the_one_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let task = task(Config { width: [90, 100], height: [60, 70], letters: [3, 4], ..Config::default() });
    let rows = task.write_dataset(dir.path(), Subset::HeldOut, 12).unwrap();
    assert_eq!(mat::read(dir.path().join("synthetic.json")).unwrap(), rows);
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(row.load(dir.path().join("images")).unwrap(), task.example(Subset::HeldOut, i as u64));
        assert!(Path::new(&row.ori_image_path).extension().is_some_and(|e| e == "png"));
    }
}

// ---- the ideal repair, run by the tool

fn tool() -> &'static PythonTool {
    static TOOL: OnceLock<PythonTool> = OnceLock::new();
    TOOL.get_or_init(|| {
        eprintln!("setting up the python tool (the first time on a machine this downloads numpy, OpenCV and Pillow)");
        PythonTool::new(PythonOptions::default()).unwrap()
    })
}

fn repaired(example: &Example) -> RgbImage {
    let result = tool().run(ToolCall::new(teacher(example)).image(example.input().clone())).unwrap();
    assert_eq!(result.outcome, Outcome::Ok, "{}", teacher(example));
    result.image.unwrap_or_else(|| (**example.input()).clone())
}

/// Mean absolute difference, after both images are stretched to the same mean and spread: a repair may change the light.
fn difference(a: &RgbImage, b: &RgbImage) -> f64 {
    assert_eq!(a.dimensions(), b.dimensions());
    let normal = |i: &RgbImage| -> Vec<f64> {
        let mean = i.iter().map(|v| f64::from(*v)).sum::<f64>() / i.len() as f64;
        let spread = (i.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / i.len() as f64).sqrt().max(1.0);
        i.iter().map(|v| (f64::from(*v) - mean) / spread).collect()
    };
    normal(a).iter().zip(normal(b)).map(|(x, y)| (x - y).abs()).sum::<f64>() / a.len() as f64
}

fn spread(image: &RgbImage) -> u8 {
    image.iter().max().unwrap() - image.iter().min().unwrap()
}

#[test]
fn rotations_are_undone_exactly() {
    for kind in [Degradation::Rotation90, Degradation::Rotation180] {
        for i in 0..3 {
            let example = task(only(&[kind])).example(Subset::Train, i);
            assert_ne!(example.processed, example.original);
            assert_eq!(repaired(&example), *example.original, "{kind}");
        }
    }
    let example = task(only(&[Degradation::None])).example(Subset::Train, 0);
    assert_eq!((teacher(&example).as_str(), example.input()), ("", &example.original));
}

#[test]
fn light_comes_back() {
    for kind in [Degradation::Dark, Degradation::Overexposure] {
        for i in 0..4 {
            let example = task(only(&[kind])).example(Subset::Train, i);
            let repaired = repaired(&example);
            assert!(spread(&example.processed) < 100 && spread(&repaired) > 150, "{kind}");
            assert!(difference(&repaired, &example.original) < 0.06, "{kind} {i}");
        }
    }
}

#[test]
fn noise_and_blur_are_lessened() {
    for (kind, share) in [(Degradation::Noise, 0.35), (Degradation::Blur, 0.9)] {
        for i in 0..6 {
            let content = vec![Content::Word, Content::Digits];
            let config = Config { content, clutter: [0, 0], grain: 1.0, ..only(&[kind]) };
            let example = task(config).example(Subset::Train, i);
            let (before, after) =
                (difference(&example.processed, &example.original), difference(&repaired(&example), &example.original));
            assert!(after < before * share, "{kind} {i}: {before} -> {after}");
        }
    }
}

#[test]
fn pairs_are_undone_one_after_the_other() {
    let config =
        Config { degradations: vec![Degradation::Rotation90, Degradation::Dark], pairs: 1.0, ..Config::default() };
    let example = task(config).example(Subset::Train, 0);
    assert_eq!(example.kinds, [Degradation::Rotation90, Degradation::Dark]);
    assert_eq!(teacher(&example).lines().count(), 2);
    assert!(difference(&repaired(&example), &example.original) < 0.06);
}

#[test]
fn a_crop_is_the_part_that_is_asked_about_enlarged() {
    for i in 0..5 {
        let example = task(only(&[Degradation::Crop])).example(Subset::Train, i);
        let part = repaired(&example);
        let small = &example.processed;
        assert_eq!(part.dimensions(), (small.width() * 4, small.height() * 4), "{}", teacher(&example));
        assert!(small.width() * 2 < example.original.width() || small.height() * 2 < example.original.height());
        let back = image::imageops::resize(&part, small.width(), small.height(), image::imageops::FilterType::Triangle);
        assert!(difference(&back, small) < 0.35, "{i}: {}", difference(&back, small));
    }
}

#[test]
fn photographs_serve_as_backgrounds() {
    let folder = varft::tasks::synthetic::photographs(&environment::Search::default()).unwrap();
    let config = Config { photographs: Some(folder), photograph_share: 1.0, ..only(&[Degradation::Dark]) };
    let task = task(config);
    let example = task.example(Subset::Train, 0);
    assert_eq!(task.example(Subset::Train, 0), example);
    let plain = Synthetic::new(only(&[Degradation::Dark]), 11).unwrap().example(Subset::Train, 0);
    assert_ne!(plain.original, example.original);
}
