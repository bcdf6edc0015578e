use super::device::reason;
use super::memory;
use crate::device::{DType, Device, architectures, has_card, has_driver};
use crate::ops::linear::{self, Epilogue, Weight};
use crate::tools::python::environment::Search;
use crate::tools::{PythonOptions, PythonTool};
use crate::train::RunConfig;
use crate::{Error, Result};
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Check this machine: cores, SIMD, memory, GPU, disk, kernels, the Python environment; and plan the memory of training
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  varft doctor --dir runs\n  varft doctor --model models/mine --set model.freeze_vision=false\n\nEach line of the first part begins with ok, warn or fail; a line that does not say ok says what to do. \
                        The second part is the memory of `varft train` by what it is held for, on this device, and where that is no card, on \
                        cards of 80 and of 141 GB."
)]
pub(super) struct Args {
    /// Where runs will lie
    #[arg(long, default_value = "runs")]
    dir: PathBuf,
    /// Make the python tool's environment if there is none (about 100 MB of downloads)
    #[arg(long)]
    install: bool,
    /// A model's folder, or a run's, whose memory is planned too
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Sets one key of the run file that memory is planned for; may be repeated
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
}

/// What a check found.
enum Finding {
    Ok(String),
    /// It works, but not well: what, and what to do.
    Warn(String, &'static str),
    /// It does not work: what, and what to do.
    Fail(String, String),
}
use Finding::{Fail, Ok as Fine, Warn};

pub(super) fn run(args: &Args) -> Result<()> {
    let config = RunConfig::read(None, &args.overrides)?;
    let models = memory::models(args.model.as_deref())?;
    let device = Device::cpu(0);
    let card = Device::cuda(0);
    say!("varft {}", env!("CARGO_PKG_VERSION"));
    let mut failed = Vec::new();
    let mut show = |name: &'static str, finding: Finding| {
        let (word, text) = match finding {
            Fine(text) => ("ok", text),
            Warn(text, mend) => ("warn", format!("{text}; {mend}")),
            Fail(text, mend) => {
                failed.push(name);
                ("fail", format!("{text}; {mend}"))
            }
        };
        say!("{word:<5} {name:<8} {text}");
    };
    show("cores", cores(&device));
    show("simd", simd());
    show("memory", memory(&device));
    show("gpu", gpu(&card));
    show("cuda", built());
    show("disk", disk(&args.dir));
    show("kernels", kernels(&device));
    show("python", python(args.install));
    say!("\n{}", memory::table(&config, &models, card.as_ref().ok(), &device).trim_end());
    match failed.as_slice() {
        [] => Ok(()),
        names => Err(Error::limit(
            format!("this machine is not ready: {}", names.join(", ")),
            "see the lines above that begin with fail",
        )),
    }
}

fn cores(device: &Device) -> Finding {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| info.lines().find(|l| l.starts_with(name)).and_then(|l| l.split_once(": ")).map(|p| p.1);
    let all = info.lines().filter(|l| l.starts_with("processor")).count().max(device.threads());
    let mut text = format!("{} of {all}", device.threads());
    if let Some(model) = field("model name") {
        let _ = write!(text, ", {model}");
    }
    Fine(text)
}

#[cfg(target_arch = "x86_64")]
fn simd() -> Finding {
    match (is_x86_feature_detected!("avx512f"), is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
        (true, true) => Fine("AVX-512, AVX2, FMA".into()),
        (_, true) => Fine("AVX2, FMA".into()),
        _ => Warn("no AVX2 with FMA: everything runs, many times slower".into(), "use a processor made since 2013"),
    }
}
#[cfg(not(target_arch = "x86_64"))]
fn simd() -> Finding {
    Warn(
        format!("{}: portable kernels only", std::env::consts::ARCH),
        "the hand-written ones need x86-64 with AVX2 and FMA",
    )
}

