//! A run folder is written as a run writes it, and its page is read as a stranger's browser would.

use std::path::Path;
use varft::report::view::{EpisodeView, Phase, RewardPart, StepView, TokenView};
use varft::report::{Limits, MetricsLog, TrajectoryStore, write, write_with};

/// An image with a gradient, so that no two seeds look alike.
fn picture(seed: u32, w: u32, h: u32) -> Vec<u8> {
    let at = |x: u32, y: u32| [x * 255 / w, y * 255 / h, (x * seed + y * 7) % 256].map(|v| v as u8);
    (0..h).flat_map(|y| (0..w).flat_map(move |x| at(x, y))).collect()
}

fn tokens(text: &str) -> Vec<TokenView> {
    let pieces = text.split_inclusive([' ', '\n', '(', ',']).enumerate();
    pieces.map(|(i, t)| TokenView { text: t.into(), logp: -((i * 37 % 100) as f32 / 100.0).powi(6) * 5.0 }).collect()
}

fn episode(store: &TrajectoryStore, phase: Phase, step: u64, group: u64, sample: u64) -> EpisodeView {
    let (w, h) = (160, 120);
    let seed = (group * 31 + 5) as u32;
    let before = store.image(w, h, &picture(seed, w, h)).unwrap();
    let turned = picture(seed, w, h).chunks(3).rev().flatten().copied().collect::<Vec<u8>>();
    let after = store.image(w, h, &turned).unwrap();
    let right = (sample * 7 + step + group * 3) % 10 > 4;
    let code = "import cv2\nimage = cv2.imread(path)\ncv2.imwrite(out, cv2.rotate(image, cv2.ROTATE_180))\n";
    let said = format!("The text stands on its head.\n<code>```python\n{code}```</code>");
    let user = StepView {
        who: "user".into(),
        text: "<query> Which word is written on the sign? </query>".into(),
        image_before: Some(before.clone()),
        ..Default::default()
    };
    let first = StepView {
        who: "assistant".into(),
        tokens: tokens(&said),
        text: said,
        code: Some(code.into()),
        tool_output: Some(if right { "saved (120, 160, 3)" } else { "NameError: name 'path' is not defined" }.into()),
        tool_status: Some(if right { "ok" } else { "exception" }.into()),
        tool_ms: Some(8.25),
        image_before: Some(before.clone()),
        image_after: Some(if right { after.clone() } else { before }),
    };
    let answer = if right { "HARBOUR" } else { "3N0H" };
    let second = StepView {
        who: "assistant".into(),
        text: format!("<answer> {answer} </answer>"),
        tokens: tokens(&format!("<answer> {answer} </answer>")),
        ..Default::default()
    };
    let part = |name: &str, value| RewardPart { name: name.into(), value };
    EpisodeView {
        step,
        phase,
        item: format!("item-{group}"),
        kind: "rotation180".into(),
        group,
        sample,
        of: if phase == Phase::Train { 4 } else { 1 },
        question: "Which word is written on the sign?".into(),
        answers: vec!["HARBOUR".into()],
        prediction: Some(answer.into()),
        finish: "answered".into(),
        steps: vec![user, first, second],
        f1: f64::from(right),
        em: f64::from(right),
        reward: if right { 1.2 } else { 0.2 },
        reward_parts: vec![part("answer", f64::from(right)), part("format", 0.2)],
        advantage: (phase == Phase::Train).then_some(if right { 0.93 } else { -0.93 }),
    }
}

fn run(dir: &Path, steps: u64) -> TrajectoryStore {
    let store = TrajectoryStore::open(dir).unwrap();
    let mut log = MetricsLog::open(dir, 0, true).unwrap();
    let wave = |s: u64, k: u64| ((s * k * 2654435761) % 1000) as f64 / 1000.0;
    for s in 0..=steps {
        let t = s as f64 / steps as f64;
        if s % 10 == 0 {
            log.log(s, &[("eval/f1", 0.31 + 0.4 * t), ("eval/em", 0.24 + 0.41 * t)]).unwrap();
            let all: Vec<_> = (0..4).map(|g| episode(&store, Phase::Eval, s, g, 0)).collect();
            store.write(Phase::Eval, s, &all).unwrap();
        }
        if s == 0 {
            continue;
        }
        let answer = 0.3 + 0.4 * t + 0.1 * wave(s, 3);
        log.log(
            s,
            &[
                ("reward/mean", answer + 0.2),
                ("reward/answer", answer),
                ("reward/format", 0.2 - 0.05 * wave(s, 5)),
                ("train/f1", answer),
                ("train/em", answer - 0.07),
                ("policy/kl", 0.03 * t + 0.01 * wave(s, 7)),
                ("policy/entropy", 1.4 - 0.9 * t + 0.1 * wave(s, 11)),
                ("policy/clip_share", 0.02 * wave(s, 13)),
                ("optim/grad_norm", if s == 7 { f64::NAN } else { 0.5 + wave(s, 17) }),
                ("optim/lr", 1e-6 * (1.0 - t)),
                ("tools/calls", 1.0 + 0.4 * t + 0.2 * wave(s, 19)),
                ("tools/exceptions", 0.3 - 0.2 * t),
                ("episodes/well_formed", 0.9 + 0.08 * t),
                ("episodes/used_tool", 0.5 + 0.45 * t),
                ("episodes/tokens", 180.0 + 40.0 * wave(s, 23)),
                ("speed/rollout_tokens_s", 2100.0 + 300.0 * wave(s, 29)),
                ("speed/train_tokens_s", 900.0 + 90.0 * wave(s, 31)),
            ],
        )
        .unwrap();
        let all: Vec<_> = (0..2)
            .flat_map(|g| (0..4).map(move |n| (g, n)))
            .map(|(g, n)| episode(&store, Phase::Train, s - 1, g, n))
            .collect();
        // Filed, as a run does, under the updates that their policy had.
        store.write(Phase::Train, s - 1, &all).unwrap();
    }
    std::fs::write(dir.join("config.toml"), "[algo]\nloss = \"dapo\"\n").unwrap();
    store
}

