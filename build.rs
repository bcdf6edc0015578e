//! Compiles the CUDA kernels twice: with nvcc for cards, into fat binaries that the program holds, and for the host, with the
//! emulator that runs them, into static libraries.
//!
//! nvcc is `NVCC`, or in `CUDA_HOME` or `CUDA_PATH`, on the `PATH`, in /usr/local/cuda, or in an active virtual environment of Python's.
//! Without one the crate builds all the same: `varft doctor` and `--device cuda` say what is missing. Whether there is a card
//! here is not asked.
//!
//! The host's compiler is `CXX`, or else the first of g++ and c++ on the `PATH`. Without one the crate builds all the same and says
//! what is missing; so it does with `VARFT_EMULATOR=0`. Code is for any x86-64; what is faster on newer processors is chosen
//! at run time.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bits must not depend on the processor, so nothing is contracted into fused multiply-adds that the source doesn't ask for;
/// nor by nvcc, where two kernels must give the same bits.
const FLAGS: [&str; 8] =
    ["-std=c++17", "-O2", "-g1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"];
/// Machine code for Ampere and Hopper, and PTX for what comes after.
const ARCHITECTURES: [&str; 6] = [
    "-gencode",
    "arch=compute_80,code=sm_80",
    "-gencode",
    "arch=compute_90a,code=sm_90a",
    "-gencode",
    "arch=compute_80,code=compute_80",
];
const KERNEL_FLAGS: [&str; 4] = ["-xc++", UNDEFINED, "-fno-optimize-sibling-calls", "-Wno-psabi"];
/// Makes the compiler call the emulator at every access of memory; the return address of each call is its place in the code.
const CHECKED: &str = "-fsanitize=thread";
/// Makes it call the emulator where C++ leaves a result undefined.
const UNDEFINED: &str = "-fsanitize=signed-integer-overflow,shift,integer-divide-by-zero,bounds-strict,float-cast-overflow,bool,unreachable,return,builtin";
/// What `VARFT_SANITIZE=address` asks for in place of the emulator's own checks of accesses: see scripts/sanitize.sh.
const ADDRESS: &str = "-fsanitize=address";

fn main() {
    println!("cargo::rustc-check-cfg=cfg(emulator)");
    for dir in ["build.rs", "kernels", "tests/kernels"] {
        println!("cargo::rerun-if-changed={dir}");
    }
    for var in ["CXX", "PATH", "VARFT_EMULATOR", "VARFT_SANITIZE", "NVCC", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV"] {
        println!("cargo::rerun-if-env-changed={var}");
    }
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    if let Err(why) = fatbins(&root, &out) {
        println!("cargo::error=the CUDA kernels: {why}");
    }
    match missing() {
        Some(what) => println!("cargo::warning=built without the CUDA emulator: {what}"),
        None => match build(&root, &out) {
            Ok(()) => println!("cargo::rustc-cfg=emulator"),
            // An emulator that silently isn't there would be tests that silently don't run.
            Err(why) => println!("cargo::error=the CUDA emulator: {why} (VARFT_EMULATOR=0 builds without it)"),
        },
    }
}