fn memory(device: &Device) -> Finding {
    let Some(free) = device.available_bytes() else {
        return Warn("unknown: the system does not tell".into(), "look at it yourself: a quick start needs 4 GiB");
    };
    let text = format!("{:.1} GiB free", gib(free));
    match free {
        f if f < 4 << 30 => Warn(text, "close what else is running: a quick start needs 4 GiB"),
        _ => Fine(text),
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// The first card; a machine without one is not a lesser one.
fn gpu(card: &Result<Device>) -> Finding {
    match card {
        Ok(device) => match device.card() {
            Some(c) => Fine(format!(
                "{}, compute capability {}.{}, {:.1} of {:.1} GiB free, driver for CUDA {}.{}",
                c.name,
                c.capability / 10,
                c.capability % 10,
                gib(c.memory.0),
                gib(c.memory.1),
                c.driver / 1000,
                c.driver % 1000 / 10
            )),
            None => Fine("none".into()),
        },
        Err(e) => {
            let driver = if has_driver() { "there is a driver" } else { "there is no NVIDIA driver" };
            match has_card() {
                true => Warn(
                    format!("a card that is not used: {}; {driver}", reason(e)),
                    "the processor does the work; with --device cuda the commands say what to do",
                ),
                false => Fine(format!("none; {driver}")),
            }
        }
    }
}

/// What this program's kernels are built for.
fn built() -> Finding {
    match architectures() {
        [] => Fine("no kernels for cards: built without nvcc".into()),
        all => Fine(format!("kernels for {}", all.join(", "))),
    }
}

/// Free space where runs will lie: at the folder, or the nearest one above it that exists. A file is written there to see.
fn disk(dir: &Path) -> Finding {
    let full = std::env::current_dir().unwrap_or_default().join(dir);
    if full.exists() && !full.is_dir() {
        return Fail(format!("{} is a file, not a folder", dir.display()), "name a folder with --dir".into());
    }
    let Some(at) = full.ancestors().find(|p| p.is_dir()) else {
        return Fail(format!("no folder above {}", full.display()), "name another with --dir".into());
    };
    let probe = at.join(format!(".varft-doctor-{}", std::process::id()));
    let written = std::fs::write(&probe, [0; 4096]);
    let _ = std::fs::remove_file(&probe);
    if let Err(e) = written {
        return Fail(format!("{} cannot be written: {e}", at.display()), "name another with --dir".into());
    }
    let Ok(path) = std::ffi::CString::new(at.as_os_str().as_bytes()) else {
        return Fail(format!("{} has a zero byte in its name", at.display()), "name another with --dir".into());
    };
    // SAFETY: an all-zero statvfs is valid, and the call fills it.
    let (status, space) = unsafe {
        let mut space: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &mut space), space)
    };
    if status != 0 {
        return Warn(format!("{}: free space unknown", at.display()), "look at it yourself (df)");
    }
    let free = space.f_bavail * space.f_frsize;
    let text = format!("{:.1} GiB free for {}", gib(free), dir.display());
    match free {
        f if f < 2 << 30 => {
            Warn(text, "free some, or name another disk with --dir: checkpoints of larger models will not fit")
        }
        _ => Fine(text),
    }
}