fn page(dir: &Path) -> String {
    std::fs::read_to_string(write(dir).unwrap()).unwrap()
}

#[test]
fn a_run_becomes_one_page_that_needs_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), 40);
    let html = page(dir.path());
    for part in ["Held-out F1 and exact match", "KL to the reference", "Tokens per second", "31.0% → ", "71.0%"] {
        assert!(html.contains(part), "{part}");
    }
    for part in ["http:", "https:", "src=\"", "href=", "@import", "url("] {
        // The one address in it names the SVG namespace for createElementNS; nothing is loaded.
        let html = html.replace("http://www.w3.org/2000/svg", "");
        assert!(!html.contains(part), "{part}");
    }
    // 4 questions with an image before and one after, in several steps and both phases: each is embedded once.
    assert_eq!(html.matches("data:image/").count(), 8);
    assert!(html.contains("log p -"));
    assert!(html.contains("advantage <b>+0.93</b>") && html.contains("advantage <b>-0.93</b>"));
}

#[test]
fn the_page_says_how_much_of_the_run_it_shows_and_cuts_no_group() {
    let dir = tempfile::tempdir().unwrap();
    let store = run(dir.path(), 40);
    // Of 5 measurements of 4 episodes and 40 steps of 8 in groups of 4.
    let limits = Limits { steps: 3, episodes: 18, ..Limits::default() };
    let html = std::fs::read_to_string(write_with(dir.path(), &limits).unwrap()).unwrap();
    assert!(
        html.contains("shows 24 of the 340 episodes that the run kept, from 6 of its 45 measurements and steps"),
        "{html}"
    );
    let training =
        ["Training, step 1<span> 4 of 8 episodes", "Training, step 20<span> 4 of 8", "Training, step 40<span> 4 of 8"];
    let held_out = ["Held-out, after step 0<span> 4 of 4", "Held-out, after step 40<span> 4 of 4"];
    for part in training.iter().chain(&held_out) {
        assert!(html.contains(part), "{part}");
    }
    assert!(!html.contains("of its 4 episodes"), "groups are whole");
    let file = store.files().unwrap().pop().unwrap();
    let read = |max| store.read(&file, max).map(|(some, all)| (some.len(), all)).unwrap();
    assert_eq!([3, 4, 7, 8, 9].map(read), [(3, 8), (4, 8), (4, 8), (8, 8), (8, 8)]);
    // A group that the run itself did not keep whole, or that is larger than what may be shown.
    let html = std::fs::read_to_string(write_with(dir.path(), &Limits { episodes: 2, steps: 1, ..limits }).unwrap());
    assert!(html.unwrap().contains("2 of its 4 episodes"));
}

#[test]
fn the_page_names_the_run_and_opens_on_what_it_changed() {
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), 40);
    let config = "[run]\nseed = 7\n[model]\npath = \"models/<mine>\"\n[task]\nkind = \"mat\"\neval = \"rows.json\"\n";
    std::fs::write(dir.path().join("config.toml"), config).unwrap();
    let html = page(dir.path());
    for fact in
        ["model <b>models/&lt;mine&gt;</b>", "task <b>mat, rows.json</b>", "seed <b>7</b>", "last measured <b>20"]
    {
        assert!(html.contains(fact), "{fact}");
    }
    let ends = html.split("id=\"ends\"").nth(1).unwrap().split("</section>").next().unwrap();
    assert!(ends.contains("4 questions after step 0 and after step 40"), "{ends}");
    assert_eq!((ends.matches("<article").count(), ends.matches("<details class=\"episode\"").count()), (4, 8));
    assert_eq!(ends.matches("<span class=\"num\">before</span>").count(), 4);
    // An evaluation shows the table that it printed, and no curve of one point.
    let dir = tempfile::tempdir().unwrap();
    MetricsLog::open(dir.path(), 0, false).unwrap().log(0, &[("eval/f1", 0.5), ("eval/em", 0.25)]).unwrap();
    std::fs::write(dir.path().join(varft::report::TABLE), "all  4  <50.0>\n").unwrap();
    let html = page(dir.path());
    assert!(html.contains("<pre class=\"scores\">all  4  &lt;50.0&gt;</pre>") && !html.contains("<figure"), "{html}");
}