/// Writes `fatbins.rs`, a list of files and their fat binaries; an empty one where there is no nvcc.
fn fatbins(root: &Path, out: &Path) -> Result<(), String> {
    let (mut list, mut made) = (String::new(), Vec::new());
    if let Some(nvcc) = nvcc() {
        made = ARCHITECTURES.iter().filter_map(|a| a.split_once("code=").map(|(_, code)| code)).collect();
        let kernels = root.join("kernels");
        let mut commands = vec![];
        for source in kernel_files(&kernels)? {
            let name = place(&source, &kernels).replace(".cu", "");
            let fatbin = out.join(format!("{name}.fatbin"));
            list += &format!("({name:?}, &Aligned(*include_bytes!({:?})).0),\n", fatbin.display().to_string());
            let mut command = Command::new(&nvcc);
            command.args(["-std=c++17", "-O3", "-fmad=false", "--fatbin"]).args(ARCHITECTURES).arg("-I").arg(&kernels);
            command.arg(&source).arg("-o").arg(&fatbin);
            commands.push(command);
        }
        run_all(&mut commands)?;
    }
    let aligned = "/// The driver reads words.\n#[repr(C, align(16))]\n#[allow(dead_code)] // where there are none\nstruct Aligned<T>(T);\n";
    let text = format!(
        "{aligned}pub(super) const FATBINS: &[(&str, &[u8])] = &[{list}];\n\
         pub(super) const ARCHITECTURES: &[&str] = &{made:?};\n"
    );
    std::fs::write(out.join("fatbins.rs"), text).map_err(|e| format!("{}: {e}", out.display()))
}

fn nvcc() -> Option<PathBuf> {
    let home = |var: &str| env::var_os(var).map(|dir| PathBuf::from(dir).join("bin/nvcc"));
    let packages = env::var_os("VIRTUAL_ENV").map(|dir| PathBuf::from(dir).join("lib"));
    let packaged = packages.and_then(|lib| lib.read_dir().ok()).into_iter().flatten().flatten();
    let packaged = packaged.map(|python| python.path().join("site-packages/nvidia/cu13/bin/nvcc"));
    let usual = [env::var_os("NVCC").map(PathBuf::from), home("CUDA_HOME"), home("CUDA_PATH"), Some("nvcc".into())];
    let known = usual.into_iter().flatten().chain(["/usr/local/cuda/bin/nvcc".into()]).chain(packaged);
    known.into_iter().find(|c| Command::new(c).arg("--version").output().is_ok_and(|o| o.status.success()))
}

/// Why this build can have no emulator.
fn missing() -> Option<&'static str> {
    let target = |what: &str| env::var(format!("CARGO_CFG_TARGET_{what}")).unwrap_or_default();
    if env::var_os("VARFT_EMULATOR").is_some_and(|v| v == "0") {
        Some("VARFT_EMULATOR is 0")
    } else if (target("ARCH").as_str(), target("OS").as_str()) != ("x86_64", "linux")
        || env::var("HOST") != env::var("TARGET")
    {
        Some("it runs on x86-64 Linux, built on the same machine")
    } else if compiler().is_none() {
        Some("no C++ compiler was found (install g++, or set CXX, and build again)")
    } else {
        None
    }
}

fn build(root: &Path, out: &Path) -> Result<(), String> {
    let compiler = compiler().ok_or("no C++ compiler")?;
    let kernels = root.join("kernels");
    let emulator = files(&kernels.join("emulator"), "cpp")?;
    library(&compiler, out, "varft_kernels", &emulator, &kernel_files(&kernels)?, &kernels)?;
    let tests = root.join("tests/kernels");
    if tests.is_dir() {
        library(&compiler, out, "varft_test_kernels", &[], &files(&tests, "cu")?, &kernels)?;
    }
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=varft_kernels");
    if by_address() {
        // All of it, in the program itself: its runtime must come before every other library.
        let runtime = library_file(&compiler, "libasan.a").ok_or("there is no libasan.a beside the compiler")?;
        let whole = ["-Wl,--whole-archive", &runtime.to_string_lossy(), "-Wl,--no-whole-archive"];
        for arg in whole.iter().chain(&["-Wl,-Bstatic", "-lstdc++", "-Wl,-Bdynamic", "-lm"]) {
            println!("cargo::rustc-link-arg={arg}");
        }
    }
    link_standard_library(&compiler);
    Ok(())
}

fn by_address() -> bool {
    env::var_os("VARFT_SANITIZE").is_some_and(|v| v == "address")
}

fn compiler() -> Option<OsString> {
    let works = |c: &OsString| Command::new(c).arg("--version").output().is_ok_and(|o| o.status.success());
    env::var_os("CXX").into_iter().chain(["g++".into(), "c++".into()]).find(works)
}