/// A product against the same in f64, and the rates that bound everything else.
fn kernels(device: &Device) -> Finding {
    let rates = || -> Result<(f64, f64, f64)> {
        let s = device.stream();
        let (m, n, k) = (256, 1024, 1024);
        let value = |i: usize| ((i * 2_654_435_761) % 1021) as f32 / 510.0 - 1.0;
        let rows: Vec<f32> = (0..n * k).map(value).collect();
        let mut packed = vec![0.0; linear::packed_len(n, k)];
        linear::pack(&rows, n, k, &mut packed);
        let weight = Weight { data: device.upload(&packed), n, k };
        let host_x: Vec<f32> = (0..m * k).map(|i| value(i + 7)).collect();
        let (x, y) = (device.upload(&host_x), device.alloc(DType::F32, m * n));
        let best = |rows: usize, times: usize| -> Result<f64> {
            let mut best = f64::INFINITY;
            for _ in 0..times {
                let begun = Instant::now();
                linear::forward(&s, &x, &weight, Epilogue::None, &y, rows);
                s.synchronize()?;
                best = best.min(begun.elapsed().as_secs_f64());
            }
            Ok(best)
        };
        let flops = 2.0 * (m * n * k) as f64 / best(m, 20)?;
        let got = s.read::<f32>(&y).wait()?;
        let mut error = 0.0f64;
        for (i, j) in (0..m).step_by(17).flat_map(|i| (0..n).step_by(31).map(move |j| (i, j))) {
            let exact: f64 = (0..k).map(|t| f64::from(host_x[i * k + t]) * f64::from(rows[j * k + t])).sum();
            error = error.max((f64::from(got[i * n + j]) - exact).abs());
        }
        let bytes = (n * k * 4) as f64 / best(1, 200)?;
        Ok((error, flops, bytes))
    };
    match rates() {
        Ok((error, ..)) if error.is_nan() || error > 1e-3 => {
            Fail(format!("a product is wrong by {error:.1e}"), "please report it, with the lines above".into())
        }
        Ok((_, flops, bytes)) => Fine(format!(
            "products {:.0} GFLOP/s, one row {:.1} GB/s of weights from cache (docs/performance.md, on two cores with AVX-512: 210 \
             GFLOP/s, and 55 to 62 GB/s from memory)",
            flops / 1e9,
            bytes / 1e9
        )),
        Err(e) => Fail(e.to_string(), "please report it".into()),
    }
}

/// What to do about a Python that does not work. `given`: VARFT_PYTHON names it.
fn broken(given: bool) -> String {
    match given {
        true => "VARFT_PYTHON names it: set it to a Python that has numpy, OpenCV and Pillow and works, or unset it and the first \
                 run makes one"
            .into(),
        false => "training and evaluation need this tool: run `varft doctor --install`, or set VARFT_PYTHON to a Python that has \
                  numpy, OpenCV and Pillow"
            .into(),
    }
}

/// The python tool from end to end: its environment, its warm process, one call.
fn python(install: bool) -> Finding {
    let search = Search { install, ..Search::default() };
    let (given, allowed) = (search.python.is_some(), Search::default().install);
    let tool = match PythonTool::new(PythonOptions { search, ..PythonOptions::default() }) {
        Ok(tool) => tool,
        Err(e @ Error::Input { .. }) if !install => {
            let mend = match (given, allowed) {
                (true, _) => {
                    "set VARFT_PYTHON to a Python that has numpy, OpenCV and Pillow, or unset it and the first run makes one"
                }
                (_, true) => "run `varft doctor --install`, or let the first run make it",
                (_, false) => "run `varft doctor --install`",
            };
            let text = e.to_string();
            let line = text.lines().next().unwrap_or_default();
            // Here it is this command that did not ask for it, unless the variable is set too.
            let off = if allowed { ", and making one is turned off (VARFT_NO_INSTALL)" } else { "" };
            return Warn(line.strip_suffix(off).unwrap_or(line).to_string(), mend);
        }
        Err(e) => return Fail(e.to_string(), broken(given)),
    };
    let checked = tool.versions().and_then(|v| {
        tool.check()?; // the first call finds cold caches
        Ok((v, tool.check()?))
    });
    match checked {
        Ok((v, usage)) => Fine(format!(
            "{:.1} ms a call; Python {}, numpy {}, OpenCV {}, Pillow {}; {}",
            usage.wall.as_secs_f64() * 1e3,
            v.python,
            v.numpy,
            v.cv2,
            v.pillow,
            tool.interpreter().display()
        )),
        Err(e) => Fail(e.to_string(), broken(given)),
    }
}
