//! experiment
use image::RgbImage;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use varft::agent::*;
use varft::device::Device;
use varft::engine::*;
use varft::input::*;
use varft::model::*;
use varft::tasks::*;
use varft::tools::*;
use varft::train::config::*;
use varft::train::learner::*;
use varft::train::*;

const F: [&str; 10] = [
    "01110100011001110101110011000101110",
    "00100011000010000100001000010001110",
    "01110100010000100010001000100011111",
    "11111000100010000010000011000101110",
    "00010001100101010010111110001000010",
    "11111100001111000001000011000101110",
    "00110010001000011110100011000101110",
    "11111000010001000100010000100001000",
    "01110100011000101110100011000101110",
    "01110100011000101111000010001001100",
];
struct Rng(u64);
impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E3779B97F4A7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58476D1CE4E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D049BB133111EB);
        x ^ (x >> 31)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn f(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
    fn normal(&mut self) -> f64 {
        (0..6).map(|_| self.f()).sum::<f64>() * 1.414 - 3.0 * 1.414
    }
}
const S: usize = 84;
struct Digits {
    seed: u64,
    n: u64,
}
const KINDS: [Degradation; 5] = [
    Degradation::Rotation90,
    Degradation::Rotation180,
    Degradation::Dark,
    Degradation::Overexposure,
    Degradation::None,
];
fn kinds() -> usize {
    std::env::var("KINDS").ok().and_then(|s| s.parse().ok()).unwrap_or(4)
}
impl Examples for Digits {
    fn len(&self) -> u64 {
        self.n
    }
    fn get(&self, i: u64) -> varft::Result<Arc<Example>> {
        let mut r = Rng(self.seed.wrapping_mul(0x1234567).wrapping_add(i << 20));
        r.next();
        let bg: Vec<f64> = (0..3).map(|_| 150.0 + r.f() * 105.0).collect();
        let fg: Vec<f64> = (0..3).map(|_| r.f() * 90.0).collect();
        let mut im = vec![0f64; S * S * 3];
        for p in 0..S * S {
            for c in 0..3 {
                im[p * 3 + c] = bg[c];
            }
        }
        let ds = [r.below(10) as usize, r.below(10) as usize];
        let sc = 5;
        let w = (6 * 2 - 1) * sc;
        let h = 7 * sc;
        let x0 = (S - w) / 2 + r.below(9) as usize - 4;
        let y0 = (S - h) / 2 + r.below(9) as usize - 4;
        for (k, &d) in ds.iter().enumerate() {
            for (j, ch) in F[d].bytes().enumerate() {
                if ch == b'1' {
                    for dy in 0..sc {
                        for dx in 0..sc {
                            let (x, y) = (x0 + 6 * k * sc + (j % 5) * sc + dx, y0 + (j / 5) * sc + dy);
                            for c in 0..3 {
                                im[(y * S + x) * 3 + c] = fg[c];
                            }
                        }
                    }
                }
            }
        }
        for v in &mut im {
            *v = (*v + r.normal() * 4.0).clamp(0.0, 255.0);
        }
        let kind = KINDS[r.below(kinds() as u64) as usize];
        let get = |x: usize, y: usize, c: usize| im[(y * S + x) * 3 + c];
        let mut ori = RgbImage::new(S as u32, S as u32);
        let mut out = RgbImage::new(S as u32, S as u32);
        for y in 0..S {
            for x in 0..S {
                let mut px = [0u8; 3];
                let mut po = [0u8; 3];
                for c in 0..3 {
                    po[c] = get(x, y, c) as u8;
                    px[c] = match kind {
                        Degradation::Rotation180 => get(S - 1 - x, S - 1 - y, c),
                        Degradation::Rotation90 => get(y, S - 1 - x, c),
                        Degradation::Dark => (get(x, y, c) * 0.12).round(),
                        Degradation::Overexposure => (255.0 - (255.0 - get(x, y, c)) * 0.12).round(),
                        _ => get(x, y, c),
                    } as u8;
                }
                out.put_pixel(x as u32, y as u32, image::Rgb(px));
                ori.put_pixel(x as u32, y as u32, image::Rgb(po));
            }
        }
        Ok(Arc::new(Example {
            id: i,
            question: "What number is this?".into(),
            answers: vec![format!("{} {}", ds[0], ds[1])],
            kinds: vec![kind],
            split: Split::Simple,
            original: Arc::new(ori),
            processed: Arc::new(out),
        }))
    }
}
fn repair(k: Degradation) -> &'static str {
    match k {
        Degradation::Rotation90 => "image = cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE)",
        Degradation::Rotation180 => "image = cv2.rotate(image, cv2.ROTATE_180)",
        Degradation::Dark => "image = cv2.convertScaleAbs(image, alpha=8)",
        Degradation::Overexposure => "image = 255 - cv2.convertScaleAbs(255 - image, alpha=8)",
        _ => "image = image.copy()",
    }
}
fn main() -> varft::Result<()> {
    let arg = |k: &str, d: f64| {
        std::env::args().find_map(|a| a.strip_prefix(&format!("{k}=")).map(|v| v.parse::<f64>().unwrap())).unwrap_or(d)
    };
    let seed = arg("seed", 0.0) as u64;
    let device = Device::cpu(0);
    let tok = Arc::new(Tokenizer::load("/work/ref/models/tiny")?);
    let template = Arc::new(ChatTemplate::builtin());
    let mut c = Preset::Tiny.config();
    c.hidden_size = arg("h", 128.0) as usize;
    c.intermediate_size = 2 * c.hidden_size;
    c.layers = arg("layers", 4.0) as usize;
    c.mrope_section = [4, 6, 6];
    c.rope_theta = 1e4;
    c.vision.hidden_size = arg("vh", 64.0) as usize;
    c.vision.intermediate_size = 2 * c.vision.hidden_size;
    c.vision.heads = 4;
    c.vision.out_hidden_size = c.hidden_size;
    c.vision.full_attention_blocks = vec![0, 1, 2, 3];
    let model = Arc::new(Model::random(c, seed, &device, &LoadOptions::default())?);
    println!("{} params", model.params.count());
    let pre = Arc::new(Preprocessor::new(ImageProcessor::default(), 1, 64 << 20)?);
    let tool = Arc::new(varft::tools::python::PythonTool::new(Default::default())?);
    let see: Arc<See> = {
        let pre = pre.clone();
        Arc::new(move |i: &Arc<RgbImage>| {
            pre.submit(ImageSource::Picture {
                picture: Arc::new(Picture {
                    pixels: i.as_raw().clone(),
                    height: i.height() as usize,
                    width: i.width() as usize,
                }),
                name: "image".into(),
            })
            .wait()
        })
    };
    let protocol = CodingProtocol { style: PromptStyle::Brief };
    let optim = Optim {
        lr: arg("lr", 1e-3),
        steps: arg("sft", 500.0) as u64,
        warmup_steps: 50,
        schedule: schedule::Decay::Cosine,
        final_lr: 0.02,
        weight_decay: 0.01,
        micro_batch_tokens: 8192,
        ..Default::default()
    };
    let engine = Arc::new(Engine::start(
        model.clone(),
        EngineOptions {
            kv_bytes: 256 << 20,
            max_context: 1024,
            max_sequences: 128,
            step_tokens: 2048,
            tokenizer: Some(tok.clone()),
            ..Default::default()
        },
    )?);
    let mut learner = Learner::new(model.clone(), &optim, engine.forbidden());
    let train = Digits { seed: 1, n: 1 << 30 };
    let b = arg("b", 32.0) as u64;
    let k = kinds();
    let t0 = Instant::now();
    let teach = |i: u64| -> varft::Result<Trajectory> {
        let e = train.get(i)?;
        let mut r = Rng(i ^ 0xABCDEF);
        let guess = KINDS[r.below(k as u64) as usize];
        let policy = ScriptedPolicy {
            tokenizer: tok.clone(),
            template: template.clone(),
            lines: vec![
                format!("<problem>{{'{}'}}</problem><code>```python\n{}\n```</code>", guess.name(), repair(guess)),
                format!("<answer>{}</answer>", e.answers[0]),
            ],
        };
        let ro = Rollouts {
            policy: Arc::new(policy),
            protocol: protocol.clone(),
            tool: tool.clone(),
            see: see.clone(),
            options: EpisodeOptions::default(),
            concurrency: 1,
            stop: Arc::new(AtomicBool::new(false)),
        };
        let mut t = ro
            .run(&[Job { example: e.clone(), group: i, samples: 1 }], 0, |_, _| ())?
            .pop()
            .unwrap()
            .pop()
            .unwrap()
            .map_err(|v| v.error)?;
        assert!(t.steps.iter().all(|s| s.well_formed) && t.steps.len() == 2, "{:?}", t.steps);
        if guess != e.kinds[0] {
            let range = t.steps[1].tokens.clone(); // keep tags, mask the answer text
            for j in range {
                t.authors[j] = Author::Tool;
            }
        }
        Ok(t)
    };
    let sched = Schedule::new(&optim);
    let warm = "/work/qs/warm";
    if arg("load", 0.0) == 0.0 {
        for step in 0..optim.steps {
            let ts = Instant::now();
            let eps: Vec<Trajectory> = std::thread::scope(|sc| {
                let hs: Vec<_> = (0..2)
                    .map(|w| {
                        let teach = &teach;
                        sc.spawn(move || {
                            (0..b).filter(|j| j % 2 == w).map(|j| teach(step * b + j).unwrap()).collect::<Vec<_>>()
                        })
                    })
                    .collect();
                hs.into_iter().flat_map(|h| h.join().unwrap()).collect()
            });
            let tt = ts.elapsed().as_secs_f64();
            let micros = sft::supervised(&eps, 8192);
            let (st, up) = learner.update(&micros, Goal::Nll, None, sched.lr(step))?;
            if step % 20 == 0 || step + 1 == optim.steps {
                let n = st.loss.len() as f32;
                // loss on answer digits
                let mut dig = 0.0;
                let mut nd = 0;
                let mut at = 0;
                for e in &eps {
                    for (s, st_) in e.steps.iter().enumerate() {
                        for j in st_.tokens.clone() {
                            if e.authors[j] == Author::Policy {
                                if s == 1 {
                                    let txt = tok.decode(&e.sequence.tokens[j..j + 1]);
                                    if txt.trim().parse::<u8>().is_ok() {
                                        dig += st.loss[at];
                                        nd += 1;
                                    }
                                }
                                at += 1;
                            }
                        }
                    }
                }
                println!(
                    "step {step} loss {:.3} digit loss {:.3} rows {} entries {} grad {:.2} tool {:.2}s step {:.2}s  {:.0}s",
                    st.loss.iter().sum::<f32>() / n,
                    dig / nd as f32,
                    micros.iter().map(|m| m.rows()).sum::<usize>(),
                    st.loss.len(),
                    up.grad_norm,
                    tt,
                    ts.elapsed().as_secs_f64(),
                    t0.elapsed().as_secs_f64()
                );
            }
        }
        let s = device.stream();
        model.save(&s, std::path::Path::new(warm), &SaveOptions::default())?;
    } else {
        let m2 = Model::load(std::path::Path::new(warm), &device, &LoadOptions::default())?;
        let s = device.stream();
        s.copy(&m2.params.flat, &model.params.flat);
        s.synchronize()?;
    }
    {
        let p = engine.pause()?;
        p.weights_changed()?;
    }
    let policy = Arc::new(EnginePolicy::new(engine.clone(), tok.clone(), template.clone()));
    let options = EpisodeOptions {
        max_turns: 3,
        sampling: Sampling { max_tokens: 80, temperature: 1.0, ..Default::default() },
        ..Default::default()
    };
    let ro = Rollouts {
        policy,
        protocol: protocol.clone(),
        tool: tool.clone(),
        see: see.clone(),
        options: options.clone(),
        concurrency: 64,
        stop: Arc::new(AtomicBool::new(false)),
    };
    let held: Vec<Arc<Example>> = (0..300).map(|i| Digits { seed: 2, n: 1000 }.get(i)).collect::<varft::Result<_>>()?;
    let eval = |name: &str, withhold: bool| -> varft::Result<()> {
        let t = Instant::now();
        let r = Rollouts {
            options: EpisodeOptions {
                withhold_images: withhold,
                sampling: Sampling { temperature: arg("et", 0.0) as f32, ..options.sampling.clone() },
                ..options.clone()
            },
            ..ro.clone()
        };
        let (s, _, eps) = run::evaluate(&r, &held, 5, |_, _| ())?;
        let mut by = std::collections::BTreeMap::<String, (f64, usize, usize)>::new();
        for t in eps.iter().flatten().flatten() {
            let e = by.entry(t.kind.clone()).or_default();
            e.0 += t.reward.f1;
            e.1 += 1;
            e.2 += usize::from(t.steps[0].problem.first().is_some_and(|p| *p == t.kind));
        }
        println!(
            "{name}: f1 {:.3} em {:.3} format {:.3} calls {:.2} void {} in {:.1}s {:?}",
            s.f1,
            s.em,
            s.format,
            s.tool_calls,
            s.void,
            t.elapsed().as_secs_f64(),
            by.iter()
                .map(|(k, v)| format!("{k} f1 {:.2} diag {:.2}", v.0 / v.1 as f64, v.2 as f64 / v.1 as f64))
                .collect::<Vec<_>>()
        );
        Ok(())
    };
    eval("warm", false)?;
    eval("warm withheld", true)?;
    // RL
    let optim = Optim { lr: arg("rllr", 3e-4), weight_decay: 0.0, micro_batch_tokens: 8192, ..Default::default() };
    let mut learner = Learner::new(model.clone(), &optim, engine.forbidden());
    let (p, g) = (arg("p", 16.0) as u64, arg("g", 8.0) as usize);
    for step in 0..arg("rl", 0.0) as u64 {
        let ts = Instant::now();
        let jobs: Vec<Job> = (0..p)
            .map(|i| {
                Ok(Job {
                    example: train.get((1 << 25) + seed * 100000 + step * p + i)?,
                    group: step * p + i,
                    samples: g,
                })
            })
            .collect::<varft::Result<_>>()?;
        let eps = ro.run(&jobs, seed, |_, _| ())?;
        let tr = ts.elapsed().as_secs_f64();
        let all: Vec<&Trajectory> = eps.iter().flatten().flatten().collect();
        let n = all.len() as f64;
        let f1 = all.iter().map(|t| t.reward.f1).sum::<f64>() / n;
        let fm = all.iter().map(|t| t.reward.format).sum::<f64>() / n;
        let diag = all.iter().filter(|t| t.steps[0].problem.first().is_some_and(|q| *q == t.kind)).count() as f64 / n;
        let mut groups = vec![];
        for gr in &eps {
            let gr: Vec<&Trajectory> = gr.iter().flatten().collect();
            let a = advantages::group_advantages(
                &gr.iter().map(|t| t.reward.total).collect::<Vec<_>>(),
                AdvantageScale::Group,
            );
            if a.zero_variance {
                continue;
            }
            groups.push(gr.into_iter().zip(a.values).collect::<Vec<_>>());
        }
        let lens: Vec<usize> = groups.iter().flatten().map(|(t, _)| t.sampled()).collect();
        let w = advantages::token_weights(LossKind::Dapo, &lens, 240);
        let mut w = w.into_iter();
        let gs: Vec<Vec<varft::train::batch::Sample>> = groups
            .iter()
            .map(|g| {
                g.iter()
                    .map(|&(trajectory, advantage)| varft::train::batch::Sample {
                        trajectory,
                        advantage,
                        weight: w.next().unwrap(),
                    })
                    .collect()
            })
            .collect();
        let micros = varft::train::batch::micro_batches(&gs, 8192);
        let pz = engine.pause()?;
        let (st, up) = learner.update(
            &micros,
            Goal::Grpo { clip_low: 0.2, clip_high: 0.28, beta: 0.0 },
            None,
            optim.lr * (1.0f64).min((step + 1) as f64 / 5.0),
        )?;
        pz.weights_changed()?;
        let mism = micros
            .iter()
            .flat_map(|m| m.entries.iter())
            .zip(&st.logp)
            .map(|(e, l)| (e.old_logp - l).abs())
            .fold(0.0, f32::max);
        if step % 5 == 0 {
            println!(
                "rl {step} f1 {f1:.3} format {fm:.3} diag {diag:.3} groups {} ent {:.3} mismatch {mism} grad {:.2} rollout {tr:.1}s train {:.1}s  {:.0}s",
                gs.len(),
                st.entropy.iter().sum::<f32>() / st.entropy.len() as f32,
                up.grad_norm,
                ts.elapsed().as_secs_f64() - tr,
                t0.elapsed().as_secs_f64()
            );
        }
    }
    eval("final", false)?;
    eval("final withheld", true)?;
    Ok(())
}