#[test]
fn rollouts_without_training_have_no_steps() {
    let dir = tempfile::tempdir().unwrap();
    let store = TrajectoryStore::open(dir.path()).unwrap();
    store.write(Phase::Train, 0, &[episode(&store, Phase::Train, 0, 0, 0)]).unwrap();
    MetricsLog::open(dir.path(), 0, false).unwrap().log(0, &[("reward/mean", 0.5)]).unwrap();
    let html = page(dir.path());
    assert!(html.contains("<h3>Rollouts <span> 1 of 1") && html.contains("no training") && !html.contains("Training"));
}

#[test]
fn the_page_can_be_made_from_parts_of_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let e = write(dir.path()).unwrap_err().to_string();
    assert!(e.contains("runs/"), "{e}");
    MetricsLog::open(dir.path(), 0, false).unwrap();
    assert!(page(dir.path()).contains("no step is complete yet"));
    let store = run(dir.path(), 3);
    let first = store.files().unwrap().remove(0);
    let name = store.read(&first, 1).unwrap().0[0].steps[0].image_before.clone().unwrap();
    std::fs::remove_file(store.image_path(&name).unwrap()).unwrap();
    assert!(page(dir.path()).contains("image left out"));
}

#[test]
fn what_a_model_says_stays_text() {
    let hostile = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"'&\u{202e}\0]]>--!>";
    let dir = tempfile::tempdir().unwrap();
    let store = run(dir.path(), 1);
    let mut e = episode(&store, Phase::Train, 1, 0, 0);
    for field in [&mut e.item, &mut e.kind, &mut e.question, &mut e.finish] {
        *field = hostile.into();
    }
    e.answers = vec![hostile.into()];
    e.prediction = Some(hostile.into());
    e.reward_parts[0].name = hostile.into();
    (e.reward, e.f1, e.em) = (f64::MAX, 0.5, 0.0);
    for s in &mut e.steps {
        s.who = hostile.into();
        s.text = hostile.into();
        s.tokens.push(TokenView { text: hostile.into(), logp: -9.0 });
        s.code = Some(hostile.into());
        s.tool_output = Some(hostile.into());
        s.tool_status = Some(hostile.into());
    }
    store.write(Phase::Train, 1, &[e]).unwrap();
    let mut log = MetricsLog::open(dir.path(), 1, false).unwrap();
    log.log(1, &[(hostile, 1.0)]).unwrap();
    std::fs::write(dir.path().join("config.toml"), hostile).unwrap();
    let html = page(dir.path());
    assert_eq!(html.matches("<script").count(), 2);
    assert_eq!(html.matches("</script").count(), 2);
    assert!(!html.contains("<img src") && !html.contains('\u{202e}') && !html.contains('\0'));
    assert!(html.contains("&lt;img src=x onerror=&#39;"));
}

#[test]
fn an_image_name_cannot_leave_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let store = run(dir.path(), 1);
    std::fs::write(dir.path().join("secret.png"), "x").unwrap();
    let name = |n: &str| serde_json::from_str(&format!("{n:?}")).unwrap();
    assert!(store.image_path(&name("../../secret")).is_none());
    assert!(store.image_path(&name(&"0".repeat(32))).is_some());
}

#[test]
fn images_stay_within_their_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = run(dir.path(), 2);
    let big = store.image(1200, 300, &picture(9, 1200, 300)).unwrap();
    let mut e = episode(&store, Phase::Train, 2, 9, 0);
    e.steps[0].image_before = Some(big);
    store.write(Phase::Train, 2, &[e]).unwrap();
    let all = std::fs::read_to_string(write(dir.path()).unwrap()).unwrap();
    assert!(all.contains("data:image/jpeg"));
    let limits = Limits { image_bytes: 5000, ..Limits::default() };
    let few = std::fs::read_to_string(write_with(dir.path(), &limits).unwrap()).unwrap();
    let held: usize = few.split("\"data:image/").skip(1).map(|p| p.split('"').next().unwrap().len()).sum();
    assert!(held <= 5000 && few.contains("image left out"));
}

#[test]
fn a_resumed_run_drops_the_episodes_it_lost() {
    let dir = tempfile::tempdir().unwrap();
    let store = run(dir.path(), 4);
    store.cut(2).unwrap();
    assert!(store.files().unwrap().iter().all(|f| f.step <= 2));
    let first = store.files().unwrap().remove(0);
    let (read, all) = store.read(&first, 10).unwrap();
    assert_eq!(all, 4);
    assert_eq!(read[3], episode(&store, Phase::Eval, 0, 3, 0));
}