fn files(dir: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut found: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    found.retain(|p| p.extension().is_some_and(|e| e == extension));
    found.sort();
    Ok(found)
}

/// Kernels of one file lie in the folder itself, those of several in a folder of their own.
fn kernel_files(kernels: &Path) -> Result<Vec<PathBuf>, String> {
    let mut sources = files(kernels, "cu")?;
    for folder in folders(kernels)? {
        sources.extend(files(&folder, "cu")?);
    }
    Ok(sources)
}

/// The name of what is made of a source: folders may hold files of one name.
fn place(source: &Path, root: &Path) -> String {
    let place = source.strip_prefix(root).unwrap_or(Path::new(source.file_name().unwrap_or_default()));
    place.to_string_lossy().replace('/', "-")
}

fn folders(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut found: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
    found.sort();
    Ok(found)
}

/// One object in an archive: whoever uses a part of it gets all of it, with the kernels' entries in the table of names.
fn library(
    compiler: &OsString,
    out: &Path,
    name: &str,
    sources: &[PathBuf],
    kernels: &[PathBuf],
    include: &Path,
) -> Result<(), String> {
    let mut objects = vec![];
    let mut commands = vec![];
    for (i, source) in sources.iter().chain(kernels).enumerate() {
        let object = out.join(format!("{name}-{}.o", place(source, include)));
        let mut command = Command::new(compiler);
        command.args(FLAGS);
        let kernel = i >= sources.len();
        if kernel {
            command.args(KERNEL_FLAGS).arg("-I").arg(include);
        }
        match by_address() {
            true => drop(command.arg(ADDRESS)),
            false if kernel => drop(command.arg(CHECKED)),
            false => {}
        }
        command.arg("-c").arg(source).arg("-o").arg(&object);
        objects.push(object);
        commands.push(command);
    }
    run_all(&mut commands)?;
    let (whole, archive) = (out.join(format!("{name}.o")), out.join(format!("lib{name}.a")));
    let mut link = Command::new(compiler);
    link.args(["-r", "-nostdlib", "-o"]).arg(&whole).args(&objects);
    done(link.status(), &link)?;
    let _ = std::fs::remove_file(&archive);
    let mut pack = Command::new("ar");
    pack.arg("crs").arg(&archive).arg(&whole);
    done(pack.status(), &pack)
}

/// Runs the commands, as many at a time as cargo allows.
fn run_all(commands: &mut [Command]) -> Result<(), String> {
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    for some in commands.chunks_mut(jobs) {
        let children: Vec<_> = some.iter_mut().map(|c| c.spawn()).collect();
        for (child, command) in children.into_iter().zip(some) {
            done(child.and_then(|mut c| c.wait()), command)?;
        }
    }
    Ok(())
}

fn done(status: std::io::Result<std::process::ExitStatus>, command: &Command) -> Result<(), String> {
    match status {
        Ok(s) if s.success() => Ok(()),
        Ok(s) => Err(format!("{command:?} ended with {s}")),
        Err(e) => Err(format!("{command:?}: {e}")),
    }
}

/// Statically where there is a static one: the program then starts where there is no C++.
fn link_standard_library(compiler: &OsString) {
    match library_file(compiler, "libstdc++.a") {
        Some(path) => {
            println!("cargo::rustc-link-search=native={}", path.parent().unwrap_or(&path).display());
            println!("cargo::rustc-link-lib=static:-bundle=stdc++");
        }
        None => println!("cargo::rustc-link-lib=stdc++"),
    }
}

/// A library that comes with the compiler.
fn library_file(compiler: &OsString, name: &str) -> Option<PathBuf> {
    let file = Command::new(compiler).arg(format!("-print-file-name={name}")).output().ok()?;
    let path = PathBuf::from(String::from_utf8_lossy(&file.stdout).trim());
    path.is_absolute().then_some(path)
}
